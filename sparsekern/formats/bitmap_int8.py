"""BitmapInt8: a weight with zeros, one bit a weight to say where, the kept values as integers times a scale.

    W[o, i] = v scales[o, i // group_size],  v of -127 to 127
    bytes   = kept + out_features * (ceil(in_features / 8) + 4 * groups) + 8 * (out_features + 1)

Packing rounds, to within half a step of each row's or group's grid. A weight that lies on a grid of 8 bits or fewer, as
pruning with bits leaves it, keeps its integers, and its values bit for bit.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekern import grid
from sparsekern.formats.bitmap import DTYPES, Bitmap, pack_bits, unpack_bits

LARGEST = 127
# weights that are packed in one go: their float32 and float64 copies stay small beside the weight
_CHUNK = 1 << 19
# rows that tell whether a weight lies on a grid at all
_PROBED = 16


@dataclass(frozen=True, eq=False)
class BitmapInt8:
    """A weight [out_features, in_features] without its zeros, in 8 bits.

    values       [kept] int8, -127 to 127
    scales       [out_features, groups] float32, the step of the grid, not negative
    bitmap       [out_features, ceil(in_features / 8)] uint8, as in Bitmap
    row_offsets  [out_features + 1] int64, as in Bitmap
    in_features  the bits after them are 0
    group_size   neighbouring inputs that share a row's scale; None: all of them, groups = 1
    dtype        bfloat16, float16 or float32: of x, y and the dense weight
    """

    name: ClassVar[str] = "bitmap_int8"

    values: Tensor
    scales: Tensor
    bitmap: Tensor
    row_offsets: Tensor
    in_features: int
    group_size: int | None
    dtype: torch.dtype

    @classmethod
    def pack(cls, weight: Tensor, group_size: int | None = None) -> "BitmapInt8":
        """Round `weight` [out_features, in_features] and pack it; what is rounded to zero is pruned.

        Raises ValueError for another dtype, another number of dimensions, a group_size below 1, and NaN or infinite
        weights.
        """
        if weight.dim() != 2:
            raise ValueError(f"weight must have 2 dimensions, got shape {list(weight.shape)}")
        if weight.dtype not in DTYPES:
            raise ValueError(f"weight must be bfloat16, float16 or float32, got {weight.dtype}")
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size must be at least 1 or None, got {group_size}")
        weight = weight.detach()
        if missing := int((~weight.isfinite()).sum()):
            row, column = (~weight.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"weight holds {missing} NaN or infinite values, the first in row {row}, column {column}")
        # where some rows lie on no grid the others need not be searched
        probed = _groups(weight[:: max(len(weight) // _PROBED, 1)], group_size).flatten(0, 1)
        quantised = bool(((grid.exact_scale(probed, LARGEST) > 0) | (probed == 0).all(dim=1)).all())
        step = max(_CHUNK // max(weight.shape[1], 1), 1)
        chunks = [_round(rows, group_size, quantised) for rows in weight.split(step)]
        values, scales, bitmap, counts = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        row_offsets = torch.zeros(len(weight) + 1, dtype=torch.int64, device=weight.device)
        torch.cumsum(counts, dim=0, out=row_offsets[1:])
        return cls(values, scales, bitmap, row_offsets, weight.shape[1], group_size, weight.dtype)

    def to_dense(self) -> Tensor:
        """The weight [out_features, in_features], each integer times its scale rounded to the dtype, zeros as +0.0."""
        return self.dequantised().to(self.dtype) + 0.0

    def dequantised(self) -> Tensor:
        """The weight [out_features, in_features] float32, which is what a kernel multiplies by."""
        dense = self.values.new_zeros(self.shape).masked_scatter_(self.kept(), self.values).float()
        if self.groups == 1:
            return dense.mul_(self.scales) + 0.0
        return dense.mul_(self.scales.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]) + 0.0

    def kept(self) -> Tensor:
        """True where a weight is kept [out_features, in_features] bool."""
        return unpack_bits(self.bitmap, self.in_features)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "BitmapInt8":
        """The same integers and scales on another device, for x and y of another dtype."""
        moved = (tensor.to(device) for tensor in (self.values, self.scales, self.bitmap, self.row_offsets))
        return BitmapInt8(*moved, self.in_features, self.group_size, dtype)

    def validate_shapes(self) -> None:
        """The part of `validate` that looks at no row of bits: shapes, dtypes, scales, where the offsets end."""
        if self.values.dim() != 1 or self.values.dtype != torch.int8:
            raise ValueError(f"values must be [kept] of int8, got {list(self.values.shape)} of {self.values.dtype}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be bfloat16, float16 or float32, got {self.dtype}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1 or None, got {self.group_size}")
        self._as_bitmap().validate_shapes()
        size = [self.shape[0], self.groups]
        if list(self.scales.shape) != size or self.scales.dtype != torch.float32:
            raise ValueError(f"scales must be {size} of float32, got {list(self.scales.shape)} of {self.scales.dtype}")
        if self.scales.device != self.device:
            raise ValueError(f"values and scales must be on one device, got {self.device} and {self.scales.device}")
        # NaN is not at least 0
        wrong = ~((self.scales >= 0) & self.scales.isfinite())
        if wrong.any():
            row, group = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"scales must be finite and not negative, got {self.scales[row, group].item()} in row {row}, "
                f"group {group}"
            )
        if self.values.numel() and int(self.values.min()) < -LARGEST:
            raise ValueError(f"values must be {-LARGEST} to {LARGEST}, got {int(self.values.min())}")

    def validate(self) -> None:
        """Raises ValueError when the parts contradict each other: a kernel would read past the values."""
        self.validate_shapes()
        self._as_bitmap().validate()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.row_offsets) - 1, self.in_features))

    @property
    def groups(self) -> int:
        """Scales of a row, one at least."""
        return max(-(-self.in_features // self.group_size), 1) if self.group_size else 1

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.bitmap.nbytes + self.row_offsets.nbytes

    def _as_bitmap(self) -> Bitmap:
        # its rules for bits and offsets are these; of the values it looks at the number only, so any will do
        values = self.values.new_zeros((), dtype=self.dtype).expand(len(self.values))
        return Bitmap(values, self.bitmap, self.row_offsets, self.in_features)


def _groups(weight: Tensor, group_size: int | None) -> Tensor:
    """[rows, groups, group_size], the last group of a row filled up with zeros; one group where there are no inputs."""
    rows, columns = weight.shape
    size = group_size or max(columns, 1)
    count = max(-(-columns // size), 1)
    return torch.nn.functional.pad(weight, (0, count * size - columns)).view(rows, count, size)


def _round(weight: Tensor, group_size: int | None, quantised: bool) -> tuple[Tensor, ...]:
    """Some rows: their values [kept], scales [rows, groups], bits [rows, bytes] and kept weights a row [rows]."""
    groups = _groups(weight, group_size)
    scales = groups.abs().amax(dim=2).float() / LARGEST
    if quantised:
        exact = grid.exact_scale(groups.flatten(0, 1), LARGEST).view(scales.shape)
        scales = torch.where(exact > 0, exact, scales)
    # a scale that underflows to zero holds nothing
    steps = (groups.float() / scales[..., None]).where(scales[..., None] > 0, 0.0)
    integers = steps.round_().clamp_(-LARGEST, LARGEST).to(torch.int8).flatten(1)[:, : weight.shape[1]]
    kept = integers != 0
    return integers[kept], scales, pack_bits(kept), kept.sum(dim=1)
