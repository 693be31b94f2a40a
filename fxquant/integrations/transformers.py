"""transformers: `FxQuantConfig` for from_pretrained, which quantizes each weight as it arrives; importing registers it.

A model that was loaded so is an ordinary one: it has no wrapper, `save_pretrained` writes an ordinary folder whose
`config.json` says how each module is quantized, and `from_pretrained` loads that bit for bit, in a process that has
imported this.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fxquant.errors import FxQuantError, InvalidOption, InvalidQuantizationMap, NothingQuantized
from fxquant.integrations.arrivals import awaits_codes, check_all_came, freeze_rest
from fxquant.integrations.freed_memory import FreedMemory
from fxquant.integrations.module_tables import ModuleTable
from fxquant.integrations.recipes import METHOD, Method, Recipe
from fxquant.integrations.transformers_loading import (
    LoadCodes,
    QuantizeOnArrival,
    awaited_names,
    release,
    renamed_owners,
    tie,
)
from fxquant.integrations.transformers_skeleton import Skeleton, make_skeleton
from fxquant.model import QuantizeReport, quantize
from fxquant.nn import QModule


class FxQuantConfig(Recipe, QuantizationConfigMixin):
    """`from_pretrained(id, quantization_config=FxQuantConfig("int4wo"))`: the model comes quantized and frozen.

    Takes what `fxquant.quantize` takes: a preset's name, a `QuantConfig`, or weights=, activations=, embeddings=,
    group_size=, algorithm=, include=, exclude=, rules=. The model is the one that `fxquant.quantize` and
    `fxquant.freeze` make of the float model, the output layer included (exclude="lm_head" leaves it out).
    """

    quant_method: Any = Method.FXQUANT


class FxQuantizer(HfQuantizer):
    """What transformers asks while it loads, saves and generates. `report` says what was quantized, and what not."""

    quantization_config: Any  # an FxQuantConfig
    report: QuantizeReport | None = None

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        if self.pre_quantized and quantization_config.table is None:
            raise InvalidQuantizationMap(["config.json has a quantization_config, and no table 'saved' in it"])
        self.serialized_names: dict[str, list[str]] = {}
        self.failed: list[FxQuantError | str] = []
        self.freed = FreedMemory()
        self.left: set[str] = set()  # parameters that came in another shape: transformers says so
        self._tied: set[str] = set()
        self._skeleton = Skeleton(set(), {})
        self._conversions: list[Any] = []

    # ---- loading

    def _process_model_before_weight_loading(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self._tied = tie(model)
            self.report = quantize(model, self.quantization_config.recipe)
            return
        self._skeleton = make_skeleton(model, self.quantization_config.table, dtype or model.dtype)
        self.serialized_names = awaited_names(model)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a float weight becomes codes when it arrives: not those that are tied, which do so at the end."""
        path, _, name = param_name.rpartition(".")
        if self.pre_quantized or param_name in self._tied or param_name in self.left:
            return False
        return awaits_codes(model.get_submodule(path), name)

    def get_quantize_ops(self) -> QuantizeOnArrival:
        return QuantizeOnArrival(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": LoadCodes}

    def get_weight_conversions(self) -> list[Any]:
        self._conversions = [*renamed_owners(self._skeleton.renamed), *super().get_weight_conversions()]
        return self._conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        ours = {id(conversion) for conversion in self._conversions}  # they are not to be undone when it is saved
        model._weight_conversions = [c for c in model._weight_conversions if id(c) not in ours]
        self._conversions = []
        for error in self.failed:
            if isinstance(error, FxQuantError):
                raise error
        if self.pre_quantized:
            check_all_came(model, self._skeleton.awaited, [str(error) for error in self.failed])
        else:
            freeze_rest(model)
        if release(model) and "disk" in getattr(model, "hf_device_map", {}).values():
            raise InvalidOption("offload_buffers", True, "codes cannot be put on disk; without it they stay in memory")
        return model

    @property
    def quantized_element_size(self) -> float | None:
        """For the device map: bytes of a code of the recipe's default."""
        spec = self.quantization_config.recipe.default_spec
        return None if spec is None or spec.weights is None else spec.weights.format.bits / 8

    # ---- saving

    def is_serializable(self, *args: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called by save_pretrained before it writes `config.json`, where the table belongs."""
        model.config.quantization_config = self.quantization_config
        self.quantization_config.table = ModuleTable.of(model, model.dtype)
        return None, {}

    # ---- what the model can

    @property
    def is_trainable(self) -> bool:
        """Adapters and what stayed float; codes take no gradient."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


register_quantization_config(METHOD)(FxQuantConfig)
register_quantizer(METHOD)(FxQuantizer)


def attach(model: Any, preset: Any = None, **fields: Any) -> Any:
    """Make a transformers model that `fxquant.quantize` quantized one that `save_pretrained` saves with its config.

    preset, fields: what it was quantized with, for the record; what counts are the modules. Returns the model.

    Raises:
        NothingQuantized: no module of it is.
    """
    if not any(isinstance(module, QModule) for module in model.modules()):
        raise NothingQuantized("attach")
    config = FxQuantConfig(preset, **fields)
    model.hf_quantizer = FxQuantizer(config, pre_quantized=False)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, METHOD
    return model


def compile_config(*, fullgraph: bool = True, **options: Any) -> Any:
    """For `generate(..., cache_implementation="static", compile_config=compile_config())`: decoding is compiled.

    transformers leaves the prompt's pass in eager, on the same codes, and compiles that of one token, on CPUs too.
    options: those of ``torch.compile(backend="fxquant", options=...)``.

    Returns transformers' `CompileConfig`.
    """
    from transformers import CompileConfig

    made: Any = CompileConfig(backend="fxquant", fullgraph=fullgraph, mode=None, options=options or None)  # type: ignore[arg-type]
    made._compile_all_devices = True
    return made
