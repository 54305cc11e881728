"""packing: the kernels that make masks, pack, unpack and reorder, by themselves; conversions has what calls them.

Captured, so that neither the host nor what is asked of the card on the way counts. Beside each time stand the bytes
that the kernel must read and write once; a bitmap's dense weight is read by two kernels, each of which counts it.
Torch's operations that do the same stand beside them. A kernel whose results are not the reference's is not timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from card.clock import time_variants
from card.layers import keep_two_of_four, prune_at_random, random_weight
from card.worker import Case, Json, Setting, errors_of
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import bitmap_fragments, compiled, fragments_24, keep_largest

SHAPES = ((14336, 4096), (4096, 4096))
TORCH = "torch "
# of a row: torch's operations take milliseconds
MOST_SECONDS = 3.0
OPS = torch.ops.sparsekern


@dataclass(frozen=True)
class Variant:
    """nbytes: read and written once. expected: its first results; () where it is the reference."""

    call: Callable[[], object]
    nbytes: int
    expected: tuple[Tensor, ...] = ()

    def check(self) -> None:
        """Raises RuntimeError unless its results are those expected."""
        found = self.call() if self.expected else ()
        for got, wanted in zip((found,) if isinstance(found, Tensor) else found, self.expected, strict=False):
            if not torch.equal(got, wanted):
                raise RuntimeError(f"the result [{', '.join(map(str, got.shape))}] is not the reference's")


Variants = dict[str, Variant]


def cases(setting: Setting) -> Iterator[Case]:
    for shape in [(48, 256)] if setting.tiny else SHAPES:
        for name, variants in (("2:4", of_24), ("bitmap", of_bitmap)):
            yield Case(
                f"{name} {shape[0]}x{shape[1]}",
                lambda name=name, variants=variants, shape=shape: measure(name, variants, shape, setting),
            )


def measure(name: str, variants: Callable, shape: tuple[int, int], setting: Setting) -> Iterator[Json]:
    """One row: each variant's time and bytes."""
    weight = random_weight(shape, setting)
    target = torch.empty_like(weight)
    found: Variants = {"copy": Variant(lambda: target.copy_(weight), 2 * weight.nbytes)}
    found |= variants(weight, setting.device == "cpu" or compiled.why_not("cuda") is not None)
    wrong = dict(errors_of({each: variant.check for each, variant in found.items()}))
    calls = {each: lambda _, variant=variant: variant.call() for each, variant in found.items() if each not in wrong}
    timed = time_variants(calls, "copy", setting, seconds=MOST_SECONDS).to_json()
    timed["errors"] = {**wrong, **timed["errors"]}
    yield {
        "format": name,
        "out_features": shape[0],
        "in_features": shape[1],
        "dtype": str(weight.dtype).removeprefix("torch."),
        "work": {each: variant.nbytes for each, variant in found.items()},
        **timed,
    }


def of_24(weight: Tensor, without_kernels: bool) -> Variants:
    """Of 2:4: the mask from saliencies, pack and unpack, the order of mma.sp and back to dense."""
    dense = keep_two_of_four(weight)
    packed = SemiStructured.pack(dense)
    saliency = weight.float().square().view(-1, 4)
    kept = torch.full((1,), 2, device=weight.device).expand(len(saliency))
    mask_bytes, pack_bytes = saliency.nbytes + saliency.numel(), dense.nbytes + packed.nbytes
    variants: Variants = {
        f"{TORCH}mask": Variant(lambda: keep_largest.reference(saliency, kept), mask_bytes),
        f"{TORCH}pack": Variant(lambda: SemiStructured.pack(dense), pack_bytes),
        f"{TORCH}unpack": Variant(packed.to_dense, pack_bytes),
    }
    if without_kernels:
        return variants
    operands = fragments_24.reference(packed)
    order_bytes = sum(operand.nbytes for operand in operands)
    kernels: Variants = {
        "mask": Variant(
            lambda: OPS.keep_largest(saliency, kept), mask_bytes, (keep_largest.reference(saliency, kept),)
        ),
        "pack": Variant(lambda: OPS.pack_24(dense), pack_bytes, (packed.values, packed.metadata)),
        "unpack": Variant(lambda: OPS.unpack_24(packed.values, packed.metadata, dense.shape[1]), pack_bytes, (dense,)),
        "fragments": Variant(
            lambda: OPS.fragments_24(packed.values, packed.metadata, dense.shape[1]),
            packed.nbytes + order_bytes,
            operands,
        ),
        "fragments to dense": Variant(
            lambda: OPS.fragments_24_to_dense(*operands, *dense.shape), order_bytes + dense.nbytes, (dense,)
        ),
    }
    return kernels | variants


def of_bitmap(weight: Tensor, without_kernels: bool) -> Variants:
    """Of a bitmap at 50 %: its bits, its values, and back; the order of the tensor cores, and from there to dense."""
    dense = prune_at_random(weight, 0.5)
    packed = Bitmap.pack(dense)
    both = dense.nbytes + packed.nbytes
    variants: Variants = {
        f"{TORCH}pack": Variant(lambda: Bitmap.pack(dense), both),
        f"{TORCH}unpack": Variant(packed.to_dense, both),
    }
    if without_kernels:
        return variants
    bits, offsets, values = packed.bitmap, packed.row_offsets, packed.values
    masks, cells, quad_rows, capacity = operands = bitmap_fragments.reference(packed)
    quads = quad_rows.diff()
    kernels: Variants = {
        "bits": Variant(
            lambda: OPS.bitmap_bits(dense), dense.nbytes + bits.nbytes + offsets.nbytes, (bits, offsets.diff())
        ),
        "values": Variant(lambda: OPS.bitmap_values(dense, bits, offsets, len(values)), both, (values,)),
        "unpack": Variant(lambda: OPS.bitmap_to_dense(values, bits, offsets, dense.shape[1]), both, (dense,)),
        "masks": Variant(
            lambda: OPS.bitmap_fragments_masks(bits, dense.shape[1]),
            bits.nbytes + masks.nbytes + quads.nbytes,
            (masks, quads),
        ),
        "cells": Variant(
            lambda: OPS.bitmap_fragments_cells(dense, masks, quad_rows, len(cells)),
            dense.nbytes + masks.nbytes + cells.nbytes,
            (cells,),
        ),
        "fragments to dense": Variant(
            lambda: bitmap_fragments.to_dense(operands, *dense.shape),
            masks.nbytes + cells.nbytes + dense.nbytes,
            (dense,),
        ),
    }
    return kernels | variants
