"""demo: the whole way on the model that ships with the package, then the speed of layers of a real size.

1  prune it by each method and pattern, and measure the perplexity on text it never saw
2  pack the layers of one of them, and show that it still says the same
3  time the linear layers of a real-size model, because a model of a few megabytes lives in the cache
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from sparsekern import hf, shapes, text
from sparsekern.measure import Perplexity, perplexity
from sparsekern.methods import METHODS
from sparsekern.oneshot import prune
from sparsekern.plan import Unmeasured
from sparsekern.speed import Speed, draw_speed, measure_speed
from sparsekern.swap import sparsify

MODEL = Path(__file__).parent / "demo_model"
PATTERNS = (0.5, 0.6, "2:4")
SHOWN = ("magnitude", "wanda", "sparsegpt", "admm")
SWAPPED = ("admm", 0.5)
SEQLEN = 512
PROMPT_TOKENS = 16
CALIBRATION_WINDOWS = 64
REAL_MODEL, REAL_SPARSITY, REAL_TOKENS = "llama-3.2-1b", 0.5, (1, 4, 16)


@dataclass(frozen=True)
class Pruned:
    """The perplexity of one pruned model; method None: the dense one. `error`: mean held-out error of its layers."""

    method: str | None
    pattern: str
    sparsity: float
    perplexity: Perplexity
    error: float | None


@dataclass(frozen=True)
class Swapped:
    """One pruned model before and after its layers were packed.

    positions   of the held-out text, in prompts of a few tokens, because those the sparse kernels serve
    same_token  share of the positions at which both would say the same next token
    difference  the largest change of a logit, and `logit_range` what to compare it with
    """

    method: str
    pattern: str
    kernels: dict[str, int]
    dense_bytes: int
    packed_bytes: int
    before: Perplexity
    after: Perplexity
    positions: int
    same_token: float
    difference: float
    logit_range: float


@dataclass(frozen=True)
class Demo:
    """What the demo found."""

    pruned: list[Pruned]
    swapped: Swapped
    speed: Speed
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What json.dumps takes."""
        return {
            "pruned": [asdict(row) for row in self.pruned],
            "swapped": asdict(self.swapped),
            "speed": self.speed.to_json(),
            "seconds": self.seconds,
        }

    def tables(self) -> Iterator[Table | str]:
        """What rich prints."""
        worth = self.pruned[0].perplexity
        table = Table("method", title=f"perplexity on held-out text, {worth.windows} windows of {worth.seqlen} tokens")
        for pattern in dict.fromkeys(row.pattern for row in self.pruned[1:]):
            table.add_column(pattern, justify="right")
        table.add_row("dense", *[f"{worth.value:.2f}"] * (len(table.columns) - 1))
        for method in SHOWN:
            rows = [row for row in self.pruned if row.method == method]
            table.add_row(method, *(f"{row.perplexity.value:.2f}" for row in rows))
        yield table
        swap = self.swapped
        kernels = ", ".join(f"{count} by kernel {name}" for name, count in swap.kernels.items())
        yield (
            f"swapped: {swap.method} {swap.pattern}, {kernels}: {swap.dense_bytes / 1e6:.2f} -> "
            f"{swap.packed_bytes / 1e6:.2f} MB; perplexity {swap.before.value:.3f} -> {swap.after.value:.3f}; "
            f"the same next token at {swap.same_token:.1%} of {swap.positions} positions; no logit moves by more than "
            f"{swap.difference:.2g} in a range of {swap.logit_range:.0f}\n"
        )
        yield self.speed.table()
        yield f"{self.seconds:.0f} s in all"


