"""calls: what a call costs before and after its arithmetic: y = x W^T of one token with a weight that takes no time.

    python bench/calls.py                     16 x 32, every format's kernels, on one thread
    python bench/calls.py --shape 4096 32     what grows with the outputs: the checks of every panel, and y
    python bench/calls.py --tiny              a second on any CPU

Each kernel is called as a layer calls it, and through its layer; F.linear and nn.Linear are what they stand in for. A
sample is a thousand calls, and the variants alternate. Results are compared with float64 first. The last line of stdout
is the result as JSON.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sparsekern.baselines import PREPACKED
from sparsekern.formats import Bitmap, BitmapInt8, Dense, SemiStructured
from sparsekern.linear import SparseLinear
from sparsekern.measure import machine
from sparsekern.ops import LINEAR_KERNELS, pack
from sparsekern.pattern import as_pattern
from sparsekern.timing import alternate

FORMATS = (Bitmap, SemiStructured, BitmapInt8, Dense)
LINEAR, LAYER = "F.linear", "nn.Linear"
RELATIVE_ERROR = 1e-2


def check(y: Tensor, x: Tensor, weight: Tensor, who: str) -> None:
    """Raises RuntimeError when `who` computes something else than float64 does."""
    exact = linear(x.double(), weight.double())
    error = float((y.double() - exact).norm() / exact.norm())
    if not error < RELATIVE_ERROR:
        raise RuntimeError(f"{who} is wrong by {error:.1e}")


def variants_of(shape: tuple[int, int]) -> dict[str, Callable[[], Tensor]]:
    """What is called, by name, each checked once."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    # so that every format holds it, and the kernels for few weights serve too
    weight = weight.where(as_pattern("2:4").mask(weight.abs()) & (torch.rand(shape) < 0.2), 0.0).bfloat16()
    x = torch.randn(1, shape[1]).bfloat16()
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    found: dict[str, Callable[[], Tensor]] = {LINEAR: lambda: linear(x, weight), LAYER: lambda: layer(x)}
    if PREPACKED.refuses(weight) is None:
        prepacked = PREPACKED.prepare(weight, None, 1)
        found[PREPACKED.name] = lambda: PREPACKED.run(x, prepacked, None)
    for name, call in found.items():
        check(call(), x, weight, name)
    for format in FORMATS:
        packed = Dense(weight) if format is Dense else pack(weight, format)
        for kernel in LINEAR_KERNELS[format]:
            if kernel.name == "reference" or kernel.refuses(packed) is not None:
                continue
            operands, sparse = kernel.prepare(packed), SparseLinear(packed, None, kernel)
            name = f"{format.name} {kernel.name}"
            found[name] = lambda run=kernel.run, operands=operands: run(x, operands, None, *shape)
            found[f"{name}, its layer"] = lambda sparse=sparse: sparse(x)
            for which in (name, f"{name}, its layer"):
                check(found[which](), x, packed.to_dense(), which)
    return found


def repeated(call: Callable[[], Tensor], times: int) -> Callable[[int], None]:
    def sample(_: int) -> None:
        for _ in range(times):
            call()

    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[16, 32], metavar=("OUT", "IN"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=1000, help="in a sample")
    parser.add_argument("--tiny", action="store_true", help="few calls")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.rounds, arguments.calls = 8, 10
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        variants = variants_of(tuple(arguments.shape))
        timed = alternate(
            {name: repeated(call, arguments.calls) for name, call in variants.items()}, rounds=arguments.rounds
        )
    rows = []
    for name in variants:
        baseline = LAYER if name.endswith("its layer") else LINEAR
        latency, ratio = timed.latency(name), timed.ratio(name, baseline)
        us = latency.median / arguments.calls * 1e6
        rows.append({"name": name, "us": us, f"over_{baseline}": ratio.to_json()})
        share = "" if name in (LINEAR, LAYER) or not ratio.median else f", {ratio.median:.1f}x {baseline}"
        print(f"{name}: {us:.2f} us a call{share}", flush=True)
    print(json.dumps({"machine": machine(), "shape": arguments.shape, "calls": arguments.calls, "rows": rows}))


if __name__ == "__main__":
    main()
