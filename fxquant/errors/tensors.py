"""Weights and inputs whose values, dtypes, shapes or gradients do not do."""

from __future__ import annotations

from collections.abc import Sequence

from fxquant.errors.base import FxQuantError


class NonFiniteWeight(FxQuantError, ValueError):
    """A weight that holds NaN or infinity."""

    def __init__(self, path: str, count: int, first: Sequence[int]) -> None:
        super().__init__(
            f"weight {path!r} holds {count} non-finite value{'' if count == 1 else 's'}, the first at {list(first)}. "
            f"Check the checkpoint, or keep this layer float with rules={{{path!r}: None}}."
        )


class UnsupportedActivation(FxQuantError, TypeError):
    """An activation of a dtype that cannot be quantized, such as integer or complex."""

    def __init__(self, where: str, dtype: object) -> None:
        super().__init__(
            f"{where}: the activation has dtype {dtype}, but float32, bfloat16 or float16 is needed. "
            "Convert it first, or keep this layer float."
        )


class ShapeMismatch(FxQuantError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit together; `met` and `wanted` are short phrases."""

    def __init__(self, where: str, met: str, wanted: str) -> None:
        super().__init__(f"{where}: met {met}, but {wanted} is needed. Check that input and weight belong together.")


class UnevenScales(FxQuantError, ValueError):
    """Stepped scales of which some are not whole multiples of one step of their row."""

    def __init__(self, row: int, most: int) -> None:
        super().__init__(
            f"the scales of row {row} are not whole multiples, 1 to {most}, of one step, as in a stepped spec. "
            "Quantize the float weight anew, or say 'bf16' instead of 'stepped' in its spec."
        )


class NestedInput(FxQuantError, TypeError):
    """A nested tensor given to a module that takes padded ones."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: met a nested tensor, which the kernels do not take. Give it padded, as x.to_padded_tensor(0.0) "
            "with a key_padding_mask. An nn.TransformerEncoder makes none if its use_nested_tensor is False, "
            "as it is where fxquant.quantize has quantized the whole encoder."
        )


class GradientsNeedTraining(FxQuantError, RuntimeError):
    """A gradient was asked for where only inference is served."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: a gradient was asked for, but this is inference only. "
            "Run it under torch.no_grad() or detach its input. "
            "To train with rounded weights, compile with training=True."
        )


class ForgottenNoGradWarning(UserWarning):
    """Inference in grad mode: served without gradients."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: called in grad mode, and a value requires grad only because a parameter does. "
            "The result carries no gradient. Call it under torch.no_grad() or torch.inference_mode()."
        )
