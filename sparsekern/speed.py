"""speed: the linear layers of a model at their real size, with random weights: sparse against the best dense.

For every distinct shape and number of tokens: each candidate is checked against float64, then all are timed in
alternation (timing.py) together with a plain read of memory. The weights are rotated through copies, so that memory is
read and not the cache. Beside each speed-up stand

    ceiling     bytes of the dense weight / bytes of the packed weight: what reading less can give at most
    read share  the packed weight's bytes per second / those of the plain read, in the same rounds

The best dense is the fastest of the baselines in that row: torch's (baselines.py) and our own kernel with the weight
dense. What own dense gains over torch's is the kernel's, what sparse gains over own dense is sparsity's.

This is one file because a row is read with the code that measures it and with the table and drawing it ends in.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from os import PathLike

import torch
from torch import Tensor

from sparsekern.baselines import LINEAR, PREPACKED, Dense
from sparsekern.formats import Bitmap
from sparsekern.formats import Dense as DenseWeight
from sparsekern.measure import machine
from sparsekern.ops import compiled, linear_bitmap, linear_dense, stream_read
from sparsekern.ops.kernel import Kernel, pick
from sparsekern.plan import check_linear, random_input, rotate
from sparsekern.shapes import LayerShape, ModelShape
from sparsekern.timing import Alternation, Bandwidth, Json, Latency, Ratio, Sample, alternate, arena_bytes

# the processor may have more cache than it tells a guest
ARENA_BYTES = 512 << 20
READ_BYTES = 32 << 20  # of one sample of the plain read
READ = "read"
ROUNDS = 100


def _own_refuses(weight: Tensor) -> str | None:
    kernel = pick(linear_dense.KERNELS, DenseWeight.pack(weight))
    return "only the reference accepts it" if kernel.name == "reference" else None


def _own_prepare(weight: Tensor, *_: object) -> Callable[[Tensor, Tensor | None], Tensor]:
    packed = DenseWeight.pack(weight)
    kernel = pick(linear_dense.KERNELS, packed)
    operands, shape = kernel.prepare(packed), packed.shape
    return lambda x, bias: kernel.run(x, operands, bias, *shape)


OWN = Dense("own dense", _own_prepare, lambda x, own, bias: own(x, bias), _own_refuses)


@dataclass(frozen=True)
class Row:
    """One shape at one number of tokens.

    layers      the names of the layers that have this shape; `count` of them stand in a block
    dense       the latency of each baseline, by its name
    speedup     best dense / sparse;  over_linear: F.linear / sparse;  over_own: own dense / sparse
    read_share  of the plain read's bytes per second, 0..1; None when either is unsteady
    """

    layers: tuple[str, ...]
    count: int
    out_features: int
    in_features: int
    tokens: int
    kernel: str
    sparse: Latency
    dense: dict[str, Latency]
    best: str
    speedup: Ratio
    over_linear: Ratio
    over_own: Ratio
    dense_bytes: int
    packed_bytes: int
    read: Bandwidth
    read_share: float | None

    @property
    def ceiling(self) -> float:
        return self.dense_bytes / self.packed_bytes

    def to_json(self) -> Json:
        return {**asdict(self), "ceiling": self.ceiling}


@dataclass(frozen=True)
class Total:
    """The linear layers of one decoder block at one number of tokens, one after the other, in seconds."""

    tokens: int
    sparse: float
    best: float
    linear: float
    speedup: Ratio
    over_linear: Ratio
    over_own: Ratio
    ceiling: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Total":
        """From all rows of one number of tokens."""
        sparse = sum(row.count * row.sparse.median for row in rows)
        return cls(
            tokens=rows[0].tokens,
            sparse=sparse,
            best=sum(row.count * row.dense[row.best].median for row in rows),
            linear=sum(row.count * row.dense[LINEAR.name].median for row in rows),
            speedup=_weighted(rows, [row.speedup for row in rows]),
            over_linear=_weighted(rows, [row.over_linear for row in rows]),
            over_own=_weighted(rows, [row.over_own for row in rows]),
            ceiling=sum(row.count * row.dense_bytes for row in rows)
            / sum(row.count * row.packed_bytes for row in rows),
        )


@dataclass(frozen=True)
class Speed:
    """What `measure_speed` found. `skipped`: baselines that could not run, and why."""

    model: str
    blocks: int
    sparsity: float
    dtype: str
    bandwidth: Bandwidth
    read_by: str
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    machine: Json
    date: str
    seconds: float

    @property
    def totals(self) -> tuple[Total, ...]:
        """One for each number of tokens."""
        counts = dict.fromkeys(row.tokens for row in self.rows)
        return tuple(Total.of([row for row in self.rows if row.tokens == tokens]) for tokens in counts)

    def to_json(self) -> Json:
        """What json.dumps takes."""
        parts = {"rows": [row.to_json() for row in self.rows], "totals": [asdict(total) for total in self.totals]}
        return {**asdict(self), **parts}

    def table(self):
        """A rich table: a row for each shape, and the whole block under them, at each number of tokens."""
        from rich import box
        from rich.table import Table

        setting = f"{self.sparsity:.0%} sparsity, {self.dtype}, {self.machine['threads']} threads"
        title = f"{self.model}, {self.blocks} blocks: linear layers at {setting}"
        left = {"title_justify": "left", "caption_justify": "left"}
        table = Table(
            title=title,
            caption=self.caption(),
            box=box.SIMPLE,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            show_edge=False,
            **left,
        )
        # a time and its (p10–p90) may stand on two lines, but are not cut
        widths = {"tokens": 6, "layers": 8, "shape": 9, "sparse us": 11, "dense us": 11, "best": 9}
        widths |= {"speed-up": 11, "own": 5, "torch": 5, "ceiling": 5, "read": 4}
        for name, width in widths.items():
            table.add_column(name, justify="left" if name in ("layers", "best") else "right", min_width=width)
        for total in self.totals:
            for row in self.rows:
                if row.tokens == total.tokens:
                    table.add_row(*self._cells(row))
            name = "block"
            times = [f"{seconds * 1e6:.0f}" for seconds in (total.sparse, total.best)]
            gains = (_spread(total.speedup), _median(total.over_own), _median(total.over_linear))
            ratios = (*gains, f"{total.ceiling:.2f}x", "")
            table.add_row(str(total.tokens), name, "", *times, "", *ratios, style="bold", end_section=True)
        return table

    def caption(self) -> str:
        """What the table's numbers depend on."""
        facts = self.machine
        lines = [
            f"{facts['gpu'] or facts['cpu']}; reads {self.bandwidth} by {self.read_by}; torch {facts['torch']}; "
            f"commit {facts['commit'] or 'unknown'}; {self.date}",
            "median (p10–p90), ~ is unsteady; ratios of alternating samples, none (–) where one is unsteady",
            "own, torch: speed-up over own dense, F.linear; read: of a plain read's bytes a second, same rounds",
        ]
        lines += [f"{name} did not run: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def _cells(self, row: Row) -> tuple[str, ...]:
        names = ", ".join(name.removesuffix("_proj") for name in row.layers)
        return (
            str(row.tokens),
            names + (" (reference)" if row.kernel == "reference" else ""),
            f"{row.out_features}x{row.in_features}",
            _microseconds(row.sparse),
            _microseconds(row.dense[row.best]),
            row.best,
            _spread(row.speedup),
            _median(row.over_own),
            _median(row.over_linear),
            f"{row.ceiling:.2f}x",
            "–" if row.read_share is None else f"{row.read_share:.0%}",
        )

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=200).print(self.table())
        return text.getvalue().rstrip()


