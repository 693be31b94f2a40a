"""transformers' own server with a quantized, compiled model in it. It takes no plug-in: it runs in this process.

Its `--quantization` knows bitsandbytes alone, and a model that fxquant saved loads only where fxquant is imported. So
the model is loaded here and handed to the server as the one that it is pinned to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from fxquant.errors import InvalidCheckpoint, InvalidOption, PackageMissing
from fxquant.integrations.recipes import METHOD
from fxquant.integrations.transformers import FxQuantConfig, compile_config
from fxquant.spec import ConfigLike

_NEEDED = ("fastapi", "uvicorn", "openai")


def load_served(
    source: str | os.PathLike[str],
    preset: ConfigLike = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    **fields: Any,
) -> Any:
    """The model of a folder or a hub's id, quantized: while it loads, or as it was saved.

    preset, fields: what `FxQuantConfig` takes; by default int8dq. A model that was saved quantized takes none.

    Raises:
        InvalidCheckpoint: it names no one class of transformers, or another library quantized it.
        InvalidOption: a recipe is given for a model that is quantized already.
    """
    import transformers

    source, remote = os.fspath(source), {"trust_remote_code": trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(source, **remote)
    told = getattr(config, "quantization_config", None)
    given = preset is not None or any(value is not None for value in fields.values())
    options: dict[str, Any] = {"dtype": dtype, "device_map": device, **remote}
    if told is None:
        options["quantization_config"] = FxQuantConfig(preset, **fields)
    elif _method(told) != METHOD:
        raise InvalidCheckpoint(source, f"the model is quantized already, by {_method(told)!r}; take the float one")
    elif given:
        raise InvalidOption("preset", preset, f"{source} holds a model that is quantized already; leave the recipe out")
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if len(names) == 1 else transformers.AutoModelForCausalLM
    return (kind or transformers.AutoModelForCausalLM).from_pretrained(source, **options).eval()


def _method(told: Any) -> str:
    found = told.get("quant_method") if isinstance(told, Mapping) else getattr(told, "quant_method", told)
    return str(found)[:40]


def prepare_generation(model: Any, processor: Any, max_cache_len: int, **options: Any) -> None:
    """`model.generate` from now on decodes by a compiled graph, in a static cache; the graph is made here.

    processor: the model's tokenizer or processor: what it gives beside the ids is part of the graph.
    max_cache_len: tokens of prompt and answer that the cache holds; a longer request gets a cache, and a graph, of its
    own. options: those of ``torch.compile(backend="fxquant", options=...)``.
    """
    told = model.generation_config
    told.cache_implementation, told.max_cache_len, told.compile_config = (
        "static",
        max_cache_len,
        compile_config(**options),
    )
    prompt = processor(text=["one two three"], return_tensors="pt").to(model.device)
    pad = told.pad_token_id if told.pad_token_id is not None else 0
    # As the server calls it: what else is given is part of the graph. Decoding makes the second token of an answer.
    model.generate(**prompt, min_new_tokens=3, max_new_tokens=3, pad_token_id=pad, tokenizer=processor)


def make_server(
    source: str | os.PathLike[str], model: Any, *, host: str = "localhost", port: int = 8000
) -> tuple[Any, Any]:
    """transformers' `Serve`, pinned to `model`, with the tokenizer or processor of `source`: (it, the processor).

    ``.server.run()`` serves. Requests name the model by `source`, or not at all.

    Raises:
        PackageMissing: what ``pip install 'transformers[serving]'`` brings is not there.
    """
    for package in _NEEDED:
        if find_spec(package) is None:
            raise PackageMissing("transformers[serving]", "fxquant serve")
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import TimedModel

    class Pinned(Serve):
        """Made without being started: the model comes first."""

        def start_server(self) -> None:
            return None

    made: Any = Pinned(host=host, port=port, non_blocking=True)
    manager, name = made._model_manager, os.fspath(source)
    key = manager.process_model_name(name)
    processor = manager._load_processor(key)
    manager.loaded_models[key] = TimedModel(model, timeout_seconds=-1, processor=processor)
    manager.force_model, manager.model_timeout = name, -1
    return made, processor
