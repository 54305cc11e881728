"""accuracy: the layer error and the perplexity of every one-shot method at equal patterns, without retraining.

    python bench/accuracy.py layers       synthetic layers of 512 x 512, and all layers of the model that ships
    python bench/accuracy.py perplexity   that model, three calibration seeds, and what permutation and finishing add
    python bench/accuracy.py layers --tiny

A synthetic layer has W ~ N(0, .02^2) with row scales exp(.3 n) and a tail exp(.42 n) on each weight. Its inputs are a
low-rank mix (rank 64, the k-th factor weighted k^-1/2) at .45, noise at .3 and a mean at .1, on channels scaled by
exp(.15 n), 1 % of them 20 times louder; every n is a standard normal. 16384 tokens, the last eighth held out, three
seeds. The error is ||X (W - W')^T|| / ||X W^T||.

--output writes the JSON to a file as well, perplexities also as a PNG beside it; the last line of stdout is the same.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import sparsekern as sk
from sparsekern import demo, hf, text
from sparsekern.calibrate import Walk
from sparsekern.measure import machine, perplexity
from sparsekern.stats import Gram

METHODS = {
    "magnitude": sk.Magnitude(),
    "Wanda": sk.Wanda(),
    "SparseGPT, original": sk.SparseGPT(original=True),
    "SparseGPT": sk.SparseGPT(),
    "SparseGPT + PCG": sk.Refine(sk.SparseGPT()),
    "ADMM": sk.ADMM(),
}
PATTERNS = ("50%", "60%", "70%", "2:4", "4:8")
SEEDS = (0, 1, 2)
SEQLEN, WINDOWS = 512, 64


def synthetic(seed: int, size: int = 512, tokens: int = 16384) -> tuple[Tensor, Gram]:
    """A weight [size, size] and the statistics of its inputs, as this file's head has it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = 0.02 * normal(size, size) * (0.3 * normal(size, 1)).exp() * (0.42 * normal(size, size)).exp()
    rank = size // 8
    spectrum = torch.arange(1, rank + 1) ** -0.5
    x = 0.45 * (normal(tokens, rank) * spectrum) @ normal(rank, size) + 0.3 * normal(tokens, size) + 0.1 * normal(size)
    scale = (0.15 * normal(size)).exp()
    scale[torch.randperm(size, generator=generator)[: max(1, round(0.01 * size))]] *= 20
    stats = Gram(size)
    stats.add(x * scale)
    return weight, stats


def shipped_layers(windows: int) -> Iterator[tuple[Tensor, Gram]]:
    """Every layer of the shipped model with the statistics that it has in the dense model."""
    model = hf.load(demo.MODEL, dtype=torch.bfloat16)
    for _, layer, stats in Walk(model, _calibration(0, windows), Gram):
        yield hf.weight(layer).float(), stats


