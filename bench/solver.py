"""solver: what pruning one layer costs, against the plain column loop, and where the time goes.

    python bench/solver.py                                                  three layers of Llama-2-7B, and the Gram
    python bench/solver.py --layers 4096x4096 --methods sparsegpt admm
    python bench/solver.py --tiny                                           seconds on any CPU

The column loop is SparseGPT as it was published (https://arxiv.org/abs/2301.00774, algorithm 1), step by step in torch:
three factorisations for U, a full sort of each block for its threshold, an outer product a column. llmcompressor's
function takes part where it can be imported. All start from the same Hessian and must reach the same error before
anything is timed; they alternate in one run. The floor is the operations that no order of the work avoids, at the rate
of the fastest matrix product here, timed in the same rounds. The last line of stdout is the result as JSON.
"""

import argparse
import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekern.measure import machine
from sparsekern.methods import METHODS
from sparsekern.ops import addmm, gram, keep_largest, obs_sweep
from sparsekern.ops.kernel import pick
from sparsekern.pattern import NM, Pattern, Unstructured, as_pattern
from sparsekern.stats import Gram
from sparsekern.timing import Alternation, alternate

BLOCK = 128
DAMPING = 0.01
BATCH = 2048
# the column loop's threshold lets one weight more go, and sums in another order
MOST_WORSE = 1.005


