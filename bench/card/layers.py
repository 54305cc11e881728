"""layers: y = x W^T at the sizes of real models: every kernel that takes part, against cuBLAS, from one token to many.

One row for each shape and number of tokens; all its variants alternate:

    F.linear          cuBLAS, on a weight without zeros: the baseline of every ratio
    compiled          torch.compile'd, where asked for
    2:4 NAME          each of linear_24's kernels that serves the weight on this card
    2:4 cuSPARSELt    torch's product with the algorithm that the library's search finds best for this row
                      cuda_expanded is the kernel's weight made dense into a scratch, then cuBLAS
    50% NAME, ...     the same of linear_bitmap

Each is checked against float64 before it is timed. The weights are random: zeros run faster.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from card.clock import calls_for, check_linear, time_variants
from card.worker import Case, Json, Setting, errors_of
from sparsekern import ops, shapes
from sparsekern.baselines import COMPILED, CUSPARSELT, LINEAR, Dense
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import LINEAR_KERNELS

SPARSITIES = (0.5, 0.6, 0.7)
# in the order of their worth: with the time over the last ones are left out
COMPILED_TOKENS = (1, 16, 2048)
FEW_TOKENS = (1, 16, 2048, 4, 64, 512, 4096)
ALL_TOKENS = (1, 16, 2048, 8, 32, 4, 64, 512, 4096, 2, 128, 1024, 256)
# for the number of calls in a sample only: bytes and operations a second of a fast card
FAST_BYTES, FAST_OPERATIONS = 4e12, 7e14
# of a row; from 8 rounds on a median is given, and with fewer than 100 the row says so
MOST_SECONDS = 3.0
# the six ways to keep two of four
PAIRS = [[i in pair for i in range(4)] for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]


def cases(setting: Setting, model: str, tokens: Sequence[int], compiled: bool = False) -> Iterator[Case]:
    """A case for each shape of a model's layers, the largest first, as that is where most of a model's time goes."""
    if setting.tiny:
        model, tokens = "tiny", (33,) if compiled else (1, 33)
    groups: dict[tuple[int, int], list[str]] = {}
    for layer in shapes.find(model).layers:
        groups.setdefault((layer.out_features, layer.in_features), []).append(layer.name)
    shapes_of_it = sorted(groups, key=lambda shape: -shape[0] * shape[1])[: 2 if setting.tiny else None]
    for number, (out_features, in_features) in enumerate(shapes_of_it):
        names = groups[out_features, in_features]
        facts = {"model": model, "layers": names, "out_features": out_features, "in_features": in_features}
        left = len(shapes_of_it) - number

        def rows(facts=facts, left=left) -> Iterator[Json]:
            # slow ones do not take the time of those that follow, and leave them what they do not need
            yield from measure(facts, tokens, setting.share(left), compiled)

        yield Case(f"{model} {out_features}x{in_features}" + (" compiled" if compiled else ""), rows)


@dataclass(frozen=True)
class Variant:
    """One way to multiply: `run` takes x and the number of a copy. nbytes: of the weight as it is read."""

    weight: Tensor
    run: Callable[[Tensor, int], Tensor]
    nbytes: int


def measure(facts: Json, tokens: Sequence[int], setting: Setting, compiled: bool) -> Iterator[Json]:
    """The rows of one shape."""
    shape = (facts["out_features"], facts["in_features"])
    # two-byte weights read once, or the multiplications of a dense product
    # a compiled linear keeps its own weight: one call, which finds it in memory as all others do
    copies = 1 if compiled else calls_for(2 * shape[0] * shape[1] / FAST_BYTES)
    refused: dict[str, str] = {}
    weight = random_weight(shape, setting)
    variants = dict([] if compiled else sparse_variants(weight, copies, refused))
    dense = [weight, *(weight.clone() for _ in range(copies - 1))]
    linear = Variant(weight, lambda x, number: F.linear(x, dense[number]), weight.nbytes)
    for number, count in enumerate(tokens):
        if setting.seconds_left <= 0:
            yield {"left_out": f"time over before {', '.join(map(str, tokens[number:]))} tokens"}
            return
        generator = torch.Generator(setting.device).manual_seed(count)
        x = torch.randn(count, shape[1], generator=generator, device=setting.device).to(weight.dtype)
        here = {LINEAR.name: linear, **variants}
        errors: dict[str, str] = {}
        if compiled:
            add_baseline(here, COMPILED, weight, count, 1, "compiled", refused, errors)
        elif two_of_four := next((variant for name, variant in variants.items() if name.startswith("2:4 ")), None):
            add_baseline(here, CUSPARSELT, two_of_four.weight, count, copies, "2:4 cuSPARSELt", refused, errors)
        wrong = dict(errors_of({name: check(variant, x) for name, variant in here.items()}))
        ready = {name: bind(variant, x) for name, variant in here.items() if name not in wrong}
        operations = 2 * count * shape[0] * shape[1]
        calls = min(copies, calls_for(operations / FAST_OPERATIONS))
        timed = time_variants(ready, LINEAR.name, setting, calls, seconds=MOST_SECONDS).to_json()
        timed["errors"] = {**errors, **wrong, **timed["errors"]}
        io_bytes = x.nbytes + count * shape[0] * x.itemsize
        yield {
            **facts,
            "tokens": count,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "calls": calls,
            "operations": operations,
            # what a call cannot do without: the weight as it is read, x, y
            "bytes": {name: variant.nbytes + io_bytes for name, variant in here.items()},
            "refused": refused,
            **timed,
        }


def check(variant: Variant, x: Tensor) -> Callable[[], None]:
    return lambda: check_linear(bind(variant, x), x, variant.weight)


def bind(variant: Variant, x: Tensor) -> Callable[[int], Tensor]:
    return lambda number: variant.run(x, number)


def random_weight(shape: tuple[int, int], setting: Setting, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A weight without zeros."""
    generator = torch.Generator(setting.device).manual_seed(shape[0] + shape[1])
    weight = torch.randn(shape, generator=generator, device=setting.device, dtype=torch.float32).mul_(0.02).to(dtype)
    return weight.masked_fill_(weight == 0, 0.02)


