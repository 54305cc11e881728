"""linear: y = x W^T with a packed weight against torch's own linear and our own dense one, after the results agree.

    python bench/linear.py --shape 4096 4096 --tokens 1 16 64 --sparsity 0.5 0.7 0.9 --format bitmap
    python bench/linear.py --tokens 1 --isa avx512_bf16 avx512 avx512bw avx2     each set, and its own dense
    python bench/linear.py --tiny                                    a second on any CPU

Every compiled kernel of the format is a candidate, and so are F.linear, oneDNN with prepacked weights and our own dense
panels. All read a copy of their weight that no cache holds any more: the copies, in pages of 2 MB, rotate through an
arena of four caches. The bandwidth is that of stream_read, in the same rounds, over as many bytes as the first kernel
reads. "own dense" is the share of the gain that is not from sparsity. The last line of stdout is the result as JSON.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from sparsekern.baselines import LINEAR, PREPACKED
from sparsekern.formats import Bitmap, BitmapInt8, SemiStructured
from sparsekern.formats.dense import Dense
from sparsekern.measure import machine
from sparsekern.ops import LINEAR_KERNELS, compiled, linear_dense, pack, stream_read, to_dense
from sparsekern.ops.kernel import pick
from sparsekern.pattern import as_pattern
from sparsekern.timing import alternate, arena_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FORMATS = {format.name: format for format in (Bitmap, SemiStructured, BitmapInt8)}
RELATIVE_ERROR = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}
OWN, READ = "own dense", "read"


def copies(operands: tuple[torch.Tensor, ...], arena: int) -> list[tuple[torch.Tensor, ...]]:
    """As many copies of the operands as fill the arena, two at least."""
    count = max(2, math.ceil(arena / max(1, sum(operand.nbytes for operand in operands))))
    return [tuple(map(compiled.copy, operands)) for _ in range(count)]


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, who: str) -> None:
    """Raises RuntimeError when `who` computes something else than float64 does."""
    exact = linear(x.double(), weight.double())
    error = float((y.double() - exact).norm() / exact.norm())
    if not error < RELATIVE_ERROR[x.dtype]:
        raise RuntimeError(f"{who} is wrong by {error:.1e}")


def candidates(
    x: torch.Tensor, weight: torch.Tensor, packed: object, arena: int
) -> tuple[dict[str, Callable[[int], object]], list[str]]:
    """What is timed, by name, each checked once; and the names of the kernels of the format."""
    variants, kernels, first_bytes = {}, [], 0
    for kernel in LINEAR_KERNELS[type(packed)]:
        if kernel.name == "reference" or kernel.refuses(packed) is not None:
            continue
        operands = kernel.prepare(packed)
        turns = itertools.cycle(copies(operands, arena))
        check(kernel.run(x, operands, None, *packed.shape), x, to_dense(packed), kernel.name)
        variants[kernel.name] = lambda _, run=kernel.run, turns=turns: run(x, next(turns), None, *packed.shape)
        kernels.append(kernel.name)
        first_bytes = first_bytes or sum(operand.nbytes for operand in operands)
    if not kernels:
        raise RuntimeError(f"only the reference serves {packed.name} in {x.dtype} here")
    for dense in (LINEAR, PREPACKED):
        if dense.refuses(weight) is None:
            count = max(2, math.ceil(arena / weight.nbytes))
            turns = itertools.cycle([dense.prepare(weight, None, len(x)) for _ in range(count)])
            check(dense.run(x, next(turns), None), x, weight, dense.name)
            variants[dense.name] = lambda _, run=dense.run, turns=turns: run(x, next(turns), None)
    own = linear_dense.KERNELS[0]
    if own.refuses(Dense(weight)) is None:
        turns = itertools.cycle(copies(own.prepare(Dense(weight)), arena))
        check(own.run(x, next(turns), None, *packed.shape), x, weight, OWN)
        variants[OWN] = lambda _: own.run(x, next(turns), None, *packed.shape)
    reader, threads = pick(stream_read.KERNELS, weight), torch.get_num_threads()
    reads = itertools.cycle(copies((torch.zeros(first_bytes, dtype=torch.uint8),), arena))
    variants[READ] = lambda _: reader.run(*next(reads), threads)
    return variants, kernels


def measure(shape, tokens: int, sparsity: float, format: type, dtype: torch.dtype, rounds: int, arena: int) -> dict:
    """One row: times in seconds, ratios of the rounds."""
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    pattern = as_pattern("2:4" if format is SemiStructured else sparsity)
    pruned = weight.masked_fill(~pattern.mask(torch.rand(shape)), 0.0)
    x = torch.randn(tokens, shape[1]).to(dtype)
    variants, kernels = candidates(x, weight, pack(pruned, format), arena)
    timed = alternate(variants, rounds=rounds)
    baselines = [name for name in (LINEAR.name, PREPACKED.name) if name in variants]
    best = min(baselines, key=lambda name: timed.latency(name).median)
    # the kernel that is fastest, as a plan would choose
    kernel = min(kernels, key=lambda name: timed.latency(name).median)
    return {
        "shape": list(shape),
        "tokens": tokens,
        "sparsity": pattern.sparsity,
        "format": format.name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "instruction_set": compiled.instruction_set(),
        "kernel": kernel,
        "best_torch": best,
        "times": {name: timed.latency(name).to_json() for name in variants},
        "over_own_dense": timed.ratio(OWN, kernel).to_json() if OWN in variants else None,
        "over_best_torch": timed.ratio(best, kernel).to_json(),
        "over_linear": timed.ratio(LINEAR.name, kernel).to_json(),
        "own_dense_over_best_torch": timed.ratio(best, OWN).to_json() if OWN in variants else None,
        # reading the first kernel's bytes is the floor of that kernel
        "share_of_read": timed.ratio(READ, kernels[0]).to_json() if kernel == kernels[0] else None,
    }


def line(row: dict) -> str:
    """A row in words."""
    ratios = {
        "own dense": row["over_own_dense"],
        row["best_torch"]: row["over_best_torch"],
        "F.linear": row["over_linear"],
    }
    parts = [f"{row['format']} {row['sparsity']:.0%} {row['shape']} {row['tokens']} tokens, {row['threads']} threads"]
    parts.append(f"{row['kernel']} ({row['instruction_set']}) {row['times'][row['kernel']]['median'] * 1e6:.0f} us")
    for name, ratio in ratios.items():
        if ratio is not None:
            parts.append(f"{ratio['median']:.2f}x {name}" if ratio["median"] else f"no ratio to {name}")
    if (share := row["share_of_read"]) is not None and share["median"]:
        parts.append(f"{share['median']:.0%} of the read bandwidth")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5])
    parser.add_argument("--format", choices=FORMATS, nargs="+", default=["bitmap"])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--isa", nargs="+", default=[None], help="instruction sets, each timed on its own")
    parser.add_argument("--threads", type=int, help="torch's own choice when left out")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--tiny", action="store_true", help="one small shape, few rounds, nothing larger than a cache")
    arguments = parser.parse_args()
    arena = arena_bytes()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.tiny:
        arguments.shape, arguments.tokens, arguments.rounds, arena = [64, 100], [1, 3], 8, 1 << 16
        arguments.format = list(FORMATS)
    rows = []
    for isa, name, sparsity, tokens in itertools.product(
        arguments.isa, arguments.format, arguments.sparsity, arguments.tokens
    ):
        with compiled.using(isa):
            kind = DTYPES[arguments.dtype]
            row = measure(tuple(arguments.shape), tokens, sparsity, FORMATS[name], kind, arguments.rounds, arena)
        rows.append(row)
        print(line(row), flush=True)
    print(json.dumps({"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
