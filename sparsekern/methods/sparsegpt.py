"""SparseGPT: prune column by column and repair the columns to the right; where asked, quantise in the same sweep.

Blocks of columns are swept left to right by ops/obs_blocks. With U the upper Cholesky factor of H^-1 the saliency is

    S_ij = W_ij^2 / U_jj^2

over all rows of the block, taken when the block is reached; for N:M it is taken when the sweep reaches the group, on
weights that are already repaired. With bits, what a kept weight loses to the grid is repaired as a pruned one is.

Sources: Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774, algorithm 1 and section 3.5; the rounding is GPTQ's,
https://arxiv.org/abs/2210.17323.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekern import grid
from sparsekern.ops import obs_blocks
from sparsekern.ops.obs_blocks import Choice, OfBlock
from sparsekern.pattern import NM, Pattern, Unstructured
from sparsekern.stats import Gram


@dataclass(frozen=True)
class SparseGPT:
    """One-shot pruning with the OBS update, blocks of `block_size` columns.

    block_size  columns whose mask is chosen together; the scope "block"
    damping     added to the diagonal of H, as a fraction of each entry
    original    do as the authors' code does: damping is a fraction of the diagonal's mean, an existing mask is not
                kept, and of a block goes every weight whose saliency is not above the sorted ones' number
                int(size * sparsity), which is one too many, and all ties
    bits        4 or 8: the weight returned lies on a symmetric grid; None leaves it as it is
    group_size  inputs that share a row's scale, a multiple of block_size: the scale is chosen when the sweep reaches
                them, on repaired weights; None has one scale for a row. 128 is usual for 4 bits

    A scale is the one with the least rounding error of the weights likely to stay, each counted as the sweep will
    (grid.best_scale).
    """

    block_size: int = 128
    damping: float = 0.01
    original: bool = False
    bits: int | None = None
    group_size: int | None = None

    needs: ClassVar[type] = Gram

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if not self.damping >= 0:
            raise ValueError(f"damping must not be negative, got {self.damping}")
        grid.check(self.bits, self.group_size, self.block_size)

    def check(self, in_features: int, pattern: Pattern) -> None:
        """Raises ValueError when N:M's M does not divide block_size, or a scope is not one that `original` knows."""
        if isinstance(pattern, NM):
            if self.block_size % pattern.m:
                raise ValueError(
                    f"block_size {self.block_size} is not a multiple of the group of pattern {pattern};"
                    f" take SparseGPT(block_size={pattern.m * max(self.block_size // pattern.m, 1)})"
                )
        elif self.original and pattern.scope not in ("block", None):
            raise ValueError(f'original ranks the weights of a block: scope must be "block", got "{pattern.scope}"')

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Tensor:
        """The pruned and repaired weight [out_features, in_features] float32.

        A weight that is zero before stays zero, so an existing mask is kept and pruning twice changes nothing (not so
        with `original`, and a second grid is another one).

        Raises ValueError when N:M's M does not divide block_size or a weight is not finite; RuntimeError when H
        cannot be factored.
        """
        nm = (pattern.n, pattern.m) if isinstance(pattern, NM) else None
        self.check(weight.shape[1], pattern)
        pattern.check(weight.shape[1])
        # what multiplies an input that was never active does nothing
        w = weight.float().where(~stats.dead, 0.0).contiguous()
        # asked together: a card is waited for once
        finite, whole = torch.stack([weight.isfinite().all(), w.all()]).tolist()
        if not finite:
            raise ValueError(f"weight holds {int((~weight.isfinite()).sum())} NaN or infinite values")
        pattern = pattern.with_scope("block")
        u = self._factor(stats)
        present = None if self.original or whole else w != 0
        if self.bits or self.original and not nm:
            obs_blocks.in_turn(w, u, self.block_size, nm, self._of_block(w, u, present, pattern))
        else:
            obs_blocks.run(w, u, self.block_size, self._choice(w, u, present, pattern))
        return w

    def _choice(self, w: Tensor, u: Tensor, present: Tensor | None, pattern: Pattern) -> Choice:
        if isinstance(pattern, NM):
            return Choice(nm=(pattern.n, pattern.m), present=present)
        if pattern.scope != "block":
            return Choice(mask=pattern.mask(obs_blocks.saliency(w, u, present)), present=present)
        return Choice(kept=_kept(w, self.block_size, pattern), present=present)

    def _of_block(self, w: Tensor, u: Tensor, present: Tensor | None, pattern: Pattern) -> OfBlock:
        """What stays of a block, and its grid."""
        chosen = obs_blocks.chosen(w, self.block_size, self._choice(w, u, present, pattern))
        largest = grid.levels(self.bits) if self.bits else 0
        group_size, scales = self.group_size or w.shape[1], [None]

        def of_block(block: slice, here: Tensor, u_here: Tensor) -> tuple[Tensor, Tensor | None, int]:
            if self.original and isinstance(pattern, Unstructured):
                mask = _mask_of_the_authors(here, u_here, pattern.sparsity)
            else:
                mask = chosen(block, here, u_here)
            if largest and block.start % group_size == 0:
                group = slice(block.start, block.start + group_size)
                scales[0] = _group_scale(w[:, group], u[group, group], pattern, largest)
            return mask, scales[0], largest

        return of_block

    def _factor(self, stats: Gram) -> Tensor:
        if not self.original:
            return stats.inverse_cholesky(self.damping, per_input=True)[0]
        # the authors set h_jj of a dead input to 1 before they take the mean
        mean = float(stats.hessian.diagonal().mean())
        dead = float(stats.dead.float().mean())
        return stats.inverse_cholesky(self.damping * (1 + dead / mean) if mean > 0 else self.damping)[0]


def _kept(w: Tensor, block_size: int, pattern: Unstructured) -> list[int]:
    rows = w.shape[0]
    # the rounding is carried from block to block, so that the layer's count is exact
    ends = [pattern.kept(rows * block.stop) for block in obs_blocks.blocks(w.shape[1], block_size)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _mask_of_the_authors(w: Tensor, u: Tensor, sparsity: float) -> Tensor:
    score = w.square() / u.diagonal().square()
    pruned = min(int(score.numel() * sparsity), score.numel() - 1)
    return score > score.flatten().kthvalue(pruned + 1).values


def _group_scale(w: Tensor, u: Tensor, pattern: Pattern, largest: int) -> Tensor:
    saliency = obs_blocks.saliency(w, u, None)
    # an error of w_j costs the sweep its square over u_jj^2; what will be pruned has no say in the scale
    return grid.best_scale(w, u.diagonal().square().reciprocal() * pattern.mask(saliency), largest)
