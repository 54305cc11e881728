"""Least squares on a fixed support: what the weights that stay should be, once it is known which stay.

With the Hessian scaled to unit diagonal, V and W scaled the other way, and M the mask,

    min over V = V * M of  1/2 tr (V - W) (H + damping I) (V - W)^T

is solved for all rows at once by conjugate gradients: one product with H a step, and no factorisation. In this scaling
the damping means the same for a quiet input and for a loud one, and plain conjugate gradients are those preconditioned
by the diagonal of H.

Source: Hestenes & Stiefel 1952; as the last stage of one-shot pruning in ALPS, https://arxiv.org/abs/2406.07831.
"""

import torch
from torch import Tensor

from sparsekern.ops.addmm import addmm
from sparsekern.pattern import Pattern
from sparsekern.stats import Gram

# a step that lowers the objective by less than this part of it is the last one
WORTH_A_STEP = 1e-5
# the best lies near 0.1 with a few tokens an input, and lower with many: see choose_damping
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)
PROBED_ROWS = 32
PROBE_STEPS = 10


def unit_diagonal(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian scaled to unit diagonal, and the scale: H_ij = scale_i h_ij scale_j.

    hessian  [in_features, in_features] float32, positive semi-definite

    Returns h [in_features, in_features] and scale [in_features]. An input that was never active has scale 1 and stands
    alone in h. Raises ValueError on NaN or infinity.
    """
    diagonal = hessian.diagonal()
    if not diagonal.isfinite().all():
        raise ValueError(f"Hessian holds {int((~hessian.isfinite()).sum())} NaN or infinite values")
    scale = diagonal.sqrt().where(diagonal > 0, 1.0)
    h = hessian / scale
    h /= scale[:, None]
    h.diagonal().fill_(1.0)
    return h, scale


def solve_on_support(
    weight: Tensor, start: Tensor, h: Tensor, support: Tensor, damping: Tensor | float, steps: int
) -> Tensor:
    """The weights on `support` that come closest to `weight`, by at most `steps` conjugate gradient steps.

    weight   [rows, in_features] float32, scaled as h is
    start    [rows, in_features] float32, zero outside the support
    h        [in_features, in_features] float32, unit diagonal
    support  [rows, in_features] bool
    damping  a number, or one a row [rows, 1]

    Returns [rows, in_features] float32, zero outside the support; where `start` is the solution, its very bits.
    """

    # written to in every step: fresh memory costs as much as what is done with it
    product = torch.empty_like(weight)

    def multiply(direction: Tensor) -> Tensor:
        torch.mul(direction, damping, out=product)
        addmm(product, direction, h)
        return product

    away = weight - start
    residual = multiply(away).clone()
    left = _dot(away, residual).sum() / 2
    # a product with 0 and 1 takes a third of the time that torch.where does
    inside = support.float()
    residual *= inside
    direction, solution, squared = residual.clone(), start.clone(), _dot(residual, residual)
    for _ in range(steps):
        curved = multiply(direction).mul_(inside)
        length = squared / _dot(direction, curved).clamp(min=torch.finfo(torch.float32).tiny)
        solution.addcmul_(direction, length)
        residual.addcmul_(curved, length, value=-1)
        gained = (length * squared).sum() / 2
        left = left - gained
        if not gained > WORTH_A_STEP * left:
            break
        before, squared = squared, _dot(residual, residual)
        direction.mul_(squared / before.clamp(min=torch.finfo(torch.float32).tiny)).add_(residual)
    return solution


def choose_damping(weight: Tensor, stats: Gram, pattern: Pattern) -> float:
    """The damping of DAMPINGS whose solution does best on the held-out tokens, tried on a sample of rows.

    weight  [out_features, in_features] float32
    stats   without held-out tokens nothing can be tried: then 0.1, which is safe with few tokens

    The support is that of the scaled magnitudes: which damping serves best depends on the tokens, hardly on the mask.
    """
    if not stats.held_out_tokens:
        return 0.1
    h, scale = unit_diagonal(stats.hessian)
    rows = torch.linspace(0, len(weight) - 1, min(PROBED_ROWS, len(weight)), device=weight.device).long()
    sample = weight[rows].where(~stats.dead, 0.0)
    scaled = sample * scale
    kept = pattern.with_scope("layer").mask(scaled.abs()) & (scaled != 0)
    each = torch.tensor(DAMPINGS, device=weight.device).repeat_interleave(len(rows))[:, None]
    target, support = scaled.repeat(len(DAMPINGS), 1), kept.repeat(len(DAMPINGS), 1)
    solved = solve_on_support(target, target.where(support, 0.0), h, support, each, PROBE_STEPS) / scale
    errors = [stats.held_out_error(sample, tried) for tried in solved.chunk(len(DAMPINGS))]
    return DAMPINGS[min(range(len(errors)), key=errors.__getitem__)]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, [rows, 1]."""
    return torch.linalg.vecdot(a, b).unsqueeze(1)
