"""`fxquant kernels`: list, inspect and compile, for GPUs that need not be here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fxquant.cli.asking import OneProblem, Shapes, Target, arch_to_compile, kernel_named, problems_asked
from fxquant.errors import InvalidOption, NothingToCompile, PackageMissing

kernels = typer.Typer(help="The Triton kernels: list, inspect, compile.", no_args_is_help=True)


@kernels.callback()
def need_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise PackageMissing("triton", "`fxquant kernels`")


@kernels.command("list")
def list_kernels() -> None:
    """Every kernel: its operation, the fields of its configurations, what it is for."""
    from fxquant.triton_kernels import KERNELS

    table = Table("kernel", "operation", "configuration", "what for")
    for kernel in KERNELS.values():
        table.add_row(kernel.name, kernel.op, " ".join(kernel.fields), kernel.summary)
    Console().print(table)


@kernels.command()
def inspect(
    kernel: Annotated[str, typer.Argument(help="A name that `fxquant kernels list` shows.")],
    target: Target,
    shapes: Shapes = None,
    problem: OneProblem = None,
    every: Annotated[bool, typer.Option("--all", help="Every candidate, not only the heuristic's choice.")] = False,
) -> None:
    """What a kernel compiles to: registers, spills, shared memory, occupancy, its hot loop, and its modelled time.

    Without --shapes or --problem: for a few problems of its kind, 4096 by 4096.
    """
    from fxquant.cli.inspecting import inspected, tables
    from fxquant.tuning.representative import representative_of

    arch, found = arch_to_compile(target), kernel_named(kernel)
    asked = problems_asked(shapes, problem) or representative_of(kernel, arch)[:4]
    console = Console()
    with console.status("compiling"):
        rows = [row for one in asked for row in inspected(found, one, arch, every)]
    if not rows:
        raise NothingToCompile(arch.name, f"{kernel} takes no problem of its kind there")
    for table in tables(rows, arch):
        console.print(table)


@kernels.command("compile")
def compile_kernels(
    target: Target,
    out: Annotated[Path, typer.Option("--out", help="Folder for the machine code; made if it is not there.")],
    shapes: Shapes = None,
    problem: OneProblem = None,
    epilogue: Annotated[
        list[str] | None,
        typer.Option("--epilogue", help="What follows linears: bias+gelu+residual, or ''. Again for each."),
    ] = None,
    at: Annotated[
        Path | None, typer.Option("--at", help="Where the folder will lie on the server, if not where it is made.")
    ] = None,
) -> None:
    """Compile ahead of time what the plans of the problems launch, with a manifest.

    The folder is a cache of Triton: a server that starts with TRITON_CACHE_DIR set to it loads instead of compiling.
    Without --shapes or --problem: for the linears of the table that is shipped for the target and what quantizes their
    activations: about a thousand kernels. Without --epilogue: linears with a bias and without.
    """
    from fxquant.tuning.ahead import EPILOGUES, MANIFEST, compile_ahead, with_quantizations
    from fxquant.tuning.plans.tables import read_table

    arch = arch_to_compile(target)
    asked = problems_asked(shapes, problem) or with_quantizations(read_table(arch.name))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidOption("--out", str(out), f"no folder can be made there ({error})") from error
    console = Console()
    made = 0
    with console.status(f"compiling for {arch}") as status:
        for entry in compile_ahead(asked, arch, out, at, epilogues=epilogue or EPILOGUES):
            made += 1
            status.update(f"{made} compiled for {arch}, last {entry['kernel']}: {entry['function']}")
    if not made:
        raise NothingToCompile(arch.name, "no kernel takes any of the problems, or there are none")
    console.print(f"{made} compiled for {arch} in {out}; {MANIFEST} lists them.")
    console.print(f"Start the server with TRITON_CACHE_DIR={at or out.resolve()}", soft_wrap=True)
