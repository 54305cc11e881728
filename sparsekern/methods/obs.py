"""OBS: remove one weight at a time, the cheapest, and move the others to where they are best without it.

A row's weights w have the squared error (w - w0) H (w - w0)^T / 2. Of what remains of the row, the weight to go next
and the step of the others are

    q = argmin_i w_i^2 / (2 [H^-1]_ii),        dw = -w_q / [H^-1]_qq * H^-1 e_q

and H^-1 loses row and column q:  H^-1 -= H^-1 e_q e_q^T H^-1 / [H^-1]_qq.

Source: Hassibi & Stork 1993, Second order derivatives for network pruning: Optimal Brain Surgeon. Rows are independent,
so that the greedy over a whole layer is a merge of the rows': Frantar & Alistarh 2022, https://arxiv.org/abs/2208.11580.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekern.pattern import NM, Pattern, Unstructured
from sparsekern.stats import Gram

MAX_IN_FEATURES = 1024
# the memory of the inverses of the rows that are worked on together
CHUNK_BYTES = 1 << 27
# removals that are taken off the inverses together
BLOCK = 32


@dataclass(frozen=True)
class OBS:
    """Exact greedy removal in float64, for layers of up to 1024 inputs; unstructured weights compete over the layer.

    damping  added to each diagonal entry of H, as a fraction of it

    It takes in_features^3 operations a row, and works on as many rows at once as have their inverses in 128 MB.
    """

    damping: float = 0.01

    needs: ClassVar[type] = Gram

    def __post_init__(self):
        if not self.damping >= 0:
            raise ValueError(f"damping must not be negative, got {self.damping}")

    def check(self, in_features: int, pattern: Pattern) -> None:
        """Raises ValueError when there are too many inputs."""
        if in_features > MAX_IN_FEATURES:
            raise ValueError(
                f"OBS takes in_features^3 operations a row and serves {MAX_IN_FEATURES} inputs at most, got"
                f" {in_features}; SparseGPT() approximates it"
            )

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Tensor:
        """The pruned and repaired weight [out_features, in_features] float32.

        A weight that is zero before stays zero, so an existing mask is kept and pruning twice changes nothing.

        Raises ValueError for more than 1024 inputs or a weight that is not finite; RuntimeError when H cannot be
        factored.
        """
        self.check(weight.shape[1], pattern)
        if not weight.isfinite().all():
            raise ValueError(f"weight holds {int((~weight.isfinite()).sum())} NaN or infinite values")
        pattern = pattern.with_scope("layer")
        pattern.check(weight.shape[1])
        u, _ = stats.inverse_cholesky(self.damping, per_input=True)
        inverse = u.double().T @ u.double()
        # what multiplies an input that was never active does nothing
        w = weight.double().where(~stats.dead, 0.0)
        mask = pattern.mask(removal_order(w, inverse, pattern)) & (w != 0)
        return refit(w, inverse, mask).float()


def removal_order(weight: Tensor, inverse: Tensor, pattern: Pattern) -> Tensor:
    """When the greedy takes each weight [rows, in_features] float64: 0 first, inf for one that it never reaches.

    weight   [rows, in_features] float64; what is zero goes first
    inverse  [in_features, in_features] float64, H^-1
    pattern  N:M: a group that has come down to n gives nothing any more; else every weight has its place

    Over all rows the cheapest goes next, of equal ones that of the first row.
    """
    rows, columns = weight.shape
    ranked_by_row = isinstance(pattern, Unstructured) and pattern.scope == "row"
    steps = min(int(pattern.sparsity * columns) + 1, columns) if ranked_by_row else columns
    traces = [_remove(chunk, inverse, pattern, steps) for chunk in weight.split(_rows_at_once(inverse))]
    column, cost = (torch.cat(parts) for parts in zip(*traces, strict=True))
    # a row's next weight may be cheaper than the one before it: then both go when the dearer is due
    due = cost.cummax(dim=1).values
    place = due.flatten().argsort(stable=True).argsort().view_as(due)
    place = place.double().where(cost.isfinite(), torch.inf)
    # amin: steps that removed nothing name some column as well
    return torch.full_like(weight, torch.inf).scatter_reduce_(1, column, place, "amin")


def _remove(weight: Tensor, inverse: Tensor, pattern: Pattern, steps: int) -> tuple[Tensor, Tensor]:
    """Remove weight after weight from each row, `steps` of them or until no more may go.

    Returns the column of each removal [rows, steps] and what it cost [rows, steps]: inf where nothing was removed.
    """
    w, present, gone = weight.clone(), weight != 0, torch.zeros_like(weight, dtype=torch.bool)
    rows, columns = w.shape
    row = torch.arange(rows, device=w.device)
    inverse = inverse.repeat(rows, 1, 1)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    column, cost = w.new_zeros(rows, steps, dtype=torch.long), w.new_full((rows, steps), torch.inf)
    for start in range(0, steps, BLOCK):
        # what the block takes off each inverse is v^T v; it is taken off at once, by a product of matrices
        v = w.new_zeros(rows, min(BLOCK, steps - start), columns)
        for i in range(v.shape[1]):
            # zero, the least, for weights that were zero before: the first that go, and nothing moves when they do
            saliency = w.square() / (2 * diagonal)
            lowest, q = saliency.where(_may_go(present, gone, pattern), torch.inf).min(dim=1)
            removes = lowest.isfinite()
            h_q = inverse[row, q] - torch.bmm(v[row, :i, q][:, None], v[:, :i])[:, 0]
            root = h_q[row, q].sqrt()
            v[:, i] = (h_q / root[:, None]).where(removes[:, None], 0.0)
            w -= (w[row, q] / root)[:, None] * v[:, i]
            diagonal -= v[:, i].square()
            gone[row, q] |= removes
            column[:, start + i], cost[:, start + i] = q, lowest
        if not removes.any():
            break
        inverse.baddbmm_(v.mT, v, alpha=-1)
    return column, cost


def _may_go(present: Tensor, gone: Tensor, pattern: Pattern) -> Tensor:
    if not isinstance(pattern, NM):
        return ~gone
    left = (present & ~gone).view(len(gone), -1, pattern.m).sum(dim=2)
    return ~gone & (~present | (left > pattern.n).repeat_interleave(pattern.m, dim=1))


def refit(weight: Tensor, inverse: Tensor, mask: Tensor) -> Tensor:
    """What all the steps together come to: the best weights under `mask`, by one solve a row.

    weight   [rows, in_features] float64
    inverse  [in_features, in_features] float64, H^-1
    mask     [rows, in_features] bool, True = kept

    Returns the weights [rows, in_features], exactly 0 where pruned.
    """
    size = _rows_at_once(inverse)
    return torch.cat([_refit(*chunk, inverse) for chunk in zip(weight.split(size), mask.split(size), strict=True)])


def _rows_at_once(inverse: Tensor) -> int:
    return max(1, CHUNK_BYTES // inverse.nbytes)


def _refit(weight: Tensor, mask: Tensor, inverse: Tensor) -> Tensor:
    # dw = -H^-1_:p ([H^-1]_pp)^-1 w_p for the pruned p; rows differ in how many they are, so the others get an identity
    pruned = ~mask
    system = inverse * (pruned[:, :, None] & pruned[:, None, :])
    system.diagonal(dim1=1, dim2=2).add_(mask)
    factor = torch.linalg.cholesky(system)
    force = torch.cholesky_solve(weight.where(pruned, 0.0)[:, :, None], factor)[:, :, 0]
    return (weight - force @ inverse).where(mask, 0.0)
