"""sparsekern inspect: what the matrices of a checkpoint hold."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sparsekern.commands.arguments import AsJson
from sparsekern.commands.output import print_result
from sparsekern.inspect import inspect as inspect_checkpoint

EXAMPLE = "`sparsekern inspect OUT`"


def command(
    directory: Annotated[Path, typer.Argument(help="directory of a checkpoint")],
    as_json: AsJson = False,
):
    """Sparsity, pattern and packed size of every matrix of a checkpoint."""
    reports = inspect_checkpoint(directory)

    def tables(_):
        table = Table("matrix", "shape", "dtype", "stored", "sparsity", "pattern", "MB", "packed MB")
        for r in reports:
            shape = " x ".join(map(str, r.shape)) + (" (in x out)" if r.transposed else "")
            sizes = f"{r.bytes / 1e6:.2f}", f"{r.packed_bytes / 1e6:.2f}"
            table.add_row(r.name, shape, r.dtype, r.format, f"{r.sparsity:.2%}", r.pattern, *sizes)
        total, packed = sum(r.bytes for r in reports), sum(r.packed_bytes for r in reports)
        return [table, f"{len(reports)} matrices, {total / 1e6:.2f} MB; packed {packed / 1e6:.2f} MB"]

    print_result([report.to_json() for report in reports], as_json, tables)
