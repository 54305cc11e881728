"""OBD: what removing a weight does to the loss, to second order and on the diagonal alone.

    S_ij = h_ij W_ij^2 / 2

h is the diagonal of the Hessian of the model's loss, taken by the empirical Fisher: the mean of squared gradients. The
layer-wise variant takes the loss to be the squared error of the layer's own output: h_ij = mean of x_j^2.

Source: LeCun, Denker & Solla 1989, Optimal Brain Damage.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsekern.pattern import Pattern
from sparsekern.stats import GradSquare, Gram, InputNorm


@dataclass(frozen=True)
class OBD:
    """Saliency from squared gradients of the loss; unstructured weights compete over the layer, none is updated."""

    needs: ClassVar[type] = GradSquare

    def saliency(self, weight: Tensor, stats: GradSquare) -> Tensor:
        """What the loss gains without each weight [out_features, in_features] float32; -1 for one that is zero."""
        # a weight whose gradient is zero is worth nothing either, but what is pruned already goes first
        return (0.5 * stats.mean_square * weight.float().square()).where(weight != 0, -1.0)

    def prune(self, weight: Tensor, stats: GradSquare, pattern: Pattern) -> Tensor:
        """The pruned weight [out_features, in_features] in its own dtype."""
        return weight.where(pattern.with_scope("layer").mask(self.saliency(weight, stats)), 0.0)


@dataclass(frozen=True)
class LayerOBD:
    """Saliency from the layer's squared inputs; unstructured weights compete over the layer, none is updated."""

    needs: ClassVar[type] = InputNorm

    def saliency(self, weight: Tensor, stats: InputNorm | Gram) -> Tensor:
        """Half the squared error a token without each weight [out_features, in_features]; -1 for one that is zero."""
        mean_square = stats.norm.square() / max(stats.tokens, 1)
        return (0.5 * mean_square * weight.float().square()).where(weight != 0, -1.0)

    def prune(self, weight: Tensor, stats: InputNorm | Gram, pattern: Pattern) -> Tensor:
        """The pruned weight [out_features, in_features] in its own dtype; nothing stays on a dead input."""
        mask = pattern.with_scope("layer").mask(self.saliency(weight, stats))
        return weight.where(mask & (stats.norm > 0), 0.0)
