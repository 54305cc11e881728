"""plan: is what sparsify(tokens=...) chose nowhere slower than dense? One decoder block, each layer timed once more.

    python bench/plan.py --model llama-3.2-1b --sparsity 0.5 --tokens 1 16 128
    python bench/plan.py --tiny                                            seconds on any CPU

A block of random weights is swapped by a plan that measures anew. Then every kind of layer that it met is timed again,
by what serves the layer now against F.linear and our own dense panels, their copies rotating through the arena. `best`
is the faster of the two where the plan could take it. A layer counts as slower when its median ratio is under 1 by more
than the plan's noise, twice in a row. The last line of stdout is the result as JSON; the exit status is 1 when a layer
is slower than F.linear, which is what it was.
"""

import argparse
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sparsekern import shapes
from sparsekern.decisions import NOISE
from sparsekern.formats import Dense
from sparsekern.linear import SparseLinear
from sparsekern.measure import machine
from sparsekern.ops import linear_dense
from sparsekern.plan import Plan, random_input, rotate
from sparsekern.swap import SwapReport, sparsify
from sparsekern.timing import Alternation, alternate, arena_bytes

LINEAR, OWN, CHOSEN = "F.linear", "own dense", "chosen"


def block_of(shape: shapes.ModelShape, sparsity: float, dtype: torch.dtype) -> nn.Module:
    """One layer of every size in a decoder block, the kept weights at random."""
    generator = torch.Generator().manual_seed(0)
    block, seen = nn.ModuleDict(), set()
    for layer in shape.layers:
        size = layer.out_features, layer.in_features
        if size in seen:
            continue
        seen.add(size)
        weight = torch.randn(size, generator=generator).to(dtype)
        weight.masked_fill_(torch.rand(size, generator=generator) < sparsity, 0.0)
        module = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        module.weight = nn.Parameter(weight, requires_grad=False)
        block[layer.name] = module
    return block


def candidates(module: nn.Module, weight: Tensor, x: Tensor, arena: int) -> dict[str, Callable[[int], Tensor]]:
    dense = rotate((weight,), arena)
    variants = {LINEAR: lambda number: linear(x, dense[number % len(dense)][0])}
    own = linear_dense.KERNELS[0]
    if own.refuses(Dense(weight)) is None:
        panels = rotate(own.prepare(Dense(weight)), arena)
        variants[OWN] = lambda number: own.run(x, panels[number % len(panels)], None, *weight.shape)
    if isinstance(module, SparseLinear):
        run, copies = module.kernel.run, rotate(module.kernel.prepare(module.packed), arena)
        variants[CHOSEN] = lambda number: run(x, copies[number % len(copies)], None, *weight.shape)
    return variants


def slower(timed: Alternation, than: str) -> bool:
    ratio = timed.ratio(than, CHOSEN).median
    return ratio is not None and ratio < 1 - NOISE


def row_of(name: str, module: nn.Module, weight: Tensor, tokens: int, seconds: float, arena: int) -> dict:
    """What serves a layer against both kinds of dense; F.linear itself is never slower than it was."""
    row = {"layer": name, "shape": list(weight.shape), "tokens": tokens, "kernel": LINEAR, "slower": False}
    if not isinstance(module, SparseLinear):
        return row
    variants = candidates(module, weight, random_input(tokens, weight), arena)
    timed = alternate(variants, rounds=10_000, seconds=seconds)
    if slower(timed, LINEAR):
        timed = alternate(variants, rounds=10_000, seconds=seconds)
    ratios = {other: timed.ratio(other, CHOSEN).to_json() for other in variants if other != CHOSEN}
    times = {name: timed.latency(name).to_json() for name in variants}
    kernel = f"{module.format.name} {module.kernel.name}"
    return row | {"kernel": kernel, "over": ratios, "times": times, "slower": slower(timed, LINEAR)}


def line(row: dict) -> str:
    ratios = [
        f"{ratio['median']:.2f}x ({ratio['p10']:.2f}–{ratio['p90']:.2f}) {other}"
        if ratio["median"]
        else f"no steady ratio to {other}"
        for other, ratio in row.get("over", {}).items()
    ]
    at = f"{row['layer']} {row['shape']} at {row['tokens']} tokens: {row['kernel']}"
    return ", ".join([at, *ratios]) + (": SLOWER" if row["slower"] else "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=shapes.MODELS, default="llama-3.2-1b")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--values", choices=["int8"], help="let the kept weights be rounded")
    parser.add_argument(
        "--seconds", type=float, default=0.3, help="a layer and number of tokens, of plan and check each"
    )
    parser.add_argument("--tiny", action="store_true", help="the tiny model, and nothing larger than a cache")
    chosen = parser.parse_args(arguments)
    arena = arena_bytes()
    if chosen.tiny:
        chosen.model, chosen.tokens, chosen.seconds, arena = "tiny", [1, 3], 0.01, 1 << 16
    block = block_of(shapes.find(chosen.model), chosen.sparsity, torch.bfloat16)
    weights = {name: module.weight.detach() for name, module in block.items()}
    report: SwapReport = sparsify(
        block, tokens=chosen.tokens, plan=Plan(chosen.seconds, arena), values=chosen.values, skip=()
    )
    print(report)
    rows = [
        row_of(name, block[name], weight, tokens, chosen.seconds, arena)
        for name, weight in weights.items()
        for tokens in chosen.tokens
    ]
    for row in rows:
        print(line(row), flush=True)
    asked = {"model": chosen.model, "sparsity": chosen.sparsity, "values": chosen.values}
    print(json.dumps({**asked, "machine": machine(), "noise": NOISE, "rows": rows, "swap": report.to_json()}))
    # at a tiny size every timing is chance
    return int(any(row["slower"] for row in rows) and not chosen.tiny)


if __name__ == "__main__":
    sys.exit(main())
