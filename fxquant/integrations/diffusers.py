"""diffusers: `FxQuantConfig` for a component's from_pretrained, and for a pipeline's; importing registers it.

A component that was loaded so is an ordinary one: it has no wrapper, `save_pretrained` (its own, or the pipeline's)
writes an ordinary folder whose `config.json` says how each module is quantized, and `from_pretrained` loads that bit
for bit, in a process that has imported this. Text encoders are transformers' models, and are loaded by transformers.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from fxquant.errors import InvalidQuantizationMap, NothingQuantized
from fxquant.integrations.arrivals import awaits_codes, check_all_came, freeze_if_all_came, freeze_rest, take_codes
from fxquant.integrations.diffusers_skeleton import StoredParts, make_skeleton
from fxquant.integrations.freed_memory import FreedMemory
from fxquant.integrations.module_tables import SCALES, ModuleTable
from fxquant.integrations.recipes import METHOD, Method
from fxquant.integrations.transformers import FxQuantConfig
from fxquant.model import QuantizeReport, quantize
from fxquant.nn import QModule


class FxQuantizer(DiffusersQuantizer):
    """What diffusers asks while it loads and saves. `report` says what was quantized, and what not."""

    use_keep_in_fp32_modules = True
    required_packages: Any = ["accelerate"]  # noqa: RUF012  (as diffusers has it)
    quantization_config: Any  # an FxQuantConfig
    report: QuantizeReport | None = None

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        if self.pre_quantized and quantization_config.table is None:
            raise InvalidQuantizationMap(["config.json has a quantization_config, and no table 'saved' in it"])
        self._stored = StoredParts(quantization_config.table) if self.pre_quantized else None
        self._awaited: set[str] = set()
        self._wrong: list[str] = []
        self._freed = FreedMemory()
        self._devices: dict[str, Any] = {}
        self._dtype = torch.float32
        self._loading: Any = None
        self._model = _nothing

    # ---- loading

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """Only heard, not changed: without one diffusers loads in float32."""
        self._dtype = torch_dtype or torch.float32
        return torch_dtype

    @property
    def supports_parallel_loading(self) -> bool:
        """Parts of one weight may come in two files."""
        return False

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The names that a float checkpoint has: parts of a weight stand for the weight."""
        return loaded_keys if self._stored is None else self._stored.float_names(loaded_keys)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called again when the map is settled."""
        self._devices = device_map if isinstance(device_map, dict) else {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._watch(model)
        if self.pre_quantized:
            self._loading = model
            self._awaited = make_skeleton(model, self.quantization_config.table, self._dtype)
        else:
            self.report = quantize(model, self.quantization_config.recipe)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Codes go into their modules here, before the loader casts and compares; the rest is the loader's."""
        if self._stored is None:
            return state_dict
        rest, complete = self._stored.take(state_dict, self._loading)
        for path, name, parts in complete:
            module = self._loading.get_submodule(path)
            self._wrong += take_codes(path, module, name, parts, self._device_of(f"{path}.{name}"))
        return rest

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        if self.pre_quantized:
            return isinstance(module, QModule) and name in SCALES
        return awaits_codes(module, name)

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        path, _, name = param_name.rpartition(".")
        module: QModule = model.get_submodule(path)
        if self.pre_quantized:  # a scale; the value was cast to the model's dtype
            module._buffers[name] = state_dict[param_name].to(target_device, torch.float32)
            return
        module._parameters[name] = nn.Parameter(param_value.to(target_device), requires_grad=False)
        freeze_if_all_came(path, module, self._freed)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._loading = None
        if self._stored is not None:
            check_all_came(model, self._awaited, self._wrong)
        else:
            freeze_rest(model)
        return model

    def adjust_target_dtype(self, torch_dtype: Any) -> Any:
        """For the device map: torch's dtype, or accelerate's, that takes what a code of the recipe's default does."""
        from accelerate.utils import CustomDtype

        spec = self.quantization_config.recipe.default_spec
        if spec is None or spec.weights is None:
            return torch_dtype
        bits = spec.weights.format.bits
        return CustomDtype.INT2 if bits <= 2 else CustomDtype.INT4 if bits <= 4 else torch.int8

    def _device_of(self, name: str) -> torch.device:
        """Where the map puts a parameter; codes of a module that it puts on a disk stay in memory."""
        owners = [path for path in self._devices if not path or name == path or name.startswith(f"{path}.")]
        device = self._devices[max(owners, key=len)] if owners else "cpu"
        return torch.device("cpu" if device == "disk" else device)

    # ---- saving

    @property
    def is_serializable(self) -> bool:
        """Asked by save_pretrained before it writes `config.json`, where the table belongs."""
        if (model := self._model()) is not None:
            self.quantization_config.table = ModuleTable.of(model, model.dtype)
        return True

    def _watch(self, model: Any) -> None:
        self._model = weakref.ref(model)
        model.register_to_config(quantization_config=self.quantization_config)

    def __getstate__(self) -> dict[str, Any]:
        """The model itself in place of a weak reference: copied or pickled with it, this is the copy's quantizer."""
        return {**self.__dict__, "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._model = _nothing if state["_model"] is None else weakref.ref(state["_model"])

    # ---- what the model can

    @property
    def is_trainable(self) -> bool:
        """Adapters and what stayed float; codes take no gradient."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _nothing() -> Any:
    return None


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FxQuantConfig
auto.AUTO_QUANTIZER_MAPPING[METHOD] = FxQuantizer


def attach(model: Any, preset: Any = None, **fields: Any) -> Any:
    """Make a diffusers model that `fxquant.quantize` quantized one that `save_pretrained` saves with its config.

    preset, fields: what it was quantized with, for the record; what counts are the modules. Returns the model.

    Raises:
        NothingQuantized: no module of it is.
    """
    if not any(isinstance(module, QModule) for module in model.modules()):
        raise NothingQuantized("attach")
    quantizer = FxQuantizer(FxQuantConfig(preset, **fields), pre_quantized=False)
    quantizer._watch(model)
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, Method.FXQUANT
    return model
