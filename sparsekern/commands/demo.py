"""sparsekern demo: prune, swap and time what ships with the package."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsekern import demo, hf
from sparsekern.commands.arguments import AsJson
from sparsekern.commands.output import print_result, progress_bar

EXAMPLE = "`sparsekern demo`"


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="directory for demo.json and demo.png")] = Path("demo"),
    speed_seconds: Annotated[float, typer.Option(help="to spend on timing the layers of a real-size model")] = 100.0,
    windows: Annotated[int | None, typer.Option(help="held-out windows for the perplexity; all when not given")] = None,
    as_json: AsJson = False,
):
    """Prune the model that ships with the package, swap it, and time layers of a real size; no network needed."""
    if speed_seconds <= 0 or (windows is not None and windows < 1):
        raise ValueError(f"speed-seconds and windows must be positive, got {speed_seconds} and {windows}")
    hf.quiet()
    with progress_bar("load") as update:
        result = demo.run(lambda what, done, all: update(done, all, what), speed_seconds, windows)
    output.mkdir(parents=True, exist_ok=True)
    (output / "demo.json").write_text(json.dumps(result.to_json(), indent=1))
    demo.plot(result, output / "demo.png")
    print_result(
        result.to_json(), as_json, lambda _: [*result.tables(), f"wrote {output}/demo.json and {output}/demo.png"]
    )