def layer_errors(layers: list[tuple[Tensor, Gram]], title: str) -> list[dict[str, Any]]:
    rows = []
    for name, method in track(METHODS.items(), title, console=Console(stderr=True)):
        for spec in PATTERNS:
            pattern, calibration, held_out = sk.as_pattern(spec), [], []
            for weight, stats in layers:
                pruned = method.prune(weight, stats, pattern)
                # the authors' threshold lets one weight more of a block go, and all that tie with it
                surplus = int((pruned == 0).sum()) - round(pattern.sparsity * weight.numel())
                most = -(-weight.shape[1] // 128) + weight.numel() // 10000 if "original" in name else 0
                assert 0 <= surplus <= most, (name, spec, surplus)
                calibration.append(stats.error(weight, pruned))
                held_out.append(stats.held_out_error(weight, pruned))
            rows.append(
                {
                    "layers": title,
                    "method": name,
                    "pattern": spec,
                    "error": statistics.mean(calibration),
                    "held_out_error": statistics.mean(held_out),
                }
            )
    return rows


def prune_and_measure(name: str, spec: str, seed: int, windows: int, held_out_windows: int | None) -> dict[str, Any]:
    """The perplexity of the shipped model, pruned as `name` says: a method, then what is added to it."""
    torch.set_num_threads(1)
    base, *extras = name.split(" + ")
    if base == "SparseGPT" and extras == ["PCG"]:
        base, extras = name, []
    model, batches, pattern = hf.load(demo.MODEL, dtype=torch.bfloat16), _calibration(seed, windows), spec
    if "permutation" in extras:
        sk.permute(model, spec, batches, seed=seed)
    if "allocation" in extras:
        pattern = sk.allocate(model, METHODS[base], spec, batches).patterns
    finish = sk.Finish() if "finishing" in extras else None
    report = sk.prune(model, METHODS[base], pattern, batches, finish=finish)
    wanted = sk.as_pattern(spec).sparsity
    assert abs(report.sparsity - wanted) < 1e-4 or "original" in name, f"{name} {spec}: sparsity {report.sparsity}"
    value = perplexity(model, _held_out(held_out_windows), SEQLEN).value
    return {"method": name, "pattern": spec, "seed": seed, "perplexity": value, "held_out_error": report.held_out_error}


def variants(pattern: str) -> tuple[str, ...]:
    """The methods, and ADMM with what can be added to it at this pattern: one by one, then all of it."""
    first = "ADMM + permutation" if ":" in pattern else "ADMM + allocation"
    return (*METHODS, first, "ADMM + finishing", f"{first} + finishing")


def perplexities(jobs: list[tuple[str, str, int]], windows: int, held_out_windows: int | None, workers: int) -> dict:
    """jobs: variant, pattern, seed."""
    dense = perplexity(hf.load(demo.MODEL, dtype=torch.bfloat16), _held_out(held_out_windows), SEQLEN)
    run = partial(prune_and_measure, windows=windows, held_out_windows=held_out_windows)
    # a process each: two small models on a core each finish sooner than one on two
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        started = [pool.submit(run, *job) for job in jobs]
        runs = [job.result() for job in track(started, "perplexity", console=Console(stderr=True))]
    rows = []
    for name, spec in dict.fromkeys((run["method"], run["pattern"]) for run in runs):
        values = [run["perplexity"] for run in runs if (run["method"], run["pattern"]) == (name, spec)]
        spread = statistics.stdev(values) if len(values) > 1 else None
        rows.append({"method": name, "pattern": spec, "perplexity": statistics.mean(values), "sd": spread})
    return {"dense": dense.to_json(), "rows": rows, "runs": runs}


def table(title: str, rows: list[dict[str, Any]], cell) -> Table:
    """A row a method, a column a pattern."""
    made = Table("method", title=title)
    for spec in PATTERNS:
        made.add_column(spec, justify="right")
    cells = {(row["method"], row["pattern"]): cell(row) for row in rows}
    for name in dict.fromkeys(row["method"] for row in rows):
        made.add_row(name, *(cells.get((name, spec), "") for spec in PATTERNS))
    return made


def plot(result: dict[str, Any], path: Path) -> None:
    """Perplexity against sparsity, a line a variant, and beside it the N:M patterns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    variants = dict.fromkeys(row["method"] for row in result["rows"])
    for number, name in enumerate(variants):
        # the last ones, with everything added, stand out
        style = {"color": f"C{number % 10}", "marker": "o^s"[number // 10], "linewidth": 1 + ("+ finishing" in name)}
        found = {row["pattern"]: row["perplexity"] for row in result["rows"] if row["method"] == name}
        for axes, specs in ((left, PATTERNS[:3]), (right, PATTERNS[3:])):
            points = [(spec, found[spec]) for spec in specs if spec in found]
            axes.plot(*zip(*points, strict=True), label=name, **style) if points else None
    for axes in (left, right):
        axes.axhline(result["dense"]["value"], color="0.4", linestyle=":", label="dense")
        axes.set(yscale="log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    left.set(ylabel="perplexity on held-out text", title="unstructured")
    right.set(title="N:M")
    handles = {
        text: line for axes in (left, right) for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)


def _calibration(seed: int, windows: int) -> list[Tensor]:
    tokens = text.tokenize(hf.tokenizer(demo.MODEL), text.read_text(demo.MODEL / "calibration.txt"))
    return text.windows(tokens, SEQLEN, windows, seed)


def _held_out(windows: int | None) -> Tensor:
    tokens = text.tokenize(hf.tokenizer(demo.MODEL), text.read_text(demo.MODEL / "heldout.txt"))
    return tokens[: None if windows is None else windows * SEQLEN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "perplexity"))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each, for perplexity")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    parser.add_argument("--tiny", action="store_true", help="small layers, few windows, one seed")
    arguments = parser.parse_args()
    hf.quiet()
    torch.manual_seed(0)
    windows, held_out_windows, seeds = (2, 2, SEEDS[:1]) if arguments.tiny else (WINDOWS, None, SEEDS)
    console = Console(width=120)
    if arguments.what == "layers":
        size = {"size": 64, "tokens": 1024} if arguments.tiny else {}
        sets = {
            "synthetic": [synthetic(seed, **size) for seed in seeds],
            "shipped model": list(shipped_layers(windows))[: 2 if arguments.tiny else None],
        }
        rows = [row for title, layers in sets.items() for row in layer_errors(layers, title)]
        for title in sets:
            mine = [row for row in rows if row["layers"] == title]
            heading = f"{title}: layer error, calibration (held-out)"
            console.print(table(heading, mine, lambda row: f"{row['error']:.4f} ({row['held_out_error']:.4f})"))
        result = {"rows": rows}
    else:
        jobs = [(name, spec, seed) for spec in PATTERNS for name in variants(spec) for seed in seeds]
        # the last variants are those that the others are parts of
        jobs = [(variants(spec)[-1], spec, 0) for spec in ("50%", "2:4")] if arguments.tiny else jobs
        result = perplexities(jobs, windows, held_out_windows, arguments.workers)
        heading = f"perplexity, dense {result['dense']['value']:.3f}; mean and sd of {len(seeds)} calibration seeds"
        console.print(table(heading, result["rows"], lambda row: f"{row['perplexity']:.3f} ± {row['sd'] or 0:.3f}"))
    written = json.dumps({"machine": machine(), "what": arguments.what, **result})
    if arguments.output:
        arguments.output.write_text(written + "\n")
        if arguments.what == "perplexity":
            plot(result, arguments.output.with_suffix(".png"))
    print(written)


if __name__ == "__main__":
    main()
