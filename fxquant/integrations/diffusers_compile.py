"""compile_pipeline: the models of a diffusers pipeline compiled, and quantized, where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from fxquant.errors import InvalidOption, PatternMatchesNothing
from fxquant.integrations.compiled_forward import CompiledForward, compile_in_place
from fxquant.integrations.recipes import FIELDS
from fxquant.nn import QModule
from fxquant.report import ModelReport
from fxquant.spec import ConfigLike, QuantConfig, resolve_config


def compile_pipeline(
    pipe: Any,
    preset: ConfigLike = None,
    *,
    components: Iterable[str] | Mapping[str, ConfigLike] | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **fields: Any,
) -> Any:
    """Compile the models of a pipeline where they are, and quantize those that are float; returns the pipeline.

    Models stay the objects that they are: `save_pretrained`, offloading, LoRA and schedulers work as before, and hooks
    of offloading stay outside of the graphs, set before this call or after it. Of a model that decodes (a VAE) the
    decoder is compiled, so that tiling and slicing stay outside too. As with `fxquant.compile`, quantized weights are
    made beside the float ones, and those of q, k and v are joined. A model that is quantized already (it was loaded
    with `FxQuantConfig`, say) is compiled on the codes that it has, which are all that it holds.

    preset      as for `fxquant.compile`. None: models are compiled as they are, float or quantized.
    components  names of models, or a mapping to presets (None: as it is). By default all modules.
    fullgraph, dynamic  torch.compile's. fields: `QuantConfig`'s ('exclude', 'rules', 'executor', 'mode', ...).

    Raises:
        InvalidOption: a component that the pipeline has not.
        UnknownPreset, UnknownOption, ...: the config does not make sense.
        PatternMatchesNothing: a pattern matches no module of a component that is to be quantized.
    """
    parts = modules_of(pipe)
    running = QuantConfig.from_options({name: value for name, value in fields.items() if name not in FIELDS})
    chosen = {
        name: _wanted(parts[name], recipe, fields) for name, recipe in _presets(parts, components, preset).items()
    }
    for name, config in chosen.items():
        part = parts[name]
        for module in part.modules():
            if isinstance(module, PreTrainedModel):
                maybe_install_capturing_hooks(module)  # else it takes a lock at its first call, which breaks the graph
        compile_in_place(_compiled_part(part), config, running, fullgraph=fullgraph, dynamic=dynamic)
    return pipe


def reports(pipe: Any) -> dict[str, ModelReport]:
    """By component that `compile_pipeline` compiled: what runs on which kernel, as far as calls have shown."""
    found = {name: CompiledForward.of(_compiled_part(part)) for name, part in modules_of(pipe).items()}
    return {name: forward.report() for name, forward in found.items() if forward is not None}


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that are modules."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _presets(parts: Mapping[str, nn.Module], components: Any, preset: ConfigLike) -> dict[str, ConfigLike]:
    if components is None:
        return dict.fromkeys(parts, preset)
    names = [components] if isinstance(components, str) else list(components)
    for name in names:
        if name not in parts:
            raise InvalidOption("components", name, f"the models of this pipeline are {', '.join(parts)}")
    return dict(components) if isinstance(components, Mapping) else dict.fromkeys(names, preset)


def _wanted(part: nn.Module, recipe: ConfigLike, fields: Mapping[str, Any]) -> QuantConfig | None:
    """What a component is to be quantized as; None if it stays as it is."""
    if recipe is None or any(isinstance(module, QModule) for module in part.modules()):
        return None
    config = resolve_config(recipe, fields)
    target = _compiled_part(part)
    paths = [path for path, _ in target.named_modules(remove_duplicate=False) if path]
    if dead := config.unmatched(paths):
        raise PatternMatchesNothing(dead, paths)
    return config


def _compiled_part(part: nn.Module) -> nn.Module:
    """The decoder of a model that decodes, else the model."""
    decoder = getattr(part, "decoder", None)
    return decoder if hasattr(part, "decode") and isinstance(decoder, nn.Module) else part
