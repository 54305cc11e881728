"""What several commands put out: tables or JSON, a progress bar, a perplexity with one."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress

from sparsekern.measure import Perplexity
from sparsekern.measure import perplexity as measure_perplexity

WIDTH = 120


def print_result(result: Any, as_json: bool, tables: Callable[[Any], list[Any]]) -> None:
    """JSON alone, or what `tables` makes of the result."""
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    # a pipe or a file has no width of its own, and the tables need more than the 80 columns that rich assumes
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for part in tables(result):
        console.print(part, highlight=False, markup=False)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error: yields what to call with the number done, the number of all, and what.

    Where standard error is a file or a pipe there is none: it would leave empty lines there.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, all, what=None: bar.update(task, completed=done, total=all, description=what)


def measured_perplexity(model, tokens, seqlen: int, description: str) -> Perplexity:
    with progress_bar(description) as update:
        return measure_perplexity(model, tokens, seqlen, update)