def layer(out_features: int, in_features: int, tokens: int, seed: int = 0) -> tuple[Tensor, Gram]:
    """A weight with unequal rows, and the statistics of correlated and unequal inputs, a few of them large."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = 0.02 * normal(out_features, in_features) * (0.3 * normal(out_features, 1)).exp()
    rank = max(1, in_features // 8)
    mix = torch.arange(1, rank + 1)[:, None] ** -0.5 * normal(rank, in_features)
    scale, stats = normal(in_features).exp(), Gram(in_features)
    scale[torch.randperm(in_features, generator=generator)[: in_features // 100]] *= 20
    for _ in range(-(-tokens // BATCH)):
        stats.add(((normal(BATCH, rank) @ mix + 0.3 * normal(BATCH, in_features)) * scale).bfloat16())
    return weight, stats


def column_loop(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """SparseGPT as published, nothing reordered and nothing fused; without dead inputs."""
    w, h = weight.clone(), hessian.clone()
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        here, u_here = w[:, start:stop].clone(), u[start:stop, start:stop]
        errors = torch.zeros_like(here)
        pruned = torch.zeros_like(here, dtype=torch.bool)
        if isinstance(pattern, Unstructured):
            score = here**2 / u_here.diagonal() ** 2
            ascending, _ = score.flatten().sort()
            pruned = score <= ascending[int(score.numel() * pattern.sparsity)]
        for j in range(stop - start):
            if isinstance(pattern, NM) and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                score = here[:, group] ** 2 / u_here.diagonal()[group] ** 2
                pruned.scatter_(1, j + score.topk(pattern.m - pattern.n, dim=1, largest=False).indices, True)
            column = here[:, j].clone()
            kept = column.clone()
            kept[pruned[:, j]] = 0
            errors[:, j] = (column - kept) / u_here[j, j]
            here[:, j:] -= errors[:, j : j + 1].matmul(u_here[j : j + 1, j:])
        # rounding leaves almost zero where a weight was pruned
        w[:, start:stop] = here.masked_fill(pruned, 0.0)
        w[:, stop:] -= errors.matmul(u[start:stop, stop:])
    return w


def peer() -> Callable[[Tensor, Tensor, Pattern], Tensor] | str:
    """llmcompressor's function as `column_loop` is called, or why it does not take part."""
    try:
        sparsify = importlib.import_module("llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify").sparsify_weight
    except ImportError as error:
        return f"llmcompressor takes no part: {error}"

    def run(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
        linear = nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        pruned, group = (pattern.m - pattern.n, pattern.m) if isinstance(pattern, NM) else (0, 0)
        sparsity = pruned / group if group else pattern.sparsity
        return sparsify(linear, {linear: hessian.clone()}, sparsity, pruned, group, BLOCK, DAMPING, False)[1]

    return run


def parts(weight: Tensor, stats: Gram, pattern: Pattern) -> dict[str, Callable[[int], object]]:
    """What SparseGPT is made of, each on its own at the sizes that the layer gives it."""
    u, _ = stats.inverse_cholesky(DAMPING)
    blocks = [slice(start, min(start + BLOCK, len(u))) for start in range(0, len(u), BLOCK)]
    corners = [u[block, block].contiguous() for block in blocks]
    nm = (pattern.n, pattern.m) if isinstance(pattern, NM) else None
    masks = [torch.rand(len(weight), len(corner)) < 0.5 for corner in corners]
    if nm:
        masks = [torch.ones_like(mask) for mask in masks]
    errors, moving = torch.randn(len(weight), BLOCK), weight.clone()

    def threshold(_: int) -> None:
        for block, corner in zip(blocks, corners, strict=True):
            saliency = (weight[:, block].contiguous() / corner.diagonal()).square_().view(1, -1)
            kept = torch.tensor([saliency.shape[1] // 2])
            pick(keep_largest.KERNELS, saliency).run(saliency, kept)

    def sweep(_: int) -> None:
        for block, corner, mask in zip(blocks, corners, masks, strict=True):
            pick(obs_sweep.KERNELS, weight[:, block], corner).run(weight[:, block], corner, mask, nm)

    def trailing(_: int) -> None:
        for block in blocks[:-1]:
            addmm.addmm(moving[:, block.stop :], errors, u[block, block.stop :], -1e-6)

    def factor(_: int) -> None:
        fresh(stats).inverse_cholesky(DAMPING)

    return {"factor": factor, **({} if nm else {"threshold": threshold}), "sweep": sweep, "trailing": trailing}


def fresh(stats: Gram) -> Gram:
    """The same statistics, nothing factored yet."""
    again = copy.copy(stats)
    again._factors = {}
    return again


def floor_operations(rows: int, size: int) -> float:
    """Of a Cholesky factor and its inverse, a third of size^3 each, and of the updates, with those inside blocks."""
    return 2 / 3 * size**3 + rows * size**2


def measure_layer(shape: tuple[int, int], arguments: argparse.Namespace) -> dict:
    """One row: times in seconds, ratios of the rounds, the share of each part."""
    weight, stats = layer(*shape, arguments.tokens)
    pattern = as_pattern(arguments.pattern)
    hessian, side = stats.hessian, min(2048, shape[1])
    left, right = torch.randn(side, side), torch.randn(side, side)
    methods = {name: METHODS[name]() for name in arguments.methods}
    loops = {"column_loop": column_loop}
    if callable(other := peer()):
        loops["llmcompressor"] = other

    solvers = {
        **{name: lambda _, m=method: m.prune(weight, fresh(stats), pattern) for name, method in methods.items()},
        **{name: lambda _, run=run: run(weight, hessian, pattern) for name, run in loops.items()},
    }
    errors = {name: stats.error(weight, run(0)) for name, run in solvers.items()}
    for name in {"sparsegpt", *loops} & errors.keys():
        assert errors[name] <= MOST_WORSE * errors["column_loop"], f"{name} does worse than the column loop: {errors}"

    timed = alternate(
        {
            **solvers,
            **parts(weight, stats, pattern),
            "product": lambda _: addmm.matmul(left, right),
            "torch_product": lambda _: left @ right,
        },
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )
    rate = 2 * side**3 / timed.latency("product").median
    floor = floor_operations(*shape) / rate
    return {
        "shape": list(shape),
        "pattern": str(pattern),
        "tokens": stats.tokens,
        "errors": errors,
        **{name: timed.latency(name).to_json() for name in timed.samples},
        "speedup": {name: {loop: timed.ratio(loop, name).to_json() for loop in loops} for name in methods},
        # of SparseGPT's time; what is left is copies
        "share": {name: share(timed, name) for name in ("factor", "threshold", "sweep", "trailing")},
        "product_flops": rate,
        "torch_product_flops": 2 * side**3 / timed.latency("torch_product").median,
        "floor": floor,
        "times_floor": {name: timed.latency(name).median / floor for name in solvers},
    }


def share(timed: Alternation, part: str) -> float | None:
    """The part's time over SparseGPT's, the median of the rounds; None where there is no such part."""
    if part not in timed.samples or "sparsegpt" not in timed.samples:
        return None
    return timed.latency(part).median / timed.latency("sparsegpt").median


def measure_gram(in_features: int, arguments: argparse.Namespace) -> dict:
    """One row: a batch of bfloat16 tokens into the sum, against float32 by torch, and the errors of both sums."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(arguments.batch, in_features, generator=generator).bfloat16() for _ in range(4)]
    sums = {name: torch.zeros(in_features, in_features) for name in ("gram", "float32")}
    kernel = pick(gram.KERNELS, sums["gram"], batches[0])
    # float64 is slow: as many columns of the sum as say how far it is off
    columns = min(256, in_features)
    exact_of = [batch.double().T @ batch[:, :columns].double() for batch in batches]
    added = {name: torch.zeros_like(exact_of[0]) for name in sums}

    def error(name: str) -> float:
        off = (sums[name][:, :columns].triu() - added[name].triu()).norm() / added[name].triu().norm()
        return float(off)

    def add(name: str, run: Callable[[Tensor, Tensor], None]) -> Callable[[int], None]:
        def one_batch(number: int) -> None:
            run(sums[name], batches[number % len(batches)])
            # what was added, to be weighed after the clock has stopped
            calls[name].append(number % len(batches))

        return one_batch

    calls: dict[str, list[int]] = {name: [] for name in sums}
    variants = {
        "gram": add("gram", kernel.run),
        "float32": add("float32", lambda total, x: total.addmm_(x.float().T, x.float())),
    }
    for name, variant in variants.items():
        variant(0)
        added[name] += exact_of[0]
        assert error(name) < 1e-5, f"{name} is wrong by {error(name):.1e}"
        calls[name].clear()
    timed = alternate(variants, rounds=arguments.batches, seconds=arguments.seconds)
    for name, numbers in calls.items():
        for number in numbers:
            added[name] += exact_of[number]
    return {
        "in_features": in_features,
        "batch": arguments.batch,
        "batches": len(calls["gram"]) + 1,
        "kernel": kernel.name,
        **{name: timed.latency(name).to_json() for name in variants},
        "speedup": timed.ratio("float32", "gram").to_json(),
        "errors": {name: error(name) for name in variants},
    }


def show_layer(row: dict) -> None:
    print(f"{row['shape'][0]} x {row['shape'][1]}, {row['pattern']}: floor {row['floor']:.3g} s", end="")
    print(f" at {row['product_flops'] / 1e9:.0f} GFLOP/s (torch {row['torch_product_flops'] / 1e9:.0f})")
    for name, times in row["times_floor"].items():
        line = f"  {name}: {row[name]['median']:.3g} s ({row[name]['p10']:.3g}–{row[name]['p90']:.3g})"
        line += f", {times:.1f} x the floor, error {row['errors'][name]:.4f}"
        for loop, ratio in row["speedup"].get(name, {}).items():
            line += f"; {loop} / {name} "
            line += (
                f"{ratio['median']:.2f}x ({ratio['p10']:.2f}–{ratio['p90']:.2f})"
                if ratio["median"]
                else ratio["reason"]
            )
        print(line)
    shares = [f"{name} {value:.1%}" for name, value in row["share"].items() if value is not None]
    print(f"  of sparsegpt: {', '.join(shares)}" if shares else "  sparsegpt was not asked for")


def show_gram(row: dict) -> None:
    ratio, errors = row["speedup"], row["errors"]
    print(
        f"Gram of {row['in_features']} inputs, {row['batch']} tokens: "
        f"{row['kernel']} {row['gram']['median'] * 1e3:.3g} ms, "
        f"float32 by torch {row['float32']['median'] * 1e3:.3g} ms; "
        + (f"{ratio['median']:.2f}x ({ratio['p10']:.2f}–{ratio['p90']:.2f})" if ratio["median"] else ratio["reason"])
        + f"; after {row['batches']} batches off by {errors['gram']:.1e}, torch by {errors['float32']:.1e}"
    )


def shape_of(text: str) -> tuple[int, int]:
    out_features, in_features = text.split("x")
    return int(out_features), int(in_features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=shape_of, nargs="*", default=[(4096, 4096), (11008, 4096), (4096, 11008)], metavar="OUTxIN"
    )
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=["sparsegpt"])
    parser.add_argument("--pattern", default="50%")
    parser.add_argument("--tokens", type=int, default=32768, help="that the Hessian is made of")
    parser.add_argument(
        "--gram", type=int, nargs="*", default=[2048, 4096], metavar="IN", help="inputs of the Gram rows"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="tokens that are added to a Gram at once")
    parser.add_argument("--batches", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, help="stop each row by then; at least 8 rounds are run")
    parser.add_argument(
        "--output", type=Path, help="also write the JSON to this file, as bench/results/solver-4096.json"
    )
    parser.add_argument("--tiny", action="store_true", help="one small layer, few rounds")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.layers, arguments.tokens, arguments.rounds, arguments.seconds = [(48, 200)], 600, 8, 2.0
        arguments.gram, arguments.batch, arguments.batches = [100], 64, 8
    if isinstance(why := peer(), str):
        print(why)
    rows: dict[str, list[dict]] = {"layers": [], "grams": []}
    for in_features in arguments.gram:
        rows["grams"].append(measure_gram(in_features, arguments))
        show_gram(rows["grams"][-1])
    for shape in arguments.layers:
        rows["layers"].append(measure_layer(shape, arguments))
        show_layer(rows["layers"][-1])
    line = json.dumps({"machine": machine(), **rows})
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
