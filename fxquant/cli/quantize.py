"""`fxquant quantize`: a model's folder in, the folder of the quantized model out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fxquant.errors import InvalidCheckpoint, InvalidOption, PackageMissing

if TYPE_CHECKING:
    from fxquant.model import QuantizeReport

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder that transformers' save_pretrained wrote.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; an old one is replaced at once.")],
    preset: Annotated[str | None, typer.Option(help="int8wo, int8dq, int4wo, ...; by default int8dq.")] = None,
    weights: Annotated[str | None, typer.Option(help="A format, such as int4 or int4/group64/affine.")] = None,
    activations: Annotated[str | None, typer.Option(help="A format, such as int8.")] = None,
    embeddings: Annotated[str | None, typer.Option(help="A format for tables; by default they stay float.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="absmax, minmax, mse or hqq.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="A glob of modules; may be given again.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A glob of modules that stay float; again, too.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="GLOB=PRESET, such as '*.mlp.*=int4wo'; again, too.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: what it computes in.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace a DST that is there.")] = False,
) -> None:
    """Quantize a model of transformers: each weight as it is read, so that memory holds the quantized model and one."""
    fields: dict[str, Any] = {"weights": weights, "activations": activations, "embeddings": embeddings}
    fields |= {"group_size": group_size, "algorithm": algorithm, "include": include, "exclude": exclude}
    fields["rules"] = [rule_of(text) for text in rule or []] or None
    if dtype not in _DTYPES:
        raise InvalidOption("dtype", dtype, f"it takes {', '.join(_DTYPES)}")
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise InvalidOption("DST", str(target), "it is there already; give --overwrite, or another folder")
    kind = _model_class(source)
    from fxquant.integrations.transformers import FxQuantConfig
    from fxquant.integrations.transformers_saving import save_pretrained

    config = FxQuantConfig(preset, **fields)
    model = kind.from_pretrained(source, quantization_config=config, dtype=dtype)
    save_pretrained(model, target, source=source, max_shard_size=max_shard_size)
    _say(model.hf_quantizer.report, target)


def _model_class(source: Path) -> Any:
    """The class of a folder's model. Raises `InvalidCheckpoint` if it is no float model of transformers."""
    from fxquant.checkpoint.json_files import read_json

    file = source / "config.json"
    if (source / "model_index.json").exists():
        raise InvalidCheckpoint(source, "it is a pipeline of diffusers; give the folder of one of its models")
    told = read_json(file)
    if "quantization_config" in told:
        other = told["quantization_config"]
        method = str(other.get("quant_method") if isinstance(other, dict) else other)[:40]
        raise InvalidCheckpoint(file, f"the model is quantized already, by {method!r}; take the float one")
    names = told.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise InvalidCheckpoint(file, "it names no one class of transformers under 'architectures'")
    try:
        import transformers
    except ImportError as error:
        raise PackageMissing("transformers", "fxquant quantize") from error
    kind = getattr(transformers, names[0], None)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise InvalidCheckpoint(file, f"transformers {transformers.__version__} has no class {names[0][:80]!r}")
    return kind


def rule_of(text: str) -> tuple[str, str | None]:
    """A glob and its preset, as the command line spells them. Raises `InvalidOption`."""
    pattern, equals, spec = text.partition("=")
    if not equals or not pattern:
        raise InvalidOption("rule", text, "it takes GLOB=PRESET, or GLOB=none for modules that stay float")
    return pattern, None if spec == "none" else spec


def _say(report: QuantizeReport, target: Path) -> None:
    console = Console()
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    console.print(f"{target}: {size / 1e6:.1f} MB of weights", highlight=False, markup=False, soft_wrap=True)
