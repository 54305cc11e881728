"""packing: in which format a weight is packed, and what a checkpoint's writer needs to know before it packs one."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsekern.formats import Bitmap, BitmapInt8, SemiStructured
from sparsekern.formats.bitmap import DTYPES
from sparsekern.ops import bitmap_rows
from sparsekern.packed_layer import FIELDS, Packed, PackedLayer
from sparsekern.shards import Part

# what is looked at in one go: little beside a layer, and most of it in a core's cache
_CHUNK_ELEMENTS = 1 << 19


@dataclass
class PackReport:
    """What was written: `packed` layers as config.json has them, linear layers `left` as they were with the reason.

    bytes        of every tensor as it is stored
    dense_bytes  what they would take unpacked
    """

    packed: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)
    bytes: int = 0
    dense_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if not self.packed:
            return f"no layer is packed, {self.bytes:,} bytes"
        left = f", {len(self.left)} left as they were" if self.left else ""
        return (
            f"{len(self.packed)} linear layers packed{left}: {self.dense_bytes:,} -> {self.bytes:,} bytes "
            f"({self.dense_bytes / max(self.bytes, 1):.2f}x smaller)"
        )


def choose(
    weight: Tensor, to: type[Packed] | None = None, bias: torch.dtype | None = None
) -> tuple[PackedLayer, int] | str:
    """How `weight` [out_features, in_features] is packed and how many weights it keeps, or why it stays dense.

    to    the format to pack in; None takes the smaller one: bitmap, or 2:4 where that holds. Into bitmap_int8 a weight
          is rounded, with a scale a row
    bias  dtype of the layer's bias, None for none: a SparseLinear takes none but its weight's

    A format is taken where it holds and takes fewer bytes than the dense weight.
    """
    if weight.dim() != 2:
        return f"it has {weight.dim()} dimensions"
    if weight.dtype not in DTYPES:
        return f"it is {str(weight.dtype).removeprefix('torch.')}"
    if bias not in (None, weight.dtype):
        return f"its bias is {bias}, its weight {weight.dtype}"
    found = bitmap_rows.bits(weight)
    if found is None:
        return "it holds NaN or infinite values"
    bitmap, row_offsets = found
    kept = int(row_offsets[-1])
    if to is BitmapInt8:
        unrounded = PackedLayer.of(Bitmap, tuple(weight.shape), weight.dtype, kept)
        if nbytes(unrounded, kept) >= weight.nbytes:
            return "it is not pruned: only what pays as a bitmap is rounded"
        # what is rounded to zero is not kept
        kept = len(BitmapInt8.pack(weight).values)
    # the bits after the last input are 0, so half a byte may be looked at that is no group
    is_24 = weight.shape[1] % 4 == 0 and not (most_of_four(bitmap) > 2).any()
    if to is SemiStructured and not is_24:
        return "it is not 2:4"
    formats = (to,) if to else (SemiStructured, Bitmap) if is_24 else (Bitmap,)
    layers = [PackedLayer.of(format, tuple(weight.shape), weight.dtype, kept) for format in formats]
    layer = min(layers, key=lambda layer: nbytes(layer, kept))
    if (packed := nbytes(layer, kept)) >= weight.nbytes:
        return f"as {layer.format.name} it would take {packed:,} bytes, dense {weight.nbytes:,}"
    return layer, kept


def pack(weight: Tensor, format: type[Packed]) -> Packed:
    """What format.pack does, taking little memory beside its result: by a kernel, or some rows at a time."""
    if format is Bitmap:
        return bitmap_rows.pack(weight.detach())
    if format is BitmapInt8:
        return BitmapInt8.pack(weight)
    chunks = [format.pack(rows) for rows in _by_rows(weight.detach())]
    fields = {field: torch.cat([getattr(chunk, field) for chunk in chunks]) for field in FIELDS[format]}
    return format(**fields, in_features=weight.shape[1])


def most_of_four(bitmap: Tensor) -> Tensor:
    """The larger number of ones among the two halves of every byte, uint8 as `bitmap`."""
    pairs = bitmap - ((bitmap >> 1) & 0x55)
    halves = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return torch.maximum(halves & 0x0F, halves >> 4)


def nbytes(layer: PackedLayer, kept: int) -> int:
    """What a layer takes that keeps `kept` weights."""
    return Part(layer.tensors(kept), dict).nbytes


def fields_of(name: str, packed: Packed) -> Mapping[str, Tensor]:
    """The tensors of the layer `name` as they are stored."""
    return {f"{name}.{field}": getattr(packed, field) for field in FIELDS[type(packed)]}


def part_of(name: str, layer: PackedLayer, kept: int, make: Callable[[], Packed]) -> Part:
    """The part that `make`, which returns the packed weight, will make."""
    tensors = {f"{name}.{field}": what for field, what in layer.tensors(kept).items()}
    return Part(tensors, lambda: fields_of(name, make()))


def _by_rows(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(_CHUNK_ELEMENTS // max(weight.shape[1], 1), 1))
