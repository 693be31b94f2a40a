"""QModule: what every quantized module has in common.

A module is quantized in place, by giving it the class of its quantized kind: it stays the same object, with its names,
hooks, mode and attributes. Its weight stays a float parameter, rounded at each call with a straight-through gradient,
until `freeze` puts codes in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxquant import cpu_kernels
from fxquant.errors import FrozenWeight, IncompleteModuleKind
from fxquant.nn import devices, forms, recording
from fxquant.nn.forms import PARTS, STORED, Form
from fxquant.nn.readonly import weight_to_read
from fxquant.nn.warn import warn_uncalibrated
from fxquant.numerics.held import held_dtype
from fxquant.spec import TENSOR, LinearSpec, TensorSpec
from fxquant.tensor import QuantizedTensor

_FXQUANT = torch.ops.fxquant


class QModule(nn.Module):
    """The mixin of quantized modules; `fxquant.quantize` makes them.

    ``quantization`` is what the module was asked to be. ``calibratable``: its activations are quantized dynamically
    until a `Calibration` has set ``input_scale`` (float32, 0-d), and statically per tensor from then on.
    """

    weight_names: ClassVar[tuple[str, ...]] = ("weight",)
    kind: ClassVar[str] = "linear"  # as configs know it: linear, conv, embedding, norm

    quantization: LinearSpec
    calibratable: bool
    input_scale: Tensor | None
    output_scale: Tensor | None
    # Plain constants, which Dynamo guards on: specs as text ("" is float), and the forms of frozen weights by name.
    _weight_spec: str
    _activation_spec: str
    _static_spec: str
    _forms: dict[str, Form]
    # The module whose frozen weight this one shares (tied weights): one or none, in a tuple since it is no child.
    _owner: tuple[QModule, ...]
    # Modules that had the same float weight when they were quantized, and quantize it as the same matrix.
    _ties: tuple[QModule, ...]
    # Paths of modules that want a calibration and have none: shared by them, emptied by the first warning.
    _uncalibrated: list[str]

    def __init__(self, *args: Any, **options: Any) -> None:
        """A float module of the original class's signature: libraries make modules as `type(module)(...)`."""
        super().__init__(*args, **options)
        self.adopt(LinearSpec(None, None), calibratable=False)

    # ---- what a kind of module says of itself

    def matrix(self, weight: Tensor, name: str = "weight") -> Tensor:
        """The weight as the matrix [N, K] that is quantized: a view or a copy; features in rows."""
        return weight.reshape(weight.shape[0], -1)

    def unmatrix(self, matrix: Tensor, name: str = "weight") -> Tensor:
        """The inverse of `matrix`."""
        raise IncompleteModuleKind(type(self).__name__, "unmatrix", "gives a matrix [N, K] the weight's own shape")

    def float_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """What torch's module computes of `x`, with this weight in place of its own."""
        raise IncompleteModuleKind(type(self).__name__, "float_product", "computes the layer with a weight it is given")

    def kernel_product(self, x: Tensor, activations: str) -> Tensor:
        """The same by the kernels that read the frozen weight; `activations` is the spec of x, "" for a float one."""
        raise IncompleteModuleKind(type(self).__name__, "kernel_product", "computes the layer on its frozen weight")

    def has_kernels(self, name: str = "weight") -> bool:
        """Whether `kernel_product` serves this module; else its frozen weight is decoded at each call."""
        return True

    def has_int8_kernels(self, name: str = "weight") -> bool:
        """Whether the kernels of int8 rows serve it, which have a layout of their own."""
        return True

    def has_tile_kernels(self, name: str = "weight") -> bool:
        """Whether the Triton kernels serve it where they run: those of linears."""
        return False

    @classmethod
    def unfit(cls, module: nn.Module, spec: LinearSpec) -> str:
        """Why `module`, not quantized yet, can't become this class with that spec, in words; empty if it can."""
        if isinstance(module, QModule) and module.is_frozen:
            return ""
        weights = {name: p for name in cls.weight_names if (p := module._parameters.get(name)) is not None}
        if not weights or any(map(is_lazy, weights.values())):
            return "its weight is computed (parametrized), or not made before the first call (lazy)"
        for name, weight in weights.items():
            if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return f"its {name} is {weight.dtype}: float32, bfloat16 and float16 can be quantized"
            if not weight.numel():
                return f"its {name} is empty"
            if spec.weights is not None and (problem := spec.weights.granularity.unfit((2, 2))):
                return problem
        return ""

    # ---- running

    def forward(self, input: Tensor) -> Tensor:
        if recording.ACTIVE:
            return recording.recorded(self, input, self._computed)
        return self._computed(input, self._activation_spec)

    def _computed(self, x: Tensor, activations: str) -> Tensor:
        x = self._entered(x)
        held = self._holder()
        if held._forms and held._forms["weight"].layout != "rows":
            return self.kernel_product(x, activations)
        return self.float_product(self.rounded(x, activations), self.float_weight(x.dtype))

    def _entered(self, x: Tensor) -> Tensor:
        """x as products take it: under autocast in its dtype. Warns, once, where a calibration is missing."""
        if self._uncalibrated:
            warn_uncalibrated(self._uncalibrated)
        device = x.device.type
        if device != "meta" and x.is_floating_point() and torch.is_autocast_enabled(device):
            return x.to(torch.get_autocast_dtype(device))
        return x

    def rounded(self, x: Tensor, activations: str) -> Tensor:
        """x, rounded to the values of its format: with the calibrated scale if there is one, else by its own range."""
        if not activations:
            return x
        if self.input_scale is not None:
            return _FXQUANT.fake_quantize_static(x, self.input_scale, self._static_spec)
        return _FXQUANT.fake_quantize(x, activations)

    def float_weight(self, dtype: torch.dtype, name: str = "weight") -> Tensor:
        """The weight as the module computes with it: rounded (with a straight-through gradient), or decoded."""
        held = self._holder()
        if name in held._forms:
            return self.unmatrix(forms.decoded(held.parts(name), held._forms[name], dtype), name)
        weight = self._parameters[name]
        assert weight is not None
        if not self._weight_spec:
            return weight
        rounded = _FXQUANT.fake_quantize_weight(
            self.matrix(weight, name), self._weight_spec, self.quantization.algorithm
        )
        return self.unmatrix(rounded, name)

    # ---- frozen weights

    @property
    def is_frozen(self) -> bool:
        """True if the weights are codes."""
        return bool(self._forms) or bool(self._owner)

    @property
    def weight(self) -> Any:
        """The float parameter; of a frozen module a dequantized copy, to read: writing to it raises `FrozenWeight`."""
        return weight_to_read(self) if self.is_frozen else self._parameters["weight"]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the weight had, or would have after the `.half()` and `.to(dtype)` since."""
        probe = self._buffers.get("compute_like")
        if probe is not None:
            return probe.dtype
        return next(p.dtype for p in (self._parameters.get(n) for n in self.weight_names) if p is not None)

    def quantized_weight(self, name: str = "weight") -> QuantizedTensor:
        """Codes and scales, in no kernel's layout. Of a module that is not frozen: what `freeze` would give."""
        held = self._holder()
        if name in held._forms:
            return forms.unpack(held.parts(name), held._forms[name])
        weight = self._parameters[name]
        assert weight is not None
        with torch.no_grad():
            matrix = self.matrix(weight, name)
            return QuantizedTensor.quantize(matrix, TensorSpec.parse(self._weight_spec), self.quantization.algorithm)

    def parts(self, name: str = "weight") -> tuple[Tensor | None, ...]:
        """The resident tensors of a frozen weight, in the order of `forms.PARTS`."""
        buffers = self._buffers
        return tuple([buffers[f"{name}_{part}"] for part in PARTS])

    def freeze(self) -> None:
        """Put codes in the place of the float weights, which are let go one by one. Does nothing if frozen."""
        if self.is_frozen or not self._weight_spec:
            return
        self._remember_dtype()
        for name in self.weight_names:
            if self._parameters.get(name) is not None:
                self.hold(name, self.quantized_weight(name))

    def follow(self, owner: QModule) -> None:
        """Use the frozen weight of `owner`, whose float weight was this module's own: tied weights stay one."""
        self._remember_dtype()
        self._parameters.pop("weight", None)
        self._owner = (owner,)

    def _remember_dtype(self) -> None:
        """An empty tensor that casts reach: it says in what dtype a module computes that has no float weight."""
        if "compute_like" not in self._buffers:
            self.register_buffer("compute_like", torch.empty(0, dtype=self.compute_dtype), persistent=False)

    def hold(self, name: str, weight: QuantizedTensor) -> None:
        """Make these codes the frozen weight of that name, in the layout of the kernels that read it."""
        form = self._form(name, weight.spec, weight.shape, weight.codes.device)
        self._hold(name, form, forms.pack(weight, form))

    def _form(self, name: str, spec: TensorSpec, shape: tuple[int, int], device: torch.device) -> Form:
        return forms.form_of(
            spec,
            shape,
            on_kernels=self.has_kernels(name),
            on_int8_kernels=self.has_int8_kernels(name),
            on_device=self._layout_on(device, name, spec, shape),
        )

    def _hold(self, name: str, form: Form, parts: tuple[Tensor | None, ...]) -> None:
        was_float = self._parameters.pop(name, None)
        for part, tensor in zip(PARTS, parts, strict=True):
            # An absent part is no non-persistent buffer: accelerate moves those by name, and looks at their device.
            self.register_buffer(f"{name}_{part}", tensor, persistent=tensor is None)
        # Those that are None last: torch.export takes the n-th buffer of a root for its n-th input, None or not.
        self._buffers = dict(sorted(self._buffers.items(), key=lambda item: item[1] is None))
        self._forms = {**self._forms, name: form}
        for other in self._ties:
            if was_float is not None and other._parameters.get(name) is was_float:
                other.follow(self)

    def _holder(self) -> QModule:
        return self._owner[0] if self._owner else self

    # ---- what a module must survive

    def adopt(self, spec: LinearSpec, calibratable: bool) -> None:
        """Become quantized as `spec` says: for a module whose class has just become this one, or to change a spec."""
        cpu_kernels.load()
        weights, activations = spec.weights, spec.activations
        if "_forms" not in self.__dict__:
            self._forms, self._owner, self._ties = {}, (), ()
            self.register_buffer("input_scale", None)
            self.register_buffer("output_scale", None)
        elif (activations, calibratable) != (self.quantization.activations, self.calibratable):
            self.input_scale = self.output_scale = None  # they belong to what was calibrated
        self.quantization = spec
        self.calibratable = calibratable
        self._weight_spec = "" if weights is None else str(weights)
        self._activation_spec = "" if activations is None else str(activations)
        self._static_spec = "" if activations is None else str(TensorSpec(activations.format, TENSOR))
        self._uncalibrated = []

    def stop_waiting(self, path: str) -> None:
        """Its scales are known: the modules that want a calibration, who share a list of paths, are one less."""
        if path in self._uncalibrated:
            self._uncalibrated.remove(path)
        self._uncalibrated = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        cpu_kernels.load()  # a pickle may come from another process
        super().__setstate__(state)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.weight_names and (self.__dict__.get("_forms") or self.__dict__.get("_owner")):
            raise FrozenWeight(type(self).__name__, name)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves codes and scales, and never casts them: `.half()` changes what the module computes in."""
        names = [f"{name}_{part}" for name in self._forms for part in PARTS] + ["input_scale", "output_scale"]
        held = {name: tensor for name in names if (tensor := self._buffers.get(name)) is not None}
        for name in held:
            self._buffers[name] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(held)
        for name, tensor in held.items():
            self._buffers[name] = _moved(fn, tensor)
        if any(devices.arch_of(tensor.device) for tensor in held.values()):
            self.settle()  # back on a CPU they do so when they are next run: offloading moves them there to rest
        return self

    def settle(self) -> None:
        """Codes that came to another kind of device take the layout that kernels read there."""
        for name, form in self._forms.items():
            codes = self._buffers[f"{name}_codes"]
            assert codes is not None
            wanted = self._layout_on(codes.device, name, form.parsed, (form.rows, form.columns))
            is_there = form.layout == wanted if wanted else form.layout not in forms.ON_DEVICES
            if form.layout != "rows" and codes.device.type != "meta" and not is_there:
                self.hold(name, forms.unpack(self.parts(name), form))

    def _layout_on(self, device: torch.device, name: str, spec: TensorSpec, shape: tuple[int, int]) -> str:
        return devices.layout_on(device, spec, self._activation_spec, shape) if self.has_tile_kernels(name) else ""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, form in self._forms.items():
            stored = forms.stored(self.parts(name), form)
            destination.update({f"{prefix}{name}_{part}": tensor for part, tensor in stored.items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        """Takes codes where the state dict has them (a module that is not frozen becomes so), else what torch does."""
        missing, _, errors = lists
        rest = dict(state_dict)
        for name in self.matrix_names():
            stored = {part: rest.pop(key) for part in STORED if (key := f"{prefix}{name}_{part}") in rest}
            if stored:
                self._load_codes(name, stored, prefix, errors)
            elif name in self._forms and f"{prefix}{name}" in rest:
                rest.pop(f"{prefix}{name}")
                errors.append(f"{prefix}{name} is float, but the module is frozen: load it before freeze")
            elif name in self._forms:
                missing.append(f"{prefix}{name}_codes")
            elif f"{prefix}{name}" not in rest and self._is_tied(name):
                rest[f"{prefix}{name}"] = self._parameters[name]  # it comes under the other's name
        for scale in ("input_scale", "output_scale"):
            if (key := prefix + scale) in rest and self._buffers[scale] is None:
                self._buffers[scale] = torch.empty_like(rest[key], device=self._device())
        if f"{prefix}input_scale" in rest:
            self.stop_waiting(prefix.removesuffix(".") or "(root)")
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, *lists)

    def _is_tied(self, name: str) -> bool:
        weight = self._parameters.get(name)
        return weight is not None and any(other._parameters.get(name) is weight for other in self._ties)

    def _load_codes(self, name: str, stored: Mapping[str, Tensor], prefix: str, errors: list[str]) -> None:
        rows, columns = self.matrix_shape(name)
        device, spec = self._device(), TensorSpec.parse(self._weight_spec)
        try:
            if "codes" in stored and len(stored["codes"]) != rows:
                raise ValueError(f"codes of {len(stored['codes'])} rows, the module's weight is {(rows, columns)}")
            here = {part: t if t.device == device else _copied(t, device) for part, t in stored.items()}
            form = self._form(name, spec, (rows, columns), device)
            parts = forms.resident(here, form)
            self._remember_dtype()
            self._hold(name, form, parts)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            errors.append(f"{prefix}{name}: not the codes of {spec}: {error}")

    def matrix_names(self) -> tuple[str, ...]:
        """The names of its weights that are there, float or frozen."""
        held = self._holder()
        return tuple(n for n in self.weight_names if n in held._forms or self._parameters.get(n) is not None)

    def matrix_shape(self, name: str = "weight") -> tuple[int, int]:
        """[N, K] of a weight, frozen or not."""
        if form := self._holder()._forms.get(name):
            return form.rows, form.columns
        weight = self._parameters[name]
        assert weight is not None
        rows, columns = self.matrix(weight, name).shape
        return rows, columns

    def _device(self) -> torch.device:
        tensors = [*self._parameters.values(), *self._buffers.values()]
        device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
        return torch.device("cpu") if device.type == "meta" else device

    def extra_repr(self) -> str:
        state = "frozen" if self.is_frozen else "float weight"
        static = ", static" if self.input_scale is not None else ""
        return f"{super().extra_repr()}, {self.quantization} ({state}{static})"


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy there, of float8 as that device holds it."""
    raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    return raw.to(device, copy=True).view(held_dtype(tensor.dtype, device))


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`tensor` where `fn` puts tensors, in its own dtype: `fn` sees its bytes, which nothing casts but Module.type."""
    raw = tensor.reshape(-1).view(torch.uint8) if tensor.dim() == 0 else tensor.view(torch.uint8)
    out = fn(raw)
    if out.dtype is not torch.uint8:
        out = raw.to(out.device)
    return out.view(tensor.dtype).reshape(tensor.shape)
