"""conversions: pruning by a mask, packing, unpacking, checking, a kernel's own order and back, expansion to dense.

Beside each time stand the bytes that must be read and written once, so that the report can say what share of the
copy's bandwidth that is. What asks the card a question on the way (is it 2:4? finite?) waits for the answer.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from card.clock import time_variants
from card.layers import keep_two_of_four, prune_at_random, random_weight
from card.worker import Case, Json, Setting, errors_of
from sparsekern import ops
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import LINEAR_KERNELS
from sparsekern.ops.kernel import Kernel
from sparsekern.pattern import NM, Unstructured

SHAPES = ((14336, 4096), (4096, 4096))


def cases(setting: Setting) -> Iterator[Case]:
    for shape in [(48, 256)] if setting.tiny else SHAPES:
        for format in (SemiStructured, Bitmap):
            yield Case(
                f"{format.name} {shape[0]}x{shape[1]}",
                lambda format=format, shape=shape: measure(format, shape, setting),
            )


def measure(format: type, shape: tuple[int, int], setting: Setting) -> Iterator[Json]:
    """One row: each conversion of a weight of this shape, checked to come back bit for bit."""
    weight = random_weight(shape, setting)
    pruned = keep_two_of_four(weight) if format is SemiStructured else prune_at_random(weight, 0.5)
    packed = ops.pack(pruned, format)
    if not torch.equal(ops.to_dense(packed), pruned):
        raise RuntimeError(f"{format.name}: what was packed does not come back")
    saliency = weight.float().square()
    pattern = NM(2, 4) if format is SemiStructured else Unstructured(0.5, "layer")
    variants = {
        "copy": lambda _: pruned.clone(),
        "prune mask": lambda _: pattern.mask(saliency),
        "pack": lambda _: ops.pack(pruned, format),
        "to_dense": lambda _: ops.to_dense(packed),
        "validate": lambda _: ops.validate(packed),
    }
    both = pruned.nbytes + packed.nbytes
    work = {
        "copy": 2 * pruned.nbytes,
        "prune mask": saliency.nbytes + saliency.numel(),
        "pack": both,
        "to_dense": both,
        "validate": packed.nbytes,
    }
    seen, wrong = set(), {}
    for kernel in LINEAR_KERNELS[format]:
        # two kernels may read the same order
        if kernel.name == "reference" or kernel.prepare in seen or kernel.refuses(packed):
            continue
        seen.add(kernel.prepare)
        made: list[tuple[Tensor, ...]] = []
        if failed := dict(errors_of({kernel.name: partial(_prepare, kernel, packed, pruned, made)})):
            wrong |= failed
            continue
        operands = made[0]
        variants |= {
            f"{kernel.name} prepare": lambda _, kernel=kernel: kernel.prepare(packed),
            f"{kernel.name} restore": lambda _, kernel=kernel, operands=operands: kernel.restore(operands, *shape),
            f"{kernel.name} expand": lambda _, kernel=kernel, operands=operands: _expand(kernel, operands, shape),
        }
        nbytes = sum(operand.nbytes for operand in operands)
        work |= {
            f"{kernel.name} prepare": packed.nbytes + nbytes,
            f"{kernel.name} restore": packed.nbytes + nbytes,
            f"{kernel.name} expand": pruned.nbytes + nbytes,
        }
    timed = time_variants(variants, "copy", setting, seconds=4.0, capture=False).to_json()
    timed["errors"] = {**wrong, **timed["errors"]}
    yield {
        "format": format.name,
        "out_features": shape[0],
        "in_features": shape[1],
        "dtype": str(weight.dtype).removeprefix("torch."),
        "work": work,
        **timed,
    }


def _prepare(kernel: Kernel, packed: SemiStructured | Bitmap, pruned: Tensor, to: list[tuple[Tensor, ...]]) -> None:
    """Add what the kernel reads. Raises RuntimeError unless it is the weight that was packed."""
    operands = kernel.prepare(packed)
    if not torch.equal(_expand(kernel, operands, pruned.shape), pruned):
        raise RuntimeError("the expanded weight is another one")
    to.append(operands)


def _expand(kernel: Kernel, operands: tuple[Tensor, ...], shape: tuple[int, int]) -> Tensor:
    return kernel.dense(operands, *shape)
