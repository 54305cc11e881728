"""sparsekern convert: a checkpoint packed, repacked or unpacked."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sparsekern import hf
from sparsekern.checkpoint import convert
from sparsekern.commands.arguments import AsJson
from sparsekern.commands.output import print_result
from sparsekern.shards import SHARD_BYTES

EXAMPLE = "`sparsekern convert OUT PACKED --to bitmap`"


def command(
    source: Annotated[Path, typer.Argument(help="dense, compressed, or sparse compressed-tensors checkpoint")],
    output: Annotated[Path, typer.Argument(help="directory to write; must not exist")],
    to: Annotated[str, typer.Option(help="dense, which plain transformers loads; 2:4 or bitmap; bitmap_int8, rounded")],
    layer: Annotated[
        list[str] | None, typer.Option(help="an nn.Linear, where config.json names no model; may be repeated")
    ] = None,
    hashes: Annotated[bool, typer.Option(help="first compare SOURCE with its SHA256SUMS")] = True,
    shard_bytes: Annotated[int, typer.Option(help="the most that a file of weights takes")] = SHARD_BYTES,
    as_json: AsJson = False,
):
    """Write the checkpoint SOURCE to OUTPUT with its linear layers packed or dense: the same bits, tensor by tensor.

    Only bitmap_int8 rounds: the kept weights of each row to 8 bits, unless they lie on such a grid.
    """
    hf.quiet()
    report = convert(source, output, to, layers=layer, hashes=hashes, shard_bytes=shard_bytes)

    def tables(_):
        parts: list = []
        reasons: dict[str, list[str]] = {}
        for name, reason in report.left:
            reasons.setdefault(reason, []).append(name)
        if reasons:
            table = Table("left as they were", "reason")
            for reason, names in reasons.items():
                table.add_row(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}", reason)
            parts.append(table)
        return [*parts, f"{output}: {report}"]

    print_result(report.to_json(), as_json, tables)
