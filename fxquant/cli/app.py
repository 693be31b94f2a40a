"""The application: its groups of commands, and how it fails."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from fxquant.cli.kernels import kernels
from fxquant.cli.quantize import quantize
from fxquant.cli.serve import serve
from fxquant.cli.tune import tune
from fxquant.errors import FxQuantError

BAD_INPUT = 2  # the exit code of a bad command line too


class NamedErrors(TyperGroup):
    """fxquant's errors say what to do: their words go to stderr without a traceback, the exit code is 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FxQuantError as error:
            words = escape(f"{type(error).__name__}: {error}")
            Console(stderr=True).print(f"[red]error[/]: {words}", highlight=False, soft_wrap=True)
            raise typer.Exit(BAD_INPUT) from None


app = typer.Typer(
    name="fxquant",
    help="Quantize models and serve them; see which kernels there are, what they compile to, and tune them.",
    cls=NamedErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(kernels, name="kernels")
app.command()(tune)
app.command()(quantize)
app.command()(serve)


def main() -> None:
    """The `fxquant` script."""
    app()
