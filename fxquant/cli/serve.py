"""`fxquant serve`: transformers' server, with a quantized and compiled model."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from fxquant.cli.quantize import rule_of
from fxquant.errors import PackageMissing


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder of transformers, float or quantized.")],
    preset: Annotated[str | None, typer.Option(help="For a float model: int8dq (the default), int4wo, ...")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="absmax, minmax, mse or hqq.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A glob of modules that stay float; again, too.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="GLOB=PRESET, such as '*lm_head=int8dq'; again, too.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: what it computes in.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    max_cache_len: Annotated[
        int,
        typer.Option(min=16, help="Tokens of prompt and answer in the cache; longer ones are compiled anew."),
    ] = 2048,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile decoding, before serving.")] = True,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen.")] = 8000,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the code that comes with a model.")] = False,
) -> None:
    """Serve a model by OpenAI's protocol: chat, completions and responses, streamed or not."""
    console = Console(stderr=True)
    try:
        from fxquant.integrations import transformers_serving as serving
    except ImportError as error:
        raise PackageMissing("transformers[serving]", "fxquant serve") from error
    fields: dict[str, Any] = {"group_size": group_size, "algorithm": algorithm, "exclude": exclude}
    fields["rules"] = [rule_of(text) for text in rule or []] or None
    where: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded = serving.load_served(model, preset, **where, **fields)
    server, processor = serving.make_server(model, loaded, host=host, port=port)
    if report := getattr(loaded.hf_quantizer, "report", None):
        console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    if compiled:
        console.print("compiling ...", highlight=False)
        serving.prepare_generation(loaded, processor, max_cache_len)
    console.print(f"serving {model} on http://{host}:{port}/v1", highlight=False, markup=False, soft_wrap=True)
    server.server.run()
