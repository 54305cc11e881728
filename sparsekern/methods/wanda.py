"""Wanda: a weight matters as much as what it multiplies.

    S_ij = |W_ij| * ||X_j||_2,  ranked within each output row

Source: Sun et al. 2023, https://arxiv.org/abs/2306.11695, equation 1.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsekern.pattern import Pattern
from sparsekern.stats import Gram, InputNorm


@dataclass(frozen=True)
class Wanda:
    """Saliency |W| times the input's norm, ranked per output row; the kept weights stay as they are."""

    needs: ClassVar[type] = InputNorm

    def saliency(self, weight: Tensor, stats: InputNorm | Gram) -> Tensor:
        """|W| ||X|| [out_features, in_features] float32; -1 for a weight that is zero."""
        # any weight on a dead input is worth nothing either, but what is pruned already goes first
        return (weight.float().abs() * stats.norm).where(weight != 0, -1.0)

    def prune(self, weight: Tensor, stats: InputNorm | Gram, pattern: Pattern) -> Tensor:
        """The pruned weight [out_features, in_features] in its own dtype; nothing stays on a dead input."""
        mask = pattern.with_scope("row").mask(self.saliency(weight, stats))
        return weight.where(mask & (stats.norm > 0), 0.0)
