"""sparsekern bench: sparse against dense, a checkpoint or random weights in real shapes."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from sparsekern import shapes
from sparsekern.commands.arguments import AsJson, Dtype, dtype_of, load
from sparsekern.commands.output import print_result, progress_bar
from sparsekern.endtoend import compare_end_to_end
from sparsekern.generation import HEADS, VALUES, measure_generation
from sparsekern.generation import plot as plot_generation
from sparsekern.hf_generate import CACHES
from sparsekern.ops.compiled import instruction_set, using
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
    layers: Annotated[
        bool, typer.Option("--layers", help="with --config: time its linear layers one by one, not generate")
    ] = False,
    sparsity: Annotated[str, typer.Option(help="of the random weights; several for generate")] = "0.5",
    values: Annotated[str, typer.Option(help=f"for generate, comma separated: {', '.join(VALUES)}")] = "bfloat16,int8",
    tokens: Annotated[str, typer.Option(help="numbers of tokens to time a MODEL or --layers at")] = "1,4,16",
    prompt: Annotated[int, typer.Option(help="tokens of the prompt of generate")] = 32,
    new_tokens: Annotated[int, typer.Option(help="that a generate makes")] = 16,
    blocks: Annotated[int | None, typer.Option(help="for generate: so many decoder blocks, not all")] = None,
    head: Annotated[
        str, typer.Option(help=f"for generate: the output embedding as {', '.join(HEADS)} (own: in the kind of values)")
    ] = "own",
    cache: Annotated[str, typer.Option(help=f"of generate: {' or '.join(CACHES)}")] = "dynamic",
    compiled: Annotated[bool, typer.Option("--compile", help="generate through torch.compile; minutes more")] = False,
    dtype: Dtype = "bfloat16",
    seconds: Annotated[float, typer.Option(help="to spend on the timings")] = 100.0,
    isa: Annotated[
        str | None, typer.Option(help="no better instruction set than this one, of those that doctor shows")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw the result into, with --config")] = None,
    as_json: AsJson = False,
):
    """Time a pruned MODEL sparse against dense; with --config generate, or layers, of a random model of real size."""
    if (model is None) == (config is None):
        raise ValueError("bench takes either MODEL or --config, and exactly one of them")
    if plot is not None and config is None:
        raise ValueError("--plot goes with --config")
    if layers and config is None:
        raise ValueError("--layers goes with --config")
    if config is None:
        pruned = load(model, dtype)
        with using(isa), progress_bar(f"{model}: timing") as update:
            used = {"instruction_set": instruction_set()}
            compared = compare_end_to_end(pruned, _numbers("tokens", tokens, int), seconds, progress=update)
        print_result({**compared.to_json(), **used}, as_json, lambda _: [str(compared)])
        return
    shape, sparsities = shapes.find(config), _numbers("sparsity", sparsity, float)
    if layers:
        _layers(shape, sparsities, _numbers("tokens", tokens, int), dtype, seconds, isa, plot, as_json)
        return
    if dtype != "bfloat16":
        raise ValueError(f"generate is timed in bfloat16, got --dtype {dtype}; --layers takes others")
    with using(isa), progress_bar(f"{config}: building") as update:
        used = {"instruction_set": instruction_set()}
        found = measure_generation(
            shape,
            sparsities,
            values=[name.strip() for name in values.split(",")],
            head=head,
            prompt=prompt,
            new_tokens=new_tokens,
            blocks=blocks,
            cache=cache,
            compiled=compiled,
            seconds=seconds,
            progress=update,
        )
    if plot is not None:
        plot_generation(found, plot)
    print_result({**found.to_json(), **used}, as_json, lambda _: [found.table()])


def _layers(shape, sparsities, tokens, dtype, seconds, isa, plot, as_json) -> None:
    if len(sparsities) != 1:
        raise ValueError(f"--layers takes one sparsity, got {', '.join(map(str, sparsities))}")
    with using(isa), progress_bar(f"{shape.name}: timing") as update:
        used = {"instruction_set": instruction_set()}
        speed = measure_speed(
            shape,
            sparsities[0],
            tokens,
            dtype=dtype_of(dtype) or torch.bfloat16,
            seconds=seconds,
            progress=update,
        )
    if plot is not None:
        plot_speed(speed, plot)
    print_result({**speed.to_json(), **used}, as_json, lambda _: [speed.table()])


def _numbers(name: str, text: str, kind: type) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        example = "1,4,16" if kind is int else "0.5,0.7"
        raise ValueError(f"{name} must be numbers like {example}, got {text!r}") from None