def run(
    progress: Callable[[str, int, int], None] = lambda *_: None,
    speed_seconds: float = 100.0,
    windows: int | None = None,
) -> Demo:
    """The whole demo.

    progress       called with what is being done, how much of it is done, and how much there is
    speed_seconds  for part 3
    windows        held-out windows to measure perplexity on; None: all
    """
    started = time.perf_counter()
    dense, tokenizer = hf.load(MODEL, dtype=torch.bfloat16), hf.tokenizer(MODEL)
    heldout = text.tokenize(tokenizer, text.read_text(MODEL / "heldout.txt"))
    heldout = heldout[: None if windows is None else windows * SEQLEN]
    calibration = text.tokenize(tokenizer, text.read_text(MODEL / "calibration.txt"))
    batches = text.windows(calibration, SEQLEN, CALIBRATION_WINDOWS)

    steps = len(SHOWN) * len(PATTERNS) + 1
    pruned = [Pruned(None, "dense", 0.0, perplexity(dense, heldout, SEQLEN), None)]
    for name in SHOWN:
        for pattern in PATTERNS:
            progress(f"prune: {name} {pattern}", len(pruned), steps)
            model = copy.deepcopy(dense)
            report = prune(model, METHODS[name](), pattern, batches)
            worth = perplexity(model, heldout, SEQLEN)
            pruned.append(Pruned(name, report.pattern, report.sparsity, worth, report.held_out_error))
            if (name, pattern) == SWAPPED:
                chosen = model
    progress("swap", steps, steps)
    swapped = _swap(chosen, heldout, next(row for row in pruned if (row.method, row.sparsity) == SWAPPED))
    shape = shapes.find(REAL_MODEL)
    speed = measure_speed(
        shape,
        REAL_SPARSITY,
        REAL_TOKENS,
        seconds=speed_seconds,
        progress=lambda done, all: progress(f"time: layers of {REAL_MODEL}", done, all),
    )
    return Demo(pruned, swapped, speed, time.perf_counter() - started)


def plot(demo: Demo, path: Path) -> None:
    """Perplexity against sparsity, and speed-up against tokens, side by side in the PNG file `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_perplexity(demo.pruned, left)
    draw_speed(demo.speed, right)
    figure.savefig(path, dpi=150)


def _draw_perplexity(pruned: list[Pruned], axes) -> None:
    dense, *rest = pruned
    for number, method in enumerate(SHOWN):
        colour = f"C{number}"
        rows = [row for row in rest if row.method == method]
        line = [dense, *(row for row in rows if ":" not in row.pattern)]
        axes.plot([r.sparsity for r in line], [r.perplexity.value for r in line], "o-", color=colour, label=method)
        groups = [row for row in rows if ":" in row.pattern]
        values = [r.perplexity.value for r in groups]
        axes.plot([r.sparsity for r in groups], values, "^", color=colour, label=f"{method} {groups[0].pattern}")
    axes.set(yscale="log", xlabel="sparsity of the linear layers", ylabel="perplexity on held-out text")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.set_title("the model that ships, one-shot")
    axes.legend(fontsize="small")


def _swap(model: nn.Module, heldout: Tensor, row: Pruned) -> Swapped:
    prompts = heldout[: 2 * SEQLEN].view(-1, 1, PROMPT_TOKENS)
    before = _logits(model, prompts)
    report = sparsify(model, plan=Unmeasured())
    after = _logits(model, prompts)
    kernels: dict[str, int] = {}
    for layer in report.swapped:
        kernels[layer["kernel"]] = kernels.get(layer["kernel"], 0) + 1
    return Swapped(
        method=row.method,
        pattern=row.pattern,
        kernels=kernels,
        dense_bytes=report.dense_bytes,
        packed_bytes=report.packed_bytes,
        before=row.perplexity,
        after=perplexity(model, heldout, SEQLEN),
        positions=prompts.numel(),
        same_token=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        difference=float((before - after).abs().max()),
        logit_range=float(before.max() - before.min()),
    )


@torch.no_grad()
def _logits(model: nn.Module, prompts: Tensor) -> Tensor:
    return torch.cat([model(prompt, use_cache=False).logits.float() for prompt in prompts])
