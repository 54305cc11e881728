"""Dense: a weight as it is, so that a layer that is faster dense is packed, saved and run like any other.

bytes = out_features * in_features * itemsize
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Dense:
    """A weight [out_features, in_features], rows from the top, NaN and -0.0 as they are."""

    name: ClassVar[str] = "dense"

    weight: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> "Dense":
        """Hold `weight` [out_features, in_features] itself, or a contiguous copy.

        Raises ValueError for another dtype or another number of dimensions.
        """
        packed = cls(weight.detach().contiguous())
        packed.validate()
        return packed

    def to_dense(self) -> Tensor:
        """The weight [out_features, in_features], not a copy."""
        return self.weight

    def validate(self) -> None:
        """Raises ValueError when `weight` is not what this class says."""
        if self.weight.dim() != 2:
            raise ValueError(f"weight must have 2 dimensions, got shape {list(self.weight.shape)}")
        if self.weight.dtype not in DTYPES:
            raise ValueError(f"weight must be bfloat16, float16 or float32, got {self.weight.dtype}")
        if not self.weight.is_contiguous():
            raise ValueError(f"weight must be contiguous, got strides {list(self.weight.stride())}")

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes
