"""sparsekern lottery: winning tickets and their controls, on data that needs no network."""

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from sparsekern import hf
from sparsekern.commands.arguments import AsJson
from sparsekern.commands.output import print_result, progress_bar
from sparsekern.measure import machine
from sparsekern.tickets import TASKS
from sparsekern.tickets.experiment import run
from sparsekern.tickets.figure import plot
from sparsekern.tickets.product import SECONDS, make, table
from sparsekern.tickets.summary import summaries

EXAMPLE = "`sparsekern lottery --task digits --out tickets`"


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="directory to write; the same command goes on there")],
    task: Annotated[str, typer.Option(help=" | ".join(TASKS))] = "digits",
    seeds: Annotated[int, typer.Option(help="0, 1, ...: first weights and batches")] = 5,
    processes: Annotated[int | None, typer.Option(help="of one thread each; one a core when not given")] = None,
    steps: Annotated[int | None, typer.Option(help="of one training; fewer for a quick look")] = None,
    rounds: Annotated[int | None, typer.Option(help="of pruning; fewer for a quick look")] = None,
    seconds: Annotated[float, typer.Option(help="at most, to spend on each timing of the packed ticket")] = SECONDS,
    as_json: AsJson = False,
):
    """Search tickets over several seeds, with the controls that say whether they win, and pack one.

    Writes lottery-TASK.json and lottery-TASK.png, and the networks of the first seed as checkpoints: trained dense, and
    the ticket at 90 % sparsity packed.
    """
    for name, value in (("steps", steps), ("rounds", rounds), ("seconds", seconds)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    hf.quiet()
    began = time.perf_counter()
    with progress_bar(f"lottery: {task}") as update:
        cells = run(task, out, seeds, processes or torch.get_num_threads(), steps, rounds, update)
    problems = TASKS[task](steps, rounds)
    found = summaries(problems, cells)
    products = []
    with progress_bar("from ticket to product") as update:
        for done, problem in enumerate(problems):
            update(done, len(problems), f"{problem.name}: from ticket to product")
            products += make(problem, out, seconds=seconds)
    result = {
        "task": task,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": machine(),
        "networks": {name: summary.to_json() for name, summary in found.items()},
        "products": [product.to_json() for product in products],
    }
    (out / f"lottery-{task}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(found, out / f"lottery-{task}.png")

    def tables(_):
        for summary in found.values():
            yield summary.table()
            yield from (f"{summary.problem.name}: {line}" for line in summary.findings())
        yield table(products)
        yield from (line for product in products for line in product.lines())
        yield f"{result['seconds']:.0f} s; wrote {out}/lottery-{task}.json and {out}/lottery-{task}.png"

    print_result(result, as_json, tables)
