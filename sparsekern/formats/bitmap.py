"""Bitmap: any weight with zeros, one bit a weight to say where, the kept values behind each other.

    bytes = kept * itemsize + out_features * ceil(in_features / 8) + 8 * (out_features + 1)

The order here is the saved one: rows from the top, inputs from the left. A kernel's own order is made on load.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Bitmap:
    """A weight [out_features, in_features] without its zeros.

    values       [kept] bfloat16, float16 or float32
    bitmap       [out_features, ceil(in_features / 8)] uint8, bit i % 8 of byte i // 8 is input i, 1 = kept
    row_offsets  [out_features + 1] int64, row o holds values[row_offsets[o] : row_offsets[o + 1]]
    in_features  the bits after them are 0
    """

    name: ClassVar[str] = "bitmap"

    values: Tensor
    bitmap: Tensor
    row_offsets: Tensor
    in_features: int

    @classmethod
    def pack(cls, weight: Tensor) -> "Bitmap":
        """Pack `weight` [out_features, in_features]; what is zero is pruned, -0.0 too.

        Raises ValueError for another dtype, another number of dimensions, and NaN or infinite weights.
        """
        if weight.dim() != 2:
            raise ValueError(f"weight must have 2 dimensions, got shape {list(weight.shape)}")
        if weight.dtype not in DTYPES:
            raise ValueError(f"weight must be bfloat16, float16 or float32, got {weight.dtype}")
        weight = weight.detach()
        kept = weight != 0
        values = weight[kept]
        # zeros are finite, so the kept values tell
        if missing := int((~values.isfinite()).sum()):
            raise not_finite(missing, *(weight.isfinite().logical_not_()).nonzero()[0].tolist())
        row_offsets = torch.zeros(len(weight) + 1, dtype=torch.int64, device=weight.device)
        torch.cumsum(kept.sum(dim=1), dim=0, out=row_offsets[1:])
        return cls(values, pack_bits(kept), row_offsets, weight.shape[1])

    def to_dense(self) -> Tensor:
        """The weight [out_features, in_features], zeros as +0.0."""
        dense = self.values.new_zeros(self.shape)
        return dense.masked_scatter_(self.kept(), self.values)

    def kept(self) -> Tensor:
        """True where a weight is kept [out_features, in_features] bool."""
        return unpack_bits(self.bitmap, self.in_features)

    def validate_sizes(self) -> None:
        """The part of `validate` that reads no element: shapes, dtypes, devices."""
        if self.values.dim() != 1 or self.values.dtype not in DTYPES:
            raise ValueError(
                "values must be [kept] of bfloat16, float16 or float32, "
                f"got {list(self.values.shape)} of {self.values.dtype}"
            )
        if self.row_offsets.dim() != 1 or self.row_offsets.dtype != torch.int64 or not len(self.row_offsets):
            raise ValueError(
                "row_offsets must be [out_features + 1] of int64, "
                f"got {list(self.row_offsets.shape)} of {self.row_offsets.dtype}"
            )
        if self.in_features < 0:
            raise ValueError(f"in_features must not be negative, got {self.in_features}")
        size = [len(self.row_offsets) - 1, -(-self.in_features // 8)]
        if list(self.bitmap.shape) != size or self.bitmap.dtype != torch.uint8:
            raise ValueError(
                f"bitmap must be {size} of uint8, got {list(self.bitmap.shape)} of {self.bitmap.dtype}: "
                "one row for every row_offsets but the last, one bit an input"
            )
        if len({self.values.device, self.bitmap.device, self.row_offsets.device}) > 1:
            raise ValueError(
                "values, bitmap and row_offsets must be on one device, "
                f"got {self.values.device}, {self.bitmap.device} and {self.row_offsets.device}"
            )

    def validate_shapes(self) -> None:
        """The part of `validate` that looks at no row: its sizes, and where the offsets start and end."""
        self.validate_sizes()
        first, last = self.row_offsets[0].item(), self.row_offsets[-1].item()
        if first != 0 or last != len(self.values):
            raise ValueError(f"row_offsets must run from 0 to the {len(self.values)} values, got {first} to {last}")

    def validate(self) -> None:
        """Raises ValueError when the parts contradict each other: a kernel would read past the values."""
        self.validate_shapes()
        counts = self.row_offsets.diff()
        if (counts < 0).any():
            row = int((counts < 0).nonzero()[0])
            raise ValueError(f"row_offsets must not fall, got {self.row_offsets[row : row + 2].tolist()} at row {row}")
        if used := self.in_features % 8:
            outside = (self.bitmap[:, -1] >> used) != 0
            if outside.any():
                raise ValueError(
                    f"bitmap must be 0 after input {self.in_features - 1}, got ones in row {int(outside.nonzero()[0])}"
                )
        ones = popcount(self.bitmap).sum(dim=1)
        if (ones != counts).any():
            row = int((ones != counts).nonzero()[0])
            raise ValueError(
                f"bitmap keeps {int(ones[row])} weights in row {row}, row_offsets say {int(counts[row])} "
                f"({int((ones != counts).sum())} rows like this)"
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.row_offsets) - 1, self.in_features))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.bitmap.nbytes + self.row_offsets.nbytes


def not_finite(missing: int, row: int, column: int) -> ValueError:
    """What is wrong with a weight of which `missing` values are not finite, the first of them in this place."""
    return ValueError(f"weight holds {missing} NaN or infinite values, the first in row {row}, column {column}")


def pack_bits(kept: Tensor) -> Tensor:
    """Bools [..., n] as bits [..., ceil(n / 8)] uint8, low bit first, zero after the last."""
    size = -(-kept.shape[-1] // 8)
    bits = F.pad(kept.to(torch.uint8), (0, size * 8 - kept.shape[-1])).view(*kept.shape[:-1], size, 8)
    packed = torch.zeros(bits.shape[:-1], dtype=torch.uint8, device=kept.device)
    for bit in range(8):
        packed |= bits[..., bit] << bit
    return packed


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of pack_bits: bits [..., ceil(n / 8)] uint8 as bools [..., n]."""
    bits = torch.empty((*packed.shape, 8), dtype=torch.bool, device=packed.device)
    for bit in range(8):
        bits[..., bit] = (packed >> bit) & 1
    return bits.flatten(-2)[..., :n]


def popcount(packed: Tensor) -> Tensor:
    """The ones in every byte, uint8 as `packed`."""
    pairs = packed - ((packed >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F
