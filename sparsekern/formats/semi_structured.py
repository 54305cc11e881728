"""2:4 semi-structured weights: two values of every four neighbouring inputs, and where they stand.

    values    [out_features, in_features / 2]       the kept weights of each group, in the order of their positions
    metadata  [out_features, ceil(in_features / 16)] int16, 4 groups a word, low bits first; a group's 4 bits are the
              position of its first value (2 bits) and of its second (2 bits), first < second

A group with fewer than two nonzeros is filled up with zeros at the lowest free positions, so that equal weights pack to
equal bits. This is the order of the metadata operand of mma.sp; a kernel's own shuffle is made from it on load.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SemiStructured:
    """A 2:4 weight [out_features, in_features]; `values` and `metadata` as the module says."""

    values: Tensor
    metadata: Tensor
    in_features: int

    name: ClassVar[str] = "2:4"

    @classmethod
    def pack(cls, weight: Tensor) -> "SemiStructured":
        """Pack `weight` [out_features, in_features]; -0.0 becomes +0.0.

        Raises ValueError when a group of four holds more than two nonzeros, naming row and columns, and on NaN or inf.
        """
        if not weight.isfinite().all():
            raise not_finite(int((~weight.isfinite()).sum()))
        out_features, in_features = weight.shape
        if in_features % 4:
            raise ValueError(f"not 2:4: in_features must be a multiple of 4, got {in_features}")
        groups = weight.reshape(out_features, in_features // 4, 4)
        _refuse_crowded(groups)
        # nonzeros first, then the lowest free positions; then back into ascending order
        kept = (groups == 0).to(torch.uint8).sort(dim=2, stable=True).indices[..., :2].sort(dim=2).values
        values = groups.gather(2, kept) + 0.0
        bits = kept[..., 0] | kept[..., 1] << 2
        words = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 4), value=0b0100).unflatten(1, (-1, 4))
        metadata = (words << torch.tensor([0, 4, 8, 12], device=weight.device)).sum(dim=2)
        return cls(values.flatten(1), _as_int16(metadata), in_features)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.values), self.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.metadata.nbytes

    def to_dense(self) -> Tensor:
        """The weight [out_features, in_features], bit for bit what was packed (with -0.0 as +0.0)."""
        out_features, in_features = self.shape
        bits = self._groups()
        positions = torch.stack([bits & 3, bits >> 2], dim=2)
        dense = self.values.new_zeros(out_features, in_features // 4, 4)
        return dense.scatter(2, positions, self.values.unflatten(1, (-1, 2))).flatten(1)

    def validate_sizes(self) -> None:
        """The part of `validate` that reads no element: sizes and dtypes."""
        if self.in_features % 4 or self.in_features < 0:
            raise ValueError(f"in_features must be a multiple of 4, got {self.in_features}")
        if self.values.dim() != 2 or self.values.shape[1] != self.in_features // 2:
            raise ValueError(f"values must be [out_features, {self.in_features // 2}], got {list(self.values.shape)}")
        if not self.values.is_floating_point():
            raise ValueError(f"values must be floating point, got {self.values.dtype}")
        words = [len(self.values), -(-self.in_features // 16)]
        if self.metadata.dtype != torch.int16 or list(self.metadata.shape) != words:
            raise ValueError(f"metadata must be int16 {words}, got {self.metadata.dtype} {list(self.metadata.shape)}")

    def validate(self) -> None:
        """Raises ValueError when the tensors cannot be a 2:4 weight: sizes, dtypes, positions."""
        self.validate_sizes()
        # two groups a byte: 4 + second - first - 1 keeps bit 2 where first < second, and borrows from no neighbour
        pairs = self.metadata.contiguous().view(torch.uint8)
        rising = ((((pairs >> 2) & 0x33) | 0x44) - (pairs & 0x33) - 0x11) & 0x44
        wrong = rising != 0x44
        if wrong.any():
            row, byte = wrong.nonzero()[0].tolist()
            group = 2 * byte + int(int(rising[row, byte]) & 4 != 0)
            bits = int(pairs[row, byte]) >> 4 * (group % 2)
            raise ValueError(
                f"positions must ascend: row {row}, columns {4 * group}..{4 * group + 3} have "
                f"{bits & 3}, {bits >> 2 & 3}"
            )
        if unused := -(self.in_features // 4) % 4:
            # the last word's groups after the last input, as `pack` leaves them
            padding = self.metadata[:, -1] >> 4 * (4 - unused) & (1 << 4 * unused) - 1
            if (wrong := padding != 0x4444 >> 4 * (4 - unused)).any():
                raise ValueError(
                    f"positions after input {self.in_features - 1} must be 0, 1, got others in row "
                    f"{int(wrong.nonzero()[0])}"
                )

    def _groups(self) -> Tensor:
        """The 4 bits of each group [out_features, in_features / 4], int64."""
        nibbles = (self.metadata.long()[:, :, None] >> torch.tensor([0, 4, 8, 12], device=self.device)) & 15
        return nibbles.flatten(1)[:, : self.in_features // 4]


def _refuse_crowded(groups: Tensor) -> None:
    counts = (groups != 0).sum(dim=2)
    crowded = (counts > 2).nonzero()
    if len(crowded):
        row, group = crowded[0].tolist()
        raise not_24(row, group, int(counts[row, group]), len(crowded))


def not_24(row: int, group: int, nonzeros: int, groups: int) -> ValueError:
    """What is wrong with a weight of which `groups` groups hold too many nonzeros, the first of them this one."""
    return ValueError(
        f"not 2:4: row {row}, columns {4 * group}..{4 * group + 3} hold {nonzeros} nonzeros; "
        f'prune with pattern "2:4" first ({groups} groups like this)'
    )


def not_finite(missing: int) -> ValueError:
    """What is wrong with a weight of which `missing` values are not finite."""
    return ValueError(f"weight holds {missing} NaN or infinite values")


def _as_int16(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