def keep_two_of_four(weight: Tensor) -> Tensor:
    """`weight` with two of every four inputs, chosen at random."""
    table = torch.tensor(PAIRS, device=weight.device)
    drawn = torch.randint(len(PAIRS), (weight.numel() // 4,), device=weight.device)
    return weight.where(table[drawn].view(weight.shape), 0.0)


def prune_at_random(weight: Tensor, sparsity: float) -> Tensor:
    """`weight` with this share of zeros, wherever they fall."""
    return weight.where(torch.rand(weight.shape, device=weight.device) >= sparsity, 0.0)


def sparse_variants(weight: Tensor, copies: int, refused: dict[str, str]) -> Iterator[tuple[str, Variant]]:
    """Every kernel that serves the weight pruned in each way; why others do not, in `refused`."""
    pruned = {"2:4": (SemiStructured, keep_two_of_four(weight))}
    pruned |= {f"{sparsity:.0%}": (Bitmap, prune_at_random(weight, sparsity)) for sparsity in SPARSITIES}
    for label, (format, zeros) in pruned.items():
        packed = ops.pack(zeros, format)
        for kernel in LINEAR_KERNELS[format]:
            name = f"{label} {kernel.name}"
            if kernel.name == "reference":
                continue
            if reason := kernel.refuses(packed):
                refused[name] = reason
                continue
            operands = kernel.prepare(packed)
            copied = [operands, *(tuple(t.clone() for t in operands) for _ in range(copies - 1))]

            def run(x: Tensor, number: int, kernel=kernel, copied=copied) -> Tensor:
                return kernel.run(x, copied[number], None, *weight.shape)

            yield name, Variant(zeros, run, sum(t.nbytes for t in operands))


def add_baseline(
    to: dict[str, Variant],
    baseline: Dense,
    weight: Tensor,
    tokens: int,
    copies: int,
    name: str,
    refused: dict[str, str],
    errors: dict[str, str],
) -> None:
    """Add a baseline that is prepared for a number of tokens, or why it is not there."""
    if reason := baseline.refuses(weight):
        refused[name] = reason
        return
    made: list[object] = []
    errors.update(errors_of({name: lambda: made.append(baseline.prepare(weight, None, tokens))}))
    if made and isinstance(made[0], tuple):
        # the weight in the library's order, and the algorithm
        first, *others = made[0]
        made += [(first.clone(), *others) for _ in range(copies - 1)]
    if made:
        size = made[0][0].nbytes if isinstance(made[0], tuple) else weight.nbytes
        to[name] = Variant(weight, lambda x, number: baseline.run(x, made[number], None), size)
