"""product: a ticket packed, saved, loaded and timed: what it scores, weighs and takes beside the dense network.

Of a layer [out_features, in_features] of which a share d is kept, in a dtype of s bytes, a weight takes

    s d         its value, if kept
    1/8         its bit in the bitmap
    8 / in      its share of the row offsets, 8 bytes a row

bytes instead of s. The last two do not shrink with the dtype, and the last is large where inputs are few.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsekern.checkpoint import load, save
from sparsekern.formats import Bitmap
from sparsekern.linear import SparseLinear
from sparsekern.measure import evaluating
from sparsekern.plan import Unmeasured
from sparsekern.swap import sparsify
from sparsekern.tickets.experiment import ticket_file
from sparsekern.tickets.problem import Problem
from sparsekern.timing import Latency, Ratio, alternate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
THREADS = (1, 2)
ROUNDS, SECONDS = 400, 5.0


# a ticket may hold 2:4 by chance, being far sparser, and would take half of its dense bytes then
AS_BITMAP = Unmeasured(Bitmap)


@dataclass(frozen=True)
class LayerBytes:
    """What a packed layer takes, part by part, and what it took."""

    name: str
    shape: tuple[int, int]
    kept: int
    dense: int
    values: int
    bitmap: int
    row_offsets: int

    @property
    def packed(self) -> int:
        return self.values + self.bitmap + self.row_offsets


@dataclass(frozen=True)
class Product:
    """One ticket in one dtype.

    scores      of the trained network on the test set: the dense one, the ticket with its zeros, and the ticket packed
                in memory and loaded from the disk
    difference  the largest change of an output by packing, and `range` of the outputs
    left        layers that stay as they were, with the reason
    disk        bytes of the directories that `sparsekern.save` writes: dense, ticket
    latency     of one input, by number of threads
    """

    network: str
    seed: int
    round: int
    remaining: float
    dtype: str
    score: str
    scores: dict[str, float]
    difference: float
    range: float
    layers: list[LayerBytes]
    left: list[tuple[str, str]]
    disk: dict[str, int]
    latency: dict[int, dict[str, Any]]

    @property
    def smaller(self) -> float:
        """How many times, on the disk, everything counted."""
        return self.disk["dense"] / self.disk["ticket"]

    def to_json(self) -> dict[str, Any]:
        """What json.dumps takes."""
        layers = [{**asdict(layer), "packed": layer.packed} for layer in self.layers]
        latency = {
            str(threads): {name: value.to_json() for name, value in timed.items()}
            for threads, timed in self.latency.items()
        }
        return {**asdict(self), "layers": layers, "latency": latency, "smaller": self.smaller}

    def lines(self) -> Iterator[str]:
        """What it says, in words."""
        dense, packed = (sum(getattr(layer, name) for layer in self.layers) for name in ("dense", "packed"))
        bits, offsets = (sum(getattr(layer, name) for layer in self.layers) for name in ("bitmap", "row_offsets"))
        scores = ", ".join(f"{name} {value:.4f}" for name, value in self.scores.items())
        yield (
            f"{self.network}, {self.dtype}, {self.remaining:.1%} of the weights: {self.score} {scores}; no output "
            f"moves by more than {self.difference:.1e} in a range of {self.range:.3g}"
        )
        yield (
            f"  on the disk {self.disk['dense']:,} -> {self.disk['ticket']:,} bytes ({self.smaller:.2f}x smaller); "
            f"packed layers {dense:,} -> {packed:,} ({dense / packed:.2f}x), of which bitmaps {bits:,} and row offsets "
            f"{offsets:,}"
        )
        for threads, timed in self.latency.items():
            plural = "s" if threads > 1 else ""
            yield (
                f"  one input, {threads} thread{plural}: dense {timed['dense']}, packed {timed['packed']}, speed-up "
                f"{timed['speedup']}"
            )


def make(problem: Problem, directory: Path, seed: int = 0, seconds: float = SECONDS) -> list[Product]:
    """The ticket of the product's round in every dtype, from the weights that an experiment left in `directory`.

    seconds  at most, for each timing

    Writes NAME-ticket-DTYPE and NAME-dense-DTYPE there, unless they are there already.
    """
    return [_make(problem, directory, seed, name, seconds) for name in DTYPES]


def table(products: list[Product]) -> Table:
    """The arithmetic of each packed layer."""
    out = Table("layer", title="bytes of the packed layers")
    for name in ("shape", "dtype", "kept", "dense", "values", "bitmap", "row offsets", "packed", "smaller"):
        out.add_column(name, justify="right")
    for product in products:
        for layer in product.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            share = f"{layer.kept / (layer.shape[0] * layer.shape[1]):.1%}"
            sizes = (layer.dense, layer.values, layer.bitmap, layer.row_offsets, layer.packed)
            counted = (f"{size:,}" for size in sizes)
            out.add_row(layer.name, shape, product.dtype, share, *counted, f"{layer.dense / layer.packed:.2f}x")
    return out


def _make(problem: Problem, directory: Path, seed: int, dtype: str, seconds: float) -> Product:
    models = {
        name: _trained(problem, directory, seed, round, DTYPES[dtype])
        for name, round in (("dense", 0), ("ticket", problem.product_round))
    }
    models["packed"] = copy.deepcopy(models["ticket"])
    report = sparsify(models["packed"], plan=AS_BITMAP)
    places = {name: directory / f"{problem.name}-{name}-{dtype}" for name in ("dense", "ticket")}
    for place, model in zip(places.values(), (models["dense"], models["packed"]), strict=True):
        if not place.exists():
            save(model, place)
    models["loaded"] = load(places["ticket"], into=problem.fresh(seed).to(DTYPES[dtype])).eval()
    example = problem.example.to(DTYPES[dtype]) if problem.example.is_floating_point() else problem.example
    outputs = {name: _output(models[name], example) for name in ("ticket", "packed")}
    linear = [layer for _, layer in models["ticket"].named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    weights = [layer.weight for layer in linear if not _is_head(models["ticket"], layer)]
    return Product(
        network=problem.name,
        seed=seed,
        round=problem.product_round,
        remaining=sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        dtype=dtype,
        score=problem.score,
        scores={name: problem.test(model) for name, model in models.items()},
        difference=float((outputs["ticket"] - outputs["packed"]).abs().max()),
        range=float(outputs["ticket"].max() - outputs["ticket"].min()),
        layers=[_bytes(n, m) for n, m in models["packed"].named_modules() if isinstance(m, SparseLinear)],
        left=report.dense,
        disk={name: sum(file.stat().st_size for file in place.iterdir()) for name, place in places.items()},
        latency={threads: _time(models, example, threads, seconds) for threads in THREADS},
    )


def _trained(problem: Problem, directory: Path, seed: int, round: int, dtype: torch.dtype) -> nn.Module:
    model = problem.fresh(seed)
    model.load_state_dict(load_file(ticket_file(directory, problem, seed, round)))
    return model.to(dtype).eval().requires_grad_(False)


def _is_head(model: nn.Module, layer: nn.Module) -> bool:
    return hasattr(model, "get_output_embeddings") and layer is model.get_output_embeddings()


def _bytes(name: str, layer: SparseLinear) -> LayerBytes:
    packed = layer.packed
    kept, shape = packed.values.numel(), (layer.out_features, layer.in_features)
    parts = (getattr(packed, part).nbytes for part in ("values", "bitmap", "row_offsets"))
    return LayerBytes(name, shape, kept, shape[0] * shape[1] * packed.values.element_size(), *parts)


@torch.inference_mode()
def _output(model: nn.Module, example: Tensor) -> Tensor:
    out = model(example)
    return (out if isinstance(out, Tensor) else out.logits).float()


def _time(models: dict[str, nn.Module], example: Tensor, threads: int, seconds: float) -> dict[str, Any]:
    """Dense and packed in turn, with so many threads: one input, in the cache, as a model of this size runs."""

    def call(name: str) -> Callable[[int], object]:
        return lambda _: models[name](example)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with evaluating(models["dense"]), evaluating(models["packed"]):
            timed = alternate({name: call(name) for name in ("dense", "packed")}, ROUNDS, seconds)
    finally:
        torch.set_num_threads(before)
    latencies: dict[str, Latency | Ratio] = {name: timed.latency(name) for name in ("dense", "packed")}
    return {**latencies, "speedup": timed.ratio("dense", "packed")}
