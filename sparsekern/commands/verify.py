"""sparsekern verify: is everything true that a compressed checkpoint says?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sparsekern.checkpoint import verify
from sparsekern.commands.arguments import AsJson
from sparsekern.commands.output import print_result

EXAMPLE = "`sparsekern verify OUT`"


def command(
    directory: Annotated[Path, typer.Argument(help="directory of a compressed checkpoint")],
    hashes: Annotated[bool, typer.Option(help="read every file and compare it with SHA256SUMS")] = True,
    as_json: AsJson = False,
):
    """Check the hashes, headers, shapes, offsets and positions of a compressed checkpoint before anything runs it."""
    report = verify(directory, hashes)

    def tables(_):
        table = Table("packed layers", "format", "pattern", "dtype")
        kinds: dict[tuple[str, str, str], list[str]] = {}
        for name, layer in report.layers.items():
            kinds.setdefault((layer["format"], layer["pattern"], layer["dtype"]), []).append(name)
        for kind, names in kinds.items():
            table.add_row(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}", *kind)
        return [table, str(report)] if report.layers else [str(report)]

    print_result(report.to_json(), as_json, tables)
