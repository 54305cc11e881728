"""GPTQ on a pruned weight: the mask stays, the kept weights move to an integer grid.

The grid is chosen first, from the pruned weight. One sweep of GPTQ rounds to it; the columns to the right repair what
was lost, the pruned ones too, whose share is lost again when the sweep reaches them. Coordinate descent makes that good
on each row's own support: with everything else held, the best integer for w_j is the one nearest to

    w_j - ((W - W_0) H)_j / H_jj

and a pass over all columns is one product with H. Between the passes every scale takes its least-squares value. The
objective (w - w_0) H (w - w_0)^T never rises.

Measured on a synthetic layer (512 x 512, low-rank inputs with noise, 16k tokens) at 4 bits with a scale a row, after
SparseGPT and 30 PCG steps on its support, error at 50 % and 2:4: SparseGPT's joint sweep .0547 .0698; the masked sweep
alone .0509 .0639; GPTQ with the exact inverse of each row's support, rows * (in_features / 2)^3 / 3 operations, .0469
.0588; one pass of descent .0443 .0567, four .0429 .0553, eight .0427 .0551.
ADMM first instead and four passes: .0417 .0537, where ADMM alone has .0247 .0416.

Sources: Frantar et al. 2022, https://arxiv.org/abs/2210.17323; the descent is QuantEase's, Behdin et al. 2023,
https://arxiv.org/abs/2309.01885, here under a mask.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsekern import grid
from sparsekern.methods.admm import ADMM
from sparsekern.ops import obs_sweep
from sparsekern.ops.addmm import addmm, matmul
from sparsekern.ops.kernel import pick
from sparsekern.pattern import Pattern
from sparsekern.stats import Gram, InputNorm

# columns swept together
_BLOCK = 128


@dataclass(frozen=True)
class GPTQ:
    """Prune by `first`, then quantise what is left, on each row's own support.

    bits        4 or 8: the weight returned lies on a symmetric grid, from which grid.recover reads integers and scales
    group_size  inputs that share a row's scale; None has one scale for a row. 128 is usual for 4 bits
    first       the method that prunes
    passes      of coordinate descent; each costs one product with H
    damping     added to the diagonal of H, as a fraction of each entry
    """

    bits: int = 4
    group_size: int | None = None
    first: Any = field(default_factory=ADMM)
    passes: int = 4
    damping: float = 0.01

    needs: ClassVar[type] = Gram

    def __post_init__(self):
        if self.bits is None:
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")
        grid.check(self.bits, self.group_size)
        if self.passes < 0:
            raise ValueError(f"passes must not be negative, got {self.passes}")
        if not self.damping >= 0:
            raise ValueError(f"damping must not be negative, got {self.damping}")
        if self.first.needs not in (None, InputNorm, Gram):
            raise ValueError(
                f"first must prune by what the layer reads, which is all that GPTQ has: {type(self.first).__name__} "
                f"needs {self.first.needs.__name__}"
            )

    def check(self, in_features: int, pattern: Pattern) -> None:
        """Raises ValueError where `first` does."""
        if hasattr(self.first, "check"):
            self.first.check(in_features, pattern)

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Tensor:
        """The pruned and quantised weight [out_features, in_features] float32.

        What `first` pruned is zero; a kept weight may be rounded to zero as well.

        Raises what `first` raises; RuntimeError when H cannot be factored.
        """
        start = self.first.prune(weight, stats, pattern).float()
        mask = (start != 0) & ~stats.dead
        u, damping = stats.inverse_cholesky(self.damping, per_input=True)
        h = stats.hessian
        h.diagonal().mul_(1 + damping)
        # nothing is kept on a dead input: any divisor will do
        h.diagonal()[stats.dead] = 1.0

        group_size = self.group_size or max(weight.shape[1], 1)
        groups = [slice(i, min(i + group_size, weight.shape[1])) for i in range(0, weight.shape[1], group_size)]
        importance = u.diagonal().square().reciprocal() * mask
        scales = [grid.best_scale(start[:, g], importance[:, g], grid.levels(self.bits)) for g in groups]
        # a block lies in one group
        block_size = math.gcd(_BLOCK, group_size) if self.group_size else _BLOCK
        layer = _Layer(weight.float(), mask, h, groups, block_size, grid.levels(self.bits))
        return layer.descend(layer.sweep(start, u, scales), scales, self.passes)


@dataclass(frozen=True, eq=False)
class _Layer:
    """What stays the same while a layer is quantised.

    target      [out_features, in_features] float32, the weight before it was pruned
    mask        [out_features, in_features] bool
    h           [in_features, in_features] float32, damped
    groups      the columns that share a scale
    block_size  columns that are swept together, all of one group
    largest     the largest integer of the grid
    """

    target: Tensor
    mask: Tensor
    h: Tensor
    groups: list[slice]
    block_size: int
    largest: int

    def blocks(self, group: slice) -> list[slice]:
        return [slice(i, min(i + self.block_size, group.stop)) for i in range(group.start, group.stop, self.block_size)]

    def sweep(self, start: Tensor, u: Tensor, scales: list[Tensor]) -> Tensor:
        """`start` on the grid by one sweep of GPTQ [out_features, in_features]."""
        w = start.where(self.mask, 0.0)
        sweep, e = pick(obs_sweep.KERNELS, w, u).run, w.new_empty(w.shape[0], self.block_size)
        for group, scale in zip(self.groups, scales, strict=True):
            for block in self.blocks(group):
                here, u_here, errors = w[:, block], u[block, block].contiguous(), e[:, : block.stop - block.start]
                sweep(here, u_here, self.mask[:, block], None, scale, self.largest, out=(here, errors))
                if block.stop < w.shape[1]:
                    addmm(w[:, block.stop :], errors, u[block, block.stop :], -1.0)
        return w

    def descend(self, w: Tensor, scales: list[Tensor], passes: int) -> Tensor:
        """`w`, which lies on the grid of `scales`, after coordinate descent; both are overwritten."""
        wanted, product = matmul(self.target, self.h), matmul(w, self.h)  # [out_features, in_features]
        for _ in range(passes):
            for index, group in enumerate(self.groups):
                scales[index] = self._descend_group(w, product, wanted, group, scales[index])
        # the same integers and scale always give the same bits, whatever way led there
        for group, scale in zip(self.groups, scales, strict=True):
            w[:, group] = grid.nearest(w[:, group], scale[:, None], self.largest)
        return w

    def _descend_group(self, w: Tensor, product: Tensor, wanted: Tensor, group: slice, scale: Tensor) -> Tensor:
        """Move a group of `w`, first by its scale and then by its integers, and `product` = w @ h with it.

        Returns the group's new scale [out_features].
        """
        whole = len(self.groups) == 1
        before, mine = w[:, group].clone(), w[:, group]
        # what of the product the group itself needs is kept up to date block by block, the rest at the end
        here = product if whole else product[:, group].clone()
        share = product.clone() if whole else matmul(mine, self.h[group, group])
        slope, curvature = ((here - wanted[:, group]) * mine).sum(dim=1), (share * mine).sum(dim=1)
        # the error falls all the way to the best factor, and a scale that vanished could never come back
        factor = (1 - (slope / curvature).where(curvature > 0, 0.0)).clamp(0.5, 2.0)
        here += share.mul_((factor - 1)[:, None])
        mine *= factor[:, None]
        scale = scale * factor
        for block in self.blocks(group):
            gradient = here[:, block.start - group.start : block.stop - group.start] - wanted[:, block]
            best = self._best_integers(w[:, block], gradient, block, scale)
            addmm(here, best - w[:, block], self.h[block, group])
            w[:, block] = best
        if not whole:
            addmm(product, mine - before, self.h[group])
        return scale

    def _best_integers(self, w: Tensor, gradient: Tensor, block: slice, scale: Tensor) -> Tensor:
        """The columns of a block on the grid, each at its best while the others are held, from left to right."""
        # a column to a row: what is read and written together lies together; .contiguous() would not copy a single row,
        # or a weight that lies in columns, and the caller's w still has to hold what it was
        w, gradient, kept = (
            x.T.clone(memory_format=torch.contiguous_format) for x in (w, gradient, self.mask[:, block])
        )
        h = self.h[block, block]
        for j in range(len(w)):
            best = grid.nearest(w[j] - gradient[j] / h[j, j], scale, self.largest).where(kept[j], 0.0)
            gradient[j + 1 :].addr_(h[j, j + 1 :], best - w[j])
            w[j] = best
        return w.T.contiguous()
