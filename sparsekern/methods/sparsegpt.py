"""SparseGPT: prune column by column and repair the columns to the right; where asked, quantise in the same sweep.

Blocks of columns are swept left to right by ops/obs_sweep. With U the upper Cholesky factor of H^-1 the saliency is

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
from sparsekern.ops import obs_sweep
from sparsekern.ops.addmm import addmm
from sparsekern.ops.kernel import pick
from sparsekern.pattern import NM, Pattern, Unstructured, keep_largest
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
        if not weight.isfinite().all():
            raise ValueError(f"weight holds {int((~weight.isfinite()).sum())} NaN or infinite values")
        pattern = pattern.with_scope("block")
        u = self._factor(stats)
        # what multiplies an input that was never active does nothing
        w = weight.float().where(~stats.dead, 0.0)
        present = None if self.original or w.all() else w != 0
        sweep = pick(obs_sweep.KERNELS, w, u).run
        everything = torch.ones_like(w[:, : self.block_size], dtype=torch.bool)
        chosen = None
        if not nm and pattern.scope != "block":
            chosen = pattern.mask(_saliency(w, u, present))
        scale, largest = None, grid.levels(self.bits) if self.bits else 0
        # the same for every block: fresh memory costs more than what is written to it
        errors, saliencies = (w.new_empty(w[:, : self.block_size].numel()) for _ in range(2))

        for start in range(0, w.shape[1], self.block_size):
            block = slice(start, min(start + self.block_size, w.shape[1]))
            here, u_here = w[:, block], u[block, block].contiguous()
            e, saliency = (x[: here.numel()].view(here.shape) for x in (errors, saliencies))
            allowed = None if present is None else present[:, block]
            if nm:
                mask = everything[:, : here.shape[1]]
            elif chosen is not None:
                mask = chosen[:, block]
            elif self.original:
                mask = _mask_of_the_authors(here, u_here, pattern.sparsity)
            else:
                mask = _block_mask(_saliency(here, u_here, allowed, saliency), block, pattern)
            if largest and start % (self.group_size or w.shape[1]) == 0:
                group = slice(start, start + (self.group_size or w.shape[1]))
                scale = _group_scale(w[:, group], u[group, group], pattern, largest)
            mask = mask if allowed is None else mask & allowed
            sweep(here, u_here, mask, nm, scale, largest, out=(here, e))
            if block.stop < w.shape[1]:
                addmm(w[:, block.stop :], e, u[block, block.stop :], -1.0)
        return w

    def _factor(self, stats: Gram) -> Tensor:
        if not self.original:
            return stats.inverse_cholesky(self.damping, per_input=True)[0]
        # the authors set h_jj of a dead input to 1 before they take the mean
        mean = float(stats.hessian.diagonal().mean())
        dead = float(stats.dead.float().mean())
        return stats.inverse_cholesky(self.damping * (1 + dead / mean) if mean > 0 else self.damping)[0]


def _saliency(w: Tensor, u: Tensor, present: Tensor | None, out: Tensor | None = None) -> Tensor:
    out = torch.empty(w.shape, device=w.device) if out is None else out
    # torch divides a slice by a row five times slower than it copies the slice first
    saliency = out.copy_(w).div_(u.diagonal()).square_()
    # a repair may have reached a weight that was pruned before: it still goes first
    return saliency if present is None else saliency.masked_fill_(~present, -1.0)


def _block_mask(saliency: Tensor, block: slice, pattern: Unstructured) -> Tensor:
    rows = saliency.shape[0]
    # the rounding is carried from block to block, so that the layer's count is exact
    kept = pattern.kept(rows * block.stop) - pattern.kept(rows * block.start)
    return keep_largest(saliency.reshape(1, -1), [kept]).view_as(saliency)


def _mask_of_the_authors(w: Tensor, u: Tensor, sparsity: float) -> Tensor:
    score = w.square() / u.diagonal().square()
    pruned = min(int(score.numel() * sparsity), score.numel() - 1)
    return score > score.flatten().kthvalue(pruned + 1).values


def _group_scale(w: Tensor, u: Tensor, pattern: Pattern, largest: int) -> Tensor:
    saliency = _saliency(w, u, None)
    # an error of w_j costs the sweep its square over u_jj^2; what will be pruned has no say in the scale
    return grid.best_scale(w, u.diagonal().square().reciprocal() * pattern.mask(saliency), largest)
