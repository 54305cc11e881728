"""SparseGPT: prune column by column and repair the columns to the right.

Blocks of columns are swept left to right by ops/obs_sweep. With U the upper Cholesky factor of H^-1 the saliency is

    S_ij = W_ij^2 / U_jj^2

over all rows of the block, taken when the block is reached; for N:M it is taken when the sweep reaches the group, on
weights that are already repaired.

Source: Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774, algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekern.ops import obs_sweep
from sparsekern.ops.kernel import pick
from sparsekern.pattern import NM, Pattern, Unstructured, keep_largest
from sparsekern.stats import Gram


@dataclass(frozen=True)
class SparseGPT:
    """One-shot pruning with the OBS update, blocks of `block_size` columns.

    block_size  columns whose mask is chosen together; the scope "block"
    damping     added to the diagonal of H, as a fraction of its mean
    """

    block_size: int = 128
    damping: float = 0.01

    needs: ClassVar[type] = Gram

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if not self.damping >= 0:
            raise ValueError(f"damping must not be negative, got {self.damping}")

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Tensor:
        """The pruned and repaired weight [out_features, in_features] float32.

        A weight that is zero before stays zero, so an existing mask is kept and pruning twice changes nothing.

        Raises ValueError when N:M's M does not divide block_size or a weight is not finite; RuntimeError when H
        cannot be factored.
        """
        if isinstance(pattern, NM) and self.block_size % pattern.m:
            raise ValueError(f"block_size {self.block_size} is not a multiple of the group of pattern {pattern}")
        pattern.check(weight.shape[1])
        if not weight.isfinite().all():
            raise ValueError(f"weight holds {int((~weight.isfinite()).sum())} NaN or infinite values")
        pattern = pattern.with_scope("block")
        u, _ = stats.inverse_cholesky(self.damping)
        # what multiplies an input that was never active does nothing
        w = weight.float().where(~stats.dead, 0.0)
        present = w != 0
        sweep = pick(obs_sweep.KERNELS, w, u).run
        chosen = None
        if isinstance(pattern, Unstructured) and pattern.scope != "block":
            chosen = pattern.mask(_saliency(w, u, present))

        everything = torch.ones_like(present[:, : self.block_size])
        for start in range(0, w.shape[1], self.block_size):
            block = slice(start, min(start + self.block_size, w.shape[1]))
            here = w[:, block], u[block, block].contiguous(), present[:, block]
            mask, nm = everything[:, : block.stop - start], None
            if isinstance(pattern, NM):
                nm = pattern.n, pattern.m
            else:
                mask = chosen[:, block] if chosen is not None else _block_mask(_saliency(*here), block, pattern)
            w[:, block], e = sweep(*here[:2], mask & here[2], nm)
            w[:, block.stop :].addmm_(e, u[block, block.stop :], alpha=-1)
        return w


def _saliency(w: Tensor, u: Tensor, present: Tensor) -> Tensor:
    # a repair may have reached a weight that was pruned before: it still goes first
    return (w / u.diagonal()).square().where(present, -1.0)


def _block_mask(saliency: Tensor, block: slice, pattern: Unstructured) -> Tensor:
    rows = saliency.shape[0]
    # the rounding is carried from block to block, so that the layer's count is exact
    kept = pattern.kept(rows * block.stop) - pattern.kept(rows * block.start)
    return keep_largest(saliency.reshape(1, -1), [kept]).view_as(saliency)
