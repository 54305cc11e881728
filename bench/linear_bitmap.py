"""linear_bitmap: y = x W^T with a bitmap weight against torch's own linear and ours, after the results agree.

    python bench/linear_bitmap.py --shape 4096 4096 --tokens 1 4 16 --sparsity 0.5
    python bench/linear_bitmap.py --tokens 1 --isa avx512_bf16 avx512 avx512bw avx2     each set, and its own dense
    python bench/linear_bitmap.py --tiny                                    a second on any CPU

All read a copy of their weight that no cache holds any more: the copies rotate through an arena of four caches. The
bandwidth is that of stream_read, in the same rounds. The last line of stdout is the result as JSON.
"""

import argparse
import itertools
import json
import math

import torch
from torch.nn.functional import linear

from sparsekern.formats import Bitmap
from sparsekern.formats.dense import Dense
from sparsekern.measure import machine
from sparsekern.ops import compiled, linear_bitmap, linear_dense, stream_read
from sparsekern.ops.kernel import pick
from sparsekern.timing import alternate, arena_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RELATIVE_ERROR = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}


def copies(operands: tuple[torch.Tensor, ...], arena: int) -> list[tuple[torch.Tensor, ...]]:
    """As many copies of the operands as fill the arena, two at least."""
    count = max(2, math.ceil(arena / max(1, sum(operand.nbytes for operand in operands))))
    return [tuple(operand.clone() for operand in operands) for _ in range(count)]


def measure(shape: tuple[int, int], tokens: int, sparsity: float, dtype: torch.dtype, rounds: int, arena: int) -> dict:
    """One row: times in seconds, ratios of the rounds, bytes a second."""
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    pruned = weight.masked_fill(torch.rand(shape) < sparsity, 0.0)
    x = torch.randn(tokens, shape[1]).to(dtype)
    packed = Bitmap.pack(pruned)
    kernel = pick(linear_bitmap.KERNELS, packed)
    operands = kernel.prepare(packed)

    y, exact = kernel.run(x, operands, None, *shape).double(), linear(x.double(), pruned.double())
    error = float((y - exact).norm() / exact.norm())
    assert error < RELATIVE_ERROR[dtype], f"{kernel.name} is wrong by {error:.1e}"

    dense_turns, sparse_turns = itertools.cycle(copies((weight,), arena)), itertools.cycle(copies(operands, arena))
    sparse_bytes = sum(operand.nbytes for operand in operands)
    reader = pick(stream_read.KERNELS, weight)
    reads = itertools.cycle(copies((torch.zeros(sparse_bytes, dtype=torch.uint8),), arena))
    threads = torch.get_num_threads()
    variants = {
        "dense": lambda _: linear(x, *next(dense_turns)),
        "sparse": lambda _: kernel.run(x, next(sparse_turns), None, *shape),
        "read": lambda _: reader.run(*next(reads), threads),
    }
    own = linear_dense.KERNELS[0]
    if own.refuses(Dense(weight)) is None:
        own_turns = itertools.cycle(copies(own.prepare(Dense(weight)), arena))
        variants["own_dense"] = lambda _: own.run(x, next(own_turns), None, *shape)
    timed = alternate(variants, rounds=rounds)
    return {
        "shape": list(shape),
        "tokens": tokens,
        "sparsity": sparsity,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "kernel": kernel.name,
        "instruction_set": compiled.instruction_set(),
        "error": error,
        "dense_bytes": weight.nbytes,
        "sparse_bytes": sparse_bytes,
        **{name: timed.latency(name).to_json() for name in variants},
        "speedup": timed.ratio("dense", "sparse").to_json(),
        "over_own_dense": timed.ratio("own_dense", "sparse").to_json() if "own_dense" in variants else None,
        # reading the same number of bytes is the floor
        "share_of_read": timed.ratio("read", "sparse").to_json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--isa", nargs="+", default=[None], help="instruction sets, each timed on its own")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--tiny", action="store_true", help="one small shape, few rounds, nothing larger than a cache")
    arguments = parser.parse_args()
    arena = arena_bytes()
    if arguments.tiny:
        arguments.shape, arguments.tokens, arguments.rounds, arena = [64, 100], [1, 3], 8, 1 << 16
    rows = []
    for isa, sparsity, tokens in itertools.product(arguments.isa, arguments.sparsity, arguments.tokens):
        with compiled.using(isa):
            row = measure(tuple(arguments.shape), tokens, sparsity, DTYPES[arguments.dtype], arguments.rounds, arena)
        rows.append(row)
        speedup, own, share = row["speedup"], row["over_own_dense"], row["share_of_read"]
        print(
            f"{sparsity:.0%} {tokens} tokens: dense {row['dense']['median'] * 1e6:.0f} us, "
            f"{row['kernel']} ({row['instruction_set']}) {row['sparse']['median'] * 1e6:.0f} us; "
            + (f"{speedup['median']:.2f}x" if speedup["median"] else f"no ratio: {speedup['reason']}")
            + (f", {own['median']:.2f}x own dense" if own and own["median"] else "")
            + (f", {share['median']:.0%} of reading as many bytes" if share["median"] else "")
        )
    print(json.dumps({"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
