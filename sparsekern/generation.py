"""generation: tokens per second of a whole model with random weights in a published shape, dense against sparse.

The variants of one model stand in memory together and run transformers' generate in alternation, greedily:

    dense       torch's own linear layers, what people have
    own dense   the same bits in our own kernel's order: what is gained here is not from sparsity
    50 %, ...   pruned at random and packed, in bfloat16 and with int8 values

The gain of the kernel is dense / own dense, that of sparsity own dense / sparse; both are printed. Before anything is
timed the logits of each variant are compared with those of its own weights in torch's linear layers.

    ceiling   bytes that a token reads of own dense / of the variant
    limit     of those bytes, the tokens a second that the machine's plain read would allow; attention, norms and Python
              are not in it. How long they take shows the variant without linear layers, whose output is none
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from os import PathLike
from statistics import median

import torch
from torch import Tensor, nn

from sparsekern.endtoend import check_logits
from sparsekern.formats import Dense
from sparsekern.hf_generate import CACHES, compile_forward, generate, generate_logits, random_model
from sparsekern.measure import device_of, evaluating, logits, machine, weight_bytes
from sparsekern.ops import stream_read
from sparsekern.ops.kernel import pick
from sparsekern.plan import Plan, Unmeasured
from sparsekern.shapes import ModelShape
from sparsekern.swap import densify, sparsify
from sparsekern.timing import (
    FEWEST_SAMPLES,
    Alternation,
    Bandwidth,
    Json,
    Latency,
    Ratio,
    Sample,
    clock_of,
)
from sparsekern.variants import available, peak, pruned, read_bytes, sharing, without_linear

DENSE, OWN, NO_LINEAR = "dense", "own dense", "no linear layers"
VALUES = ("bfloat16", "int8")
HEADS = ("own", "int8", "torch")
READ_BYTES = 512 << 20
_PROCESS_BYTES = 512 << 20  # of torch, transformers and the copies that a plan rotates
_HEAD_IN_WORDS = {
    "own": "own kernel, in the kind of values",
    "int8": "own kernel, with int8 in every sparse variant",
    "torch": "as torch has it",
}


@dataclass(frozen=True)
class Variant:
    """One form of the model.

    read_bytes   of weights that one new token reads: all but the input embedding
    peak_bytes   its weights and what generating takes beside them; None where the machine does not say
    difference   of its logits from those of the same weights in nn.Linear, root mean square, relative
    swap         what sparsify() did
    """

    name: str
    prefill: Latency
    decode: Latency
    prefill_over_dense: Ratio
    prefill_over_own: Ratio
    over_dense: Ratio
    over_own: Ratio
    bytes: int
    read_bytes: int
    peak_bytes: int | None
    difference: float
    swap: Json

    def to_json(self) -> Json:
        return asdict(self)


@dataclass(frozen=True)
class Generation:
    """What `measure_generation` found. `blocks` decoder blocks of the model's `all_blocks` were built."""

    model: str
    blocks: int
    all_blocks: int
    prompt: int
    new_tokens: int
    cache: str
    compiled: bool
    head: str
    bandwidth: Bandwidth
    variants: tuple[Variant, ...]
    machine: Json
    date: str

    def find(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    def ceiling(self, variant: Variant) -> float:
        return self.find(OWN).read_bytes / variant.read_bytes if variant.read_bytes else float("inf")

    def limit(self, variant: Variant) -> float | None:
        """Tokens a second; None for a variant that reads no weights."""
        return self.bandwidth.median / variant.read_bytes if variant.read_bytes else None

    def to_json(self) -> Json:
        """What json.dumps takes."""
        rows = []
        for each in self.variants:
            speeds = {"prefill_tokens_s": self.prompt / each.prefill.median, "decode_tokens_s": 1 / each.decode.median}
            bounds = {"ceiling": self.ceiling(each) if each.read_bytes else None, "limit_tokens_s": self.limit(each)}
            rows.append({**each.to_json(), **speeds, **bounds})
        return {**asdict(self), "variants": rows}

    def table(self):
        """A rich table, a row for each variant."""
        from rich import box
        from rich.table import Table

        part = f"{self.blocks} of its {self.all_blocks} blocks, " if self.blocks != self.all_blocks else ""
        how = "torch.compile, " if self.compiled else ""
        title = f"{self.model}, {part}random weights: generate, {self.prompt} tokens of prompt, {how}{self.cache} cache"
        table = Table(title=title, caption=self.caption(), box=box.SIMPLE, pad_edge=False, title_justify="left")
        table.caption_justify = "left"
        table.add_column("variant")
        bounds = ("ceiling", "of limit", "MB", "peak MB")
        for name in ("prefill tok/s", "× own dense", "decode tok/s", "× dense", "× own dense", *bounds):
            table.add_column(name, justify="right")
        for each in self.variants:
            limit = self.limit(each)
            table.add_row(
                each.name,
                _rate(each.prefill, self.prompt),
                _ratio(each.prefill_over_own) if each.name != OWN else "1",
                _rate(each.decode, 1),
                _ratio(each.over_dense) if each.name != DENSE else "1",
                _ratio(each.over_own) if each.name != OWN else "1",
                f"{self.ceiling(each):.2f}x" if limit else "",
                f"{1 / each.decode.median / limit:.0%}" if limit else "",
                f"{each.bytes / 1e6:.0f}",
                "–" if each.peak_bytes is None else f"{each.peak_bytes / 1e6:.0f}",
            )
        return table

    def caption(self) -> str:
        """What the table's numbers depend on."""
        facts = self.machine
        worst = max(each.difference for each in self.variants)
        return "\n".join(
            [
                f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads; reads {self.bandwidth}; "
                f"torch {facts['torch']}; commit {facts['commit'] or 'unknown'}; {self.date}",
                "median, ~ is unsteady; ratios of alternating runs with p10–p90, none (–) where one is unsteady",
                "dense / own dense is the gain of the kernel, own dense / sparse that of sparsity; "
                f"output embedding: {_HEAD_IN_WORDS[self.head]}",
                f"ceiling: bytes a token reads, of own dense / of the variant; logits differ by {worst:.1e} at most",
            ]
        )


def measure_generation(
    shape: ModelShape,
    sparsities: Sequence[float] = (0.5, 0.7),
    *,
    values: Sequence[str] = VALUES,
    head: str = "own",
    prompt: int = 32,
    new_tokens: int = 16,
    blocks: int | None = None,
    cache: str = "dynamic",
    compiled: bool = False,
    seconds: float = 100.0,
    plan: Plan | Unmeasured | None = None,
    progress: Callable[[int, int, str], object] | None = None,
) -> Generation:
    """Generate with a random model of `shape` dense, in own dense panels, and at each sparsity and kind of values.

    head      the output embedding of all but `dense`: "own" runs it by our own kernel in the variant's kind of values,
              "int8" by our own with 8 bits in every sparse variant, "torch" leaves it
    prompt    tokens of the prompt; new_tokens: that are generated, the first of them by the prefill
    blocks    so many decoder blocks instead of all
    compiled  the forward passes go through torch.compile, half a minute and more a variant; the logits of the tokens
              that it generates are compared with those of the same variant before it was compiled
    seconds   for the timings; at least 8 rounds are run
    plan      what decides about each layer, at one token; None measures

    Raises ValueError for a sparsity outside 0..1, other values, too few tokens or too little memory, RuntimeError when
    logits disagree.
    """
    _check(shape, sparsities, values, head, prompt, new_tokens, blocks, cache)
    dense = random_model(shape, torch.bfloat16, blocks)
    models, swaps = {DENSE: dense}, {DENSE: {}}
    say = progress or (lambda *_: None)
    wanted = [(f"{sparsity:.0%} {kind}", sparsity, kind) for kind in values for sparsity in sparsities]
    steps = 2 * len(wanted) + 3
    for name, sparsity, kind in [(OWN, None, "bfloat16"), *wanted]:
        say(len(models), steps, f"pack {name}")
        models[name] = pruned(dense, sparsity)
        chosen = Unmeasured(Dense) if sparsity is None else plan or Plan.for_model(dense)
        eight = "int8" if kind == "int8" else None
        own_head = "int8" if kind == "int8" or (head == "int8" and sparsity is not None) else "dense"
        report = sparsify(models[name], plan=chosen, values=eight, lm_head=None if head == "torch" else own_head)
        swaps[name] = report.to_json() | {"text": str(report)}
    models[NO_LINEAR] = without_linear(dense)
    swaps[NO_LINEAR] = {}
    ids = torch.randint(shape.vocabulary, (prompt,), generator=torch.Generator().manual_seed(0)).to(device_of(dense))
    differences = {DENSE: 0.0, NO_LINEAR: 0.0}
    for number, name in enumerate(models.keys() - differences.keys()):
        say(len(models) + number, steps, f"check {name}")
        differences[name] = _difference(models[name], ids)
    peaks = {}
    prefill: dict[str, list[Sample]] = {name: [] for name in models}
    decode: dict[str, list[Sample]] = {name: [] for name in models}
    device = device_of(dense)
    with torch.inference_mode():
        for name, model in models.items():
            say(steps - 1, steps, f"{'compile' if compiled else 'try'} {name}")
            if compiled:
                _compile(model, ids, new_tokens, cache, says_something=name != NO_LINEAR)
            peaks[name] = peak(lambda model=model: generate(model, ids, 2, cache), device)
        say(steps - 1, steps, "time")
        reads = _alternate(models, ids, new_tokens, cache, seconds, prefill, decode)
    bandwidth = Bandwidth.of(Latency.of(reads), READ_BYTES)
    return Generation(
        model=shape.name,
        blocks=blocks or shape.blocks,
        all_blocks=shape.blocks,
        prompt=prompt,
        new_tokens=new_tokens,
        cache=cache,
        compiled=compiled,
        head=head,
        bandwidth=bandwidth,
        variants=tuple(
            Variant(
                name=name,
                prefill=Latency.of(prefill[name]),
                decode=Latency.of(decode[name]),
                prefill_over_dense=Alternation(prefill).ratio(DENSE, name),
                prefill_over_own=Alternation(prefill).ratio(OWN, name),
                over_dense=Alternation(decode).ratio(DENSE, name),
                over_own=Alternation(decode).ratio(OWN, name),
                bytes=weight_bytes(model),
                read_bytes=read_bytes(model),
                peak_bytes=None if peaks[name] is None else weight_bytes(model) + peaks[name],
                difference=differences[name],
                swap=swaps[name],
            )
            for name, model in models.items()
        ),
        machine=machine(),
        date=datetime.now(timezone.utc).date().isoformat(),
    )


def _alternate(models, ids, new_tokens, cache, seconds, prefill, decode) -> list[Sample]:
    """A call of generate is a sample of each: the time of the first token, and the median of the others'.

    Returns the samples of a plain read of memory in the same rounds.
    """
    names, clock, reads, read = list(models), clock_of(ids.device), [], _reader(ids.device)
    with clock as running:
        start, number = time.perf_counter(), 0
        while number < FEWEST_SAMPLES or time.perf_counter() - start < seconds:
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                stamps: list[float] = []
                call = running.time(partial(_generate, models[name], ids, new_tokens, cache, stamps))
                steps = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
                prefill[name].append(Sample(stamps[0], call.disturbed))
                decode[name].append(Sample(median(steps), call.disturbed))
            reads.append(running.time(read))
            number += 1
    return reads


def _generate(model: nn.Module, ids: Tensor, new_tokens: int, cache: str, stamps: list[float]) -> None:
    stamps += generate(model, ids, new_tokens, cache)[1]


def _difference(model: nn.Module, ids: Tensor) -> float:
    """Of the logits from those of the same weights in nn.Linear. Raises RuntimeError when rounding explains it not."""
    plain = sharing(model)
    densify(plain)
    with evaluating(plain), evaluating(model):
        return check_logits(logits(plain, ids), logits(model, ids), len(ids))


def _compile(model: nn.Module, ids: Tensor, new_tokens: int, cache: str, says_something: bool) -> None:
    """Raises RuntimeError when the logits of a model that says something are others than rounding explains."""
    # as many tokens as are timed: a longer cache, which has other sizes, would be compiled for again
    eager, wanted = generate_logits(model, ids, new_tokens, cache)
    compile_forward(model)
    new, got = generate_logits(model, ids, new_tokens, cache)
    # up to the first other token both have seen the same ones
    same = int((new == eager).cumprod(0).sum()) + 1
    if says_something:
        check_logits(wanted[:same], got[:same], min(same, new_tokens), "compiled and not")


def _reader(device: torch.device) -> Callable[[], object]:
    """What reads READ_BYTES of memory."""
    buffer = torch.ones(READ_BYTES // 8, dtype=torch.float64, device=device)
    if device.type == "cpu":
        kernel = pick(stream_read.KERNELS, buffer)
        return lambda: kernel.run(buffer, torch.get_num_threads())
    return lambda: torch.sum(buffer)


def _check(shape, sparsities, values, head, prompt, new_tokens, blocks, cache) -> None:
    if not sparsities or not all(0 <= sparsity < 1 for sparsity in sparsities):
        raise ValueError(f"sparsities must be one or more of 0..1 that leave weights, got {list(sparsities)}")
    if not values or set(values) - set(VALUES):
        raise ValueError(f"values must be of {', '.join(VALUES)}, got {list(values)}")
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    if prompt < 1 or new_tokens < 3:
        raise ValueError(f"prompt must be at least 1 token and new_tokens 3, got {prompt} and {new_tokens}")
    if cache not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
    if blocks is not None and not 1 <= blocks <= shape.blocks:
        raise ValueError(f"blocks must be 1..{shape.blocks} of {shape.name}, got {blocks}")
    number, free = blocks or shape.blocks, available()
    needed = _needed_bytes(shape, number, sparsities, values)
    if free is not None and needed > free:
        fitting = [n for n in range(1, number) if _needed_bytes(shape, n, sparsities, values) <= free]
        part = f"{fitting[-1]} of its {shape.blocks} blocks fit, or " if fitting else ""
        raise ValueError(
            f"{shape.name} in all these variants needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free: {part}"
            "give fewer sparsities or values"
        )


def _needed_bytes(shape: ModelShape, blocks: int, sparsities: Sequence[float], values: Sequence[str]) -> int:
    """At most, with every variant in memory, and twice the weights of one: of the one that is being packed or checked,
    and of another that was and may not have been given back. Seen were 4.51 GB of 4.87 with 4 blocks of Llama-3.2-1B
    in one sparse variant, 6.78 of 7.09 with 8.
    """
    linear, head = 2 * blocks * shape.block_weights, 2 * shape.head.weights
    dense = linear + head * (1 if shape.tied else 2)
    # a bit says where a weight was
    packed = sum((1 - s + 1 / 16) * (9 / 16 if kind == "int8" else 1) for kind in values for s in sparsities)
    heads = head * (1 + len(sparsities) * len(values))
    return int(dense + linear + linear * packed + heads + 2 * linear + READ_BYTES + _PROCESS_BYTES)


def plot(found: Generation, path: str | PathLike) -> None:
    """Draw the variants' decode speed, their ceilings and limits into the PNG file `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rows = [each for each in found.variants if each.read_bytes]
    places = range(len(rows))
    speeds = [1 / each.decode.median for each in rows]
    colours = ["tab:grey" if each.name in (DENSE, OWN) else "tab:blue" for each in rows]
    axes.bar(places, speeds, color=colours)
    for place, each in zip(places, rows, strict=True):
        ratio = "" if each.over_dense.median is None or each.name == DENSE else f"{each.over_dense.median:.2f}x"
        axes.annotate(ratio, (place, speeds[place]), ha="center", va="bottom")
        limit = found.limit(each)
        axes.plot([place - 0.4, place + 0.4], [limit, limit], "--", color="black")
    axes.plot([], [], "--", color="black", label="limit: bytes a token / plain read")
    axes.set_xticks(list(places), [each.name for each in rows])
    axes.set_ylabel("decode, tokens a second")
    axes.set_title(f"{found.model}, {found.machine['gpu'] or found.machine['cpu']}, {found.machine['threads']} threads")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _rate(latency: Latency, tokens: int) -> str:
    return f"{'' if latency.steady else '~'}{tokens / latency.median:.1f}"


def _ratio(ratio: Ratio) -> str:
    return "–" if ratio.median is None else str(ratio)
