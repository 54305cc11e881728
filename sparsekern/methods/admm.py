"""ADMM: the support is found together with the weights on it, which are then solved for exactly.

Let every input be scaled by 1 / sqrt([H^-1]_jj), so that in the new space the square of a weight is its OBS saliency,
w_j^2 / [H^-1]_jj. There, with P the projection to the pattern, which keeps the largest, a step is

    V = W + (Z - U - W) B,   B = rho (H + rho I)^-1
    Z = P(V + U)
    U = U + V - Z

with a penalty rho that grows from level to level, until the support has come to rest. B has no eigenvalue above 1, so
that its products may be taken in bfloat16 where the machine is faster at that: they decide which weights stay, and what
the weights are comes from conjugate gradients in float32 (least_squares.py).

Source: the splitting is that of ALPS, Meng et al. 2024, https://arxiv.org/abs/2406.07831, section 3; the saliency is
that of OBS, Hassibi & Stork 1993; to project in its metric is ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekern.methods.least_squares import choose_damping, solve_on_support, unit_diagonal
from sparsekern.ops.inverse_cholesky import inverse_cholesky
from sparsekern.pattern import Pattern
from sparsekern.stats import Gram

# the relative distance of V from its projection at which a support that did not change is taken for settled
AT_REST = 0.01


@dataclass(frozen=True)
class ADMM:
    """One-shot pruning by the alternating direction method of multipliers; unstructured weights compete over the layer.

    damping  part of each diagonal entry of H that is added to it; None chooses it on the held-out tokens
    rho      the penalty of the first level
    growth   the penalty's factor from level to level
    levels   at most; fewer when the support has come to rest
    inner    steps a level
    steps    conjugate gradient steps at the end, at most
    """

    damping: float | None = None
    rho: float = 0.5
    growth: float = 1.5
    levels: int = 10
    inner: int = 4
    steps: int = 10

    needs: ClassVar[type] = Gram

    def __post_init__(self):
        if self.damping is not None and not self.damping > 0:
            raise ValueError(f"damping must be positive or None, got {self.damping}")
        if not self.rho > 0:
            raise ValueError(f"rho must be positive, got {self.rho}")
        if not self.growth >= 1:
            raise ValueError(f"growth must be at least 1, got {self.growth}")
        for name in ("levels", "inner", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Tensor:
        """The pruned and repaired weight [out_features, in_features] float32.

        A weight that is zero before stays zero, so an existing mask is kept and pruning twice changes nothing.

        Raises RuntimeError when H cannot be factored.
        """
        pattern = pattern.with_scope("layer")
        # what multiplies an input that was never active does nothing
        weight = weight.float().where(~stats.dead, 0.0)
        damping = self.damping if self.damping is not None else choose_damping(weight, stats, pattern)
        h, scale = unit_diagonal(stats.hessian)
        u, damping = stats.inverse_cholesky(damping, per_input=True)
        # [H^-1]_jj is the square of a column of U
        to_saliency = scale * torch.linalg.vector_norm(u, dim=0)
        scaled = weight * scale
        start = scaled / to_saliency
        found, support = self._search(start, _metric(h, damping, to_saliency), pattern)
        # changes are scaled back, not weights: what was at its optimum stays as it is, bit for bit
        start = (scaled + (found - start) * to_saliency).where(support, 0.0)
        solved = solve_on_support(scaled, start, h, support, damping, self.steps)
        return (weight + (solved - scaled) / scale).where(support, 0.0)

    def _search(self, w: Tensor, h: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """The last projection [rows, in_features], and which weights it keeps [rows, in_features] bool.

        w  [rows, in_features] and h [in_features, in_features], in the space of the saliency
        """
        present = w != 0
        present = None if present.all() else present
        u, v, rho = torch.zeros_like(w), torch.empty_like(w), self.rho
        kept = _mask(w.abs(), present, pattern)
        z = w.where(kept, 0.0)
        dtype = _product_dtype(w.device)
        # written to in every step: fresh memory costs as much as what is done with it
        low, pulled, kept_as_number = (torch.empty_like(w, dtype=t) for t in (dtype, dtype, w.dtype))
        for _ in range(self.levels):
            pull = _pull(h, rho, dtype)
            before = kept
            for _ in range(self.inner):
                torch.sub(z, u, out=v)
                torch.mm(low.copy_(v.sub_(w)), pull, out=pulled)
                u += v.copy_(pulled).add_(w)
                kept = _mask(torch.abs(u, out=z), present, pattern)
                # a product with 0 and 1 takes a third of the time that torch.where does
                torch.mul(u, kept_as_number.copy_(kept), out=z)
                u -= z
            if torch.equal(kept, before) and (v - z).norm() <= AT_REST * z.norm():
                break
            rho *= self.growth
            u /= self.growth
        return z, kept


def _metric(h: Tensor, damping: float, scale: Tensor) -> Tensor:
    """The damped h, each side multiplied by `scale`."""
    damped = h * scale
    damped *= scale[:, None]
    damped.diagonal().add_(damping * scale.square())
    return damped


def _mask(saliency: Tensor, present: Tensor | None, pattern: Pattern) -> Tensor:
    """The mask, without weights that were zero before; `saliency` is overwritten."""
    if present is None:
        return pattern.mask(saliency)
    return pattern.mask(saliency.masked_fill_(~present, -1.0)) & present


def _pull(h: Tensor, rho: float, dtype: torch.dtype) -> Tensor:
    """B = rho (H + rho I)^-1, by products in `dtype`."""
    damped = h.clone()
    damped.diagonal().add_(rho)
    u, failed = inverse_cholesky(damped)
    if failed:
        raise torch.linalg.LinAlgError(f"Hessian is not positive definite with the penalty {rho}")
    u = u.mul_(rho**0.5).to(dtype)
    return u.T @ u


def _product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it faster than float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
