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

    def prune(self, weight: Tensor, stats: InputNorm | Gram, pattern: Pattern) -> Tensor:
        """The pruned weight [out_features, in_features] in its own dtype."""
        return weight.where(pattern.with_scope("row").mask(weight.float().abs() * stats.norm), 0.0)
