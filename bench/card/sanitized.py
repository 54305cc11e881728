"""sanitized: every CUDA op at small and awkward sizes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck  python bench/card/sanitized.py
    compute-sanitizer --tool racecheck python bench/card/sanitized.py
    python bench/card/sanitized.py --device cpu          the same on the CPU's kernels, without a sanitizer

Each result is compared with float64, and a line says what was checked.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from card.clock import TOLERANCE, poisoned
from sparsekern import ops
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import LINEAR_KERNELS, keep_largest, obs_blocks, obs_sweep
from sparsekern.ops.kernel import pick
from sparsekern.pattern import NM

# sizes that divide nothing, one that fills whole tiles, and one whose outputs blocks share
SHAPES = ((37, 100), (16, 32), (129, 300), (64, 512), (40, 6160))
TOKENS = (1, 3, 8, 17, 65, 130)
DTYPES = (torch.bfloat16, torch.float16)


def weights(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Iterator[tuple[type, Tensor]]:
    generator = torch.Generator().manual_seed(shape[1])
    weight = torch.randn(shape, generator=generator)
    yield SemiStructured, weight.where(NM(2, 4).mask(weight.abs()), 0.0).to(device, dtype)
    yield Bitmap, weight.where(torch.rand(shape, generator=generator) < 0.4, 0.0).to(device, dtype)


def linear(device: str) -> Iterator[str]:
    """Every kernel that multiplies."""
    for shape in SHAPES:
        for dtype in DTYPES:
            for format, weight in weights(shape, dtype, device):
                packed = ops.pack(weight, format)
                assert torch.equal(ops.to_dense(packed), weight), f"{format.name} {shape}: another weight came back"
                for kernel in LINEAR_KERNELS[format]:
                    if kernel.name == "reference" or kernel.refuses(packed):
                        continue
                    operands = kernel.prepare(packed)
                    assert torch.equal(kernel.dense(operands, *shape), weight), f"{kernel.name} {shape}: another weight"
                    for tokens in TOKENS:
                        x = torch.randn(tokens, shape[1], device=device).to(dtype)
                        bias = torch.randn(shape[0], device=device).to(dtype)
                        y = kernel.run(x, operands, bias, *shape)
                        expected = x.double() @ weight.double().T + bias.double()
                        off = float((y.double() - expected).norm() / expected.norm())
                        assert off <= TOLERANCE[dtype], f"{format.name} {kernel.name} {shape} {tokens}: off by {off}"
                    yield f"{format.name} {kernel.name} {shape[0]}x{shape[1]} {dtype}"


def solver(device: str) -> Iterator[str]:
    """The sweep and the threshold of SparseGPT."""
    weight, u = torch.randn(37, 40, device=device), torch.eye(40, device=device) + 0.01
    u = u.triu().contiguous()
    mask = torch.ones_like(weight, dtype=torch.bool)
    pruned, _ = pick(obs_sweep.KERNELS, weight, u).run(weight, u, mask, (2, 4))
    assert ((pruned != 0).view(37, 10, 4).sum(2) == 2).all()
    yield "obs_sweep"
    w = weight.clone()
    obs_blocks.run(w, u, 16, obs_blocks.Choice(kept=[300, 300, 100]))
    assert int((w != 0).sum()) == 700
    yield "obs_blocks"
    saliency = weight.square().view(1, -1)
    kept = pick(keep_largest.KERNELS, saliency).run(saliency, torch.tensor([700], device=device))
    assert int(kept.sum()) == 700
    yield "keep_largest"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    with poisoned():
        for part in (linear, solver):
            for what in part(device):
                print(f"checked {what}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