def measure_speed(
    model: ModelShape,
    sparsity: float,
    tokens: Sequence[int] = (1, 4, 16),
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seconds: float = 100.0,
    dense: Sequence[Dense] = (LINEAR, PREPACKED, OWN),
    rounds: int = ROUNDS,
    arena: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Speed:
    """Time the linear layers of one decoder block of `model`, pruned at random, against dense ones.

    seconds   for everything; the rounds get fewer when they take long. An unsteady row is timed once more, beyond that
    dense     the baselines, F.linear among them
    arena     bytes to read before a buffer is met again; None: past every cache
    progress  called with the number of timings done and of all

    Raises ValueError for a sparsity outside 0..1 or no tokens, RuntimeError when a result is wrong.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in 0..1 and leave weights to read, got {sparsity}")
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be one or more positive numbers, got {list(tokens)}")
    start, arena = time.perf_counter(), max(ARENA_BYTES, arena_bytes(device)) if arena is None else arena
    buffer = torch.empty(max(arena // READ_BYTES, 1) * READ_BYTES // 8, dtype=torch.float64, device=device)
    compiled.in_huge_pages(buffer).fill_(1.0)
    read_by, read = _reader(buffer)
    groups = _distinct(model.layers)
    rows: list[Row] = []
    reads: list[Sample] = []
    skipped: dict[str, str] = {}
    unprepared = sum(layers[0].weights for layers in groups)
    for layers in groups:
        bench = _Bench(layers, sparsity, dtype, device, dense, buffer, read, arena)
        skipped.update(bench.skipped)
        unprepared -= layers[0].weights
        for count in tokens:
            left = start + seconds - time.perf_counter() - unprepared * bench.seconds_a_weight
            timings_left = len(groups) * len(tokens) - len(rows)
            timed = bench.time(count, rounds, max(left / timings_left, 0.0))
            if bench.row(count, timed).speedup.median is None:
                # once more, and that is what stands, steady or not
                timed = bench.time(count, rounds, max(left / timings_left, 0.0))
            rows.append(bench.row(count, timed))
            reads += timed.samples[READ]
            if progress:
                progress(len(rows), len(groups) * len(tokens))
    rows.sort(key=lambda row: tokens.index(row.tokens))
    return Speed(
        model=model.name,
        blocks=model.blocks,
        sparsity=sparsity,
        dtype=str(dtype).removeprefix("torch."),
        bandwidth=Bandwidth.of(Latency.of(reads), READ_BYTES),
        read_by=read_by,
        rows=tuple(rows),
        skipped=skipped,
        machine=machine(),
        date=datetime.now(timezone.utc).date().isoformat(),
        seconds=time.perf_counter() - start,
    )


class _Bench:
    """The candidates for one shape, with their rotated copies."""

    def __init__(self, layers, sparsity, dtype, device, dense, buffer, read, arena):
        start = time.perf_counter()
        shape: LayerShape = layers[0]
        self._layers = layers
        self._shape = (shape.out_features, shape.in_features)
        generator = torch.Generator(device).manual_seed(shape.weights)
        # random data: a processor reads and multiplies zeros faster
        self._weight = torch.randn(self._shape, generator=generator, device=device).mul_(0.02).to(dtype)
        kept = torch.rand(self._shape, generator=generator, device=device) >= sparsity
        self._pruned = self._weight.where(kept, 0.0)
        self._bias = self._weight[:, 0].clone() if shape.bias else None
        packed = Bitmap.pack(self._pruned)
        self.kernel: Kernel = pick(linear_bitmap.KERNELS, packed)
        operands = self.kernel.prepare(packed)
        self._packed_bytes = sum(operand.nbytes for operand in operands)
        self._read, self._chunks = read, buffer.split(READ_BYTES // buffer.itemsize)

        self.skipped = {each.name: reason for each in dense if (reason := each.refuses(self._weight))}
        self._dense = [each for each in dense if each.name not in self.skipped]
        a_round = self._packed_bytes + len(self._dense) * self._weight.nbytes + READ_BYTES
        self._copies = max(-(-arena // a_round), 2)
        self._sparse = rotate(operands, self._copies * self._packed_bytes)
        self._prepared = {each.name: self._copies_of(each, 1) for each in self._dense if not each.of_tokens}
        self.seconds_a_weight = (time.perf_counter() - start) / shape.weights

    def time(self, tokens: int, rounds: int, seconds: float) -> Alternation:
        """Check every candidate, then time them for `seconds` at most, the preparation included."""
        end = time.perf_counter() + seconds
        x = random_input(tokens, self._weight)
        variants = {READ: lambda number: self._read(self._chunks[number % len(self._chunks)])}
        for each in self._dense:
            copies = self._copies_of(each, tokens) if each.of_tokens else self._prepared[each.name]
            run = partial(self._run_dense, each, copies, x)
            check_linear(run(0), x, self._weight, self._bias, f"{each.name} at {tokens} tokens")
            variants[each.name] = run
        check_linear(self._run_sparse(x, 0), x, self._pruned, self._bias, f"kernel {self.kernel.name}")
        variants[self.kernel.name] = partial(self._run_sparse, x)
        return alternate(variants, rounds=rounds, seconds=end - time.perf_counter(), device=x.device)

    def row(self, tokens: int, timed: Alternation) -> Row:
        latencies = {each.name: timed.latency(each.name) for each in self._dense}
        # what disturbs only ever adds time: unsteady ones are told apart by their fastest tenth
        steady = all(latency.steady for latency in latencies.values())
        best = min(latencies, key=lambda name: latencies[name].median if steady else latencies[name].p10)
        sparse, read = timed.latency(self.kernel.name), timed.latency(READ)
        bandwidth = Bandwidth.of(read, READ_BYTES)
        share = self._packed_bytes / sparse.median / bandwidth.median if sparse.steady and read.steady else None
        return Row(
            layers=tuple(layer.name for layer in self._layers),
            count=sum(layer.count for layer in self._layers),
            out_features=self._shape[0],
            in_features=self._shape[1],
            tokens=tokens,
            kernel=self.kernel.name,
            sparse=sparse,
            dense=latencies,
            best=best,
            speedup=timed.ratio(best, self.kernel.name),
            over_linear=timed.ratio(LINEAR.name, self.kernel.name),
            over_own=self._over_own(timed),
            dense_bytes=self._weight.nbytes,
            packed_bytes=self._packed_bytes,
            read=bandwidth,
            read_share=share,
        )

    def _over_own(self, timed: Alternation) -> Ratio:
        if OWN.name in timed.samples:
            return timed.ratio(OWN.name, self.kernel.name)
        return Ratio.unknown(f"{OWN.name} did not run")

    def _copies_of(self, dense: Dense, tokens: int) -> list[object]:
        return [dense.prepare(self._weight, self._bias, tokens) for _ in range(self._copies)]

    def _run_dense(self, dense: Dense, copies: list[object], x: Tensor, number: int) -> Tensor:
        return dense.run(x, copies[number % len(copies)], self._bias)

    def _run_sparse(self, x: Tensor, number: int) -> Tensor:
        return self.kernel.run(x, self._sparse[number % len(self._sparse)], self._bias, *self._shape)


def plot(speed: Speed, path: str | PathLike) -> None:
    """Draw `draw_speed` into the PNG file `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    draw_speed(speed, figure.add_subplot())
    figure.savefig(path, dpi=150)


def draw_speed(speed: Speed, axes) -> None:
    """Draw the block's speed-up against the number of tokens, and the ceiling, into a matplotlib Axes."""
    totals = speed.totals
    places = range(len(totals))
    for label, colour, ratios in (
        ("against the best dense", "tab:blue", [total.speedup for total in totals]),
        ("against own dense", "tab:green", [total.over_own for total in totals]),
        ("against F.linear", "tab:orange", [total.over_linear for total in totals]),
    ):
        known = [(place, ratio) for place, ratio in zip(places, ratios, strict=True) if ratio.median is not None]
        medians = [ratio.median for _, ratio in known]
        below = [ratio.median - ratio.p10 for _, ratio in known]
        above = [ratio.p90 - ratio.median for _, ratio in known]
        missing = "" if len(known) == len(totals) else " (unsteady ones left out)"
        points = [place for place, _ in known]
        axes.errorbar(points, medians, (below, above), fmt="o-", capsize=3, color=colour, label=label + missing)
    axes.plot(
        places, [total.ceiling for total in totals], "--", color="black", label="ceiling: dense bytes / packed bytes"
    )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(list(places), [str(total.tokens) for total in totals])
    axes.set_xlabel("tokens")
    axes.set_ylabel("speed-up of the linear layers")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{speed.model}, {speed.sparsity:.0%} sparse, {speed.dtype}\n{speed.machine['gpu'] or speed.machine['cpu']}"
    )
    axes.legend(fontsize="small")


def _distinct(layers: Sequence[LayerShape]) -> list[list[LayerShape]]:
    """The layers in groups of one shape, in the order of the model."""
    groups: dict[tuple[int, int, bool], list[LayerShape]] = {}
    for layer in layers:
        groups.setdefault((layer.out_features, layer.in_features, layer.bias), []).append(layer)
    return list(groups.values())


def _reader(buffer: Tensor) -> tuple[str, Callable[[Tensor], object]]:
    """The name and the function of the plain read."""
    if buffer.device.type == "cpu":
        kernel = pick(stream_read.KERNELS, buffer)
        if kernel.name != "reference":
            return f"stream_read {kernel.name}", lambda part: kernel.run(part, torch.get_num_threads())
    # nothing compiled, or a card: torch's own sum reads nearly as fast
    return "torch.sum", torch.sum


def _weighted(rows: Sequence[Row], ratios: Sequence[Ratio]) -> Ratio:
    """The ratio of the block: each layer's, weighted with the time that its sparse form takes."""
    for row, ratio in zip(rows, ratios, strict=True):
        if ratio.median is None:
            return Ratio.unknown(f"{', '.join(row.layers)}: {ratio.reason}")
    weights = [row.count * row.sparse.median for row in rows]
    pairs = list(zip(weights, ratios, strict=True))
    median, p10, p90 = (
        sum(weight * getattr(ratio, name) for weight, ratio in pairs) / sum(weights)
        for name in ("median", "p10", "p90")
    )
    return Ratio(median, p10, p90)


def _microseconds(latency: Latency) -> str:
    unsteady = "" if latency.steady else "~"
    return f"{unsteady}{latency.median * 1e6:.0f} ({latency.p10 * 1e6:.0f}–{latency.p90 * 1e6:.0f})"


def _spread(ratio: Ratio) -> str:
    return "–" if ratio.median is None else str(ratio)


def _median(ratio: Ratio) -> str:
    return "–" if ratio.median is None else f"{ratio.median:.2f}x"
