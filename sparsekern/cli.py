"""The command line: its commands, one file each in commands/, and what bad input gets."""

import signal
import sys

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from sparsekern.commands import bench, convert, demo, doctor, eval, inspect, lottery, prune, verify
from sparsekern.hf import UnknownModelError
from sparsekern.publish import LockedError

BAD_INPUT = 2
INTERRUPTED = 128 + signal.SIGINT


class _Commands(TyperGroup):
    """Bad input is one line on standard error and exit code 2, an interrupt one and 130; anything else is a bug and
    shows its traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, UnknownModelError, LockedError, torch.linalg.LinAlgError) as error:
            _complain(f"error: {error}")
            sys.exit(BAD_INPUT)
        except KeyboardInterrupt as error:
            # a run that can go on says so itself
            _complain(str(error) or "interrupted: a directory is written whole or not at all")
            sys.exit(INTERRUPTED)


def _complain(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(line, style="red", markup=False, highlight=False)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Prune a model, pack it, swap its Linear layers for sparse ones, and measure what became faster.",
    epilog="Begin with: sparsekern demo. Exit codes: 0 done, 2 bad input (one line says what), 130 interrupted, "
    "1 a bug.",
)

for module in (prune, eval, inspect, verify, convert, doctor, bench, lottery, demo):
    app.command(module.__name__.rpartition(".")[2], epilog=f"Example: {module.EXAMPLE}")(module.command)
