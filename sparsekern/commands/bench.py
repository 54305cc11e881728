"""sparsekern bench: sparse against dense, a checkpoint or random weights in real shapes."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from sparsekern import shapes
from sparsekern.commands.arguments import AsJson, Dtype, dtype_of, load
from sparsekern.commands.output import print_result, progress_bar
from sparsekern.endtoend import compare_end_to_end
from sparsekern.speed import measure_speed
from sparsekern.speed import plot as plot_speed

EXAMPLE = "`sparsekern bench OUT` or `sparsekern bench --config llama-3.2-1b --sparsity 0.5`"


def command(
    model: Annotated[
        str | None, typer.Argument(help="directory of a pruned checkpoint, or its name on the hub")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help=f"random weights in real shapes: {' | '.join(shapes.MODELS)}")
    ] = None,
    sparsity: Annotated[float, typer.Option(help="of the random weights, with --config")] = 0.5,
    tokens: Annotated[str, typer.Option(help="numbers of tokens to time, comma separated")] = "1,4,16",
    dtype: Dtype = "bfloat16",
    seconds: Annotated[float, typer.Option(help="to spend on the timings")] = 100.0,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw the speed-up into, with --config")] = None,
    as_json: AsJson = False,
):
    """Time a pruned MODEL sparse against dense, or the linear layers of a real-size model with random weights."""
    if (model is None) == (config is None):
        raise ValueError("bench takes either MODEL or --config, and exactly one of them")
    try:
        counts = tuple(int(count) for count in tokens.split(","))
    except ValueError:
        raise ValueError(f"tokens must be numbers like 1,4,16, got {tokens!r}") from None
    if plot is not None and config is None:
        raise ValueError("--plot goes with --config")
    if config is None:
        pruned = load(model, dtype)
        with progress_bar(f"{model}: timing") as update:
            compared = compare_end_to_end(pruned, counts, seconds, progress=update)
        print_result(compared.to_json(), as_json, lambda _: [str(compared)])
        return
    shape, kind = shapes.find(config), dtype_of(dtype) or torch.bfloat16
    with progress_bar(f"{config}: timing") as update:
        speed = measure_speed(shape, sparsity, counts, dtype=kind, seconds=seconds, progress=update)
    if plot is not None:
        plot_speed(speed, plot)
    print_result(speed.to_json(), as_json, lambda _: [speed.table()])
