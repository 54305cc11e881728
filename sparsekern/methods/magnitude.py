"""Magnitude pruning: the smallest weights go, the rest stays as it is.

Source: Han et al. 2015, https://arxiv.org/abs/1506.02626.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsekern.pattern import Pattern


@dataclass(frozen=True)
class Magnitude:
    """Saliency |W|; unstructured weights compete over the whole layer."""

    needs: ClassVar[None] = None

    def saliency(self, weight: Tensor, stats: object) -> Tensor:
        """|W| [out_features, in_features] float32; `stats` is not looked at."""
        return weight.float().abs()

    def prune(self, weight: Tensor, stats: object, pattern: Pattern) -> Tensor:
        """The pruned weight [out_features, in_features] in its own dtype."""
        return weight.where(pattern.with_scope("layer").mask(self.saliency(weight, stats)), 0.0)
