"""State dicts, quantization maps and folders that cannot be written, read or fitted to a model."""

from __future__ import annotations

from collections.abc import Sequence

from fxquant.errors.base import FxQuantError
from fxquant.errors.words import listed, sentence


class StateDictMismatch(FxQuantError, ValueError):
    """A state dict that is not the model's; `missing`, `unexpected` and `wrong` are keys, or say what is wrong."""

    def __init__(self, missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str] = ()) -> None:
        self.missing, self.unexpected, self.wrong = tuple(missing), tuple(unexpected), tuple(wrong)
        parts = {"missing": self.missing, "unexpected": self.unexpected, "wrong": self.wrong}
        lines = "".join(f"\n  {what}: {listed(keys)}" for what, keys in parts.items() if keys)
        super().__init__(
            f"the state dict does not fit the model; nothing has been changed:{lines}\n"
            "Check that model, state dict and quantization map belong together."
        )


class InvalidQuantizationMap(FxQuantError, ValueError):
    """A quantization map that does not fit the model, or that cannot be read; `problems` are short phrases."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = "".join(f"\n  {problem}" for problem in self.problems[:16])
        rest = f"\n  and {len(self.problems) - 16} more" if len(self.problems) > 16 else ""
        super().__init__(
            f"the quantization map does not fit; nothing has been changed:{shown}{rest}\n"
            "Take the map that quantization_map(model) gave of the model whose state dict this is."
        )


class InvalidCheckpoint(FxQuantError, ValueError):
    """A file of a checkpoint that is damaged, hostile, or something else; `path` is the file's."""

    def __init__(self, path: object, problem: str) -> None:
        self.path = str(path)
        super().__init__(
            f"{str(path)!r} cannot be loaded: {sentence(problem)} Nothing has been changed. "
            "Save or download the folder anew; only safetensors and JSON are read."
        )


class BuffersOnMeta(FxQuantError, RuntimeError):
    """Tensors on the meta device whose values no state dict holds and nothing can compute anew; `names` are paths."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"{listed(self.names)}: on the meta device, not part of the state dict, and the model has no "
            "_init_weights that computes them; nothing has been changed. Build the model with its buffers: without "
            "torch.device('meta'), or under accelerate's init_empty_weights(), which keeps buffers real."
        )


class NotForQuanto(FxQuantError, ValueError):
    """A module as optimum-quanto cannot hold it; `path` is the module's."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        super().__init__(
            f"{path or '(root)'}: optimum-quanto cannot hold it: {sentence(reason)} "
            "Quantize it anew as Quanto does, or keep it in fxquant's own state dict and quantization_map."
        )


class NotStorable(FxQuantError, ValueError):
    """Something in a model's state dict that safetensors cannot hold; `key` names it."""

    def __init__(self, key: str, reason: str) -> None:
        self.key = key
        super().__init__(f"{key!r} cannot be saved: {sentence(reason)} Nothing has been written.")


class SaveFailed(FxQuantError, OSError):
    """A folder that could not be written or replaced; `folder` is its path."""

    def __init__(self, folder: object, reason: str) -> None:
        self.folder = str(folder)
        super().__init__(
            f"cannot save to {str(folder)!r}: {sentence(reason)} What was there before is as it was. "
            "Give a folder of the model's own, on a disk with room for it."
        )
