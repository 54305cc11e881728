"""The command line: its commands, one file each in commands/, and what bad input gets."""

import sys

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from sparsekern.commands import bench, demo, doctor, eval, inspect, prune
from sparsekern.hf import UnknownModelError

BAD_INPUT = 2


class _Commands(TyperGroup):
    """Bad input is one line on standard error and exit code 2; anything else is a bug and shows its traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, UnknownModelError, torch.linalg.LinAlgError) as error:
            Console(stderr=True, soft_wrap=True).print("error:", str(error), style="red", markup=False, highlight=False)
            sys.exit(BAD_INPUT)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Prune a model, pack it, swap its Linear layers for sparse ones, and measure what became faster.",
)

for module in (prune, eval, inspect, doctor, bench, demo):
    app.command(module.__name__.rpartition(".")[2], epilog=f"Example: {module.EXAMPLE}")(module.command)
