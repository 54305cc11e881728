"""Operations: each file holds the contract, the reference in plain torch, and KERNELS, best first."""

from torch import Tensor

from sparsekern.formats import Bitmap, BitmapInt8, Dense, SemiStructured
from sparsekern.ops import (
    bitmap_rows,
    compiled,
    linear_24,
    linear_bitmap,
    linear_bitmap_index,
    linear_bitmap_int8,
    linear_bitmap_int8_index,
    linear_dense,
    pack_24,
)

Packed = SemiStructured | Bitmap | BitmapInt8 | Dense

# the kernels that serve a linear layer packed in each format
LINEAR_KERNELS = {
    SemiStructured: linear_24.KERNELS,
    # the reference stays last
    Bitmap: (*linear_bitmap.KERNELS[:-1], *linear_bitmap_index.KERNELS, linear_bitmap.KERNELS[-1]),
    BitmapInt8: (*linear_bitmap_int8.KERNELS[:-1], *linear_bitmap_int8_index.KERNELS, linear_bitmap_int8.KERNELS[-1]),
    Dense: linear_dense.KERNELS,
}

# of the formats whose conversion is an op, the op; the others convert themselves
_CONVERSIONS = {Bitmap: bitmap_rows, SemiStructured: pack_24}


def pack(weight: Tensor, format: type[Packed]) -> Packed:
    """format.pack(weight), by the best kernel. Raises ValueError when the format cannot hold `weight`."""
    return _CONVERSIONS.get(format, format).pack(weight)


def to_dense(packed: Packed) -> Tensor:
    """packed.to_dense(), by the best kernel."""
    return _CONVERSIONS.get(type(packed), type(packed)).to_dense(packed)


def validate(packed: Packed) -> None:
    """packed.validate(), by the best kernel. Raises ValueError when the parts of `packed` contradict each other."""
    _CONVERSIONS.get(type(packed), type(packed)).validate(packed)


__all__ = ["LINEAR_KERNELS", "compiled", "pack", "to_dense", "validate"]
