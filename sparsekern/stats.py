"""Running statistics of a layer's input, summed in float32 whatever the model's dtype.

Every eighth part of the tokens is held out: it never enters what a method solves with, and gives the report an error on
tokens that the solver did not see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern.ops import gram
from sparsekern.ops.inverse_cholesky import inverse_cholesky

HELD_OUT_PARTS = 8


class InputNorm:
    """How strong each input is: the l2 norm of every column of X (Wanda, https://arxiv.org/abs/2306.11695).

    `norm` [in_features] float32 over the tokens that are not held out, `tokens` their number.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.tokens = 0
        self._squares = torch.zeros(in_features, device=device)

    def add(self, x: Tensor) -> None:
        """Count the tokens x [tokens, in_features] in. Raises ValueError on NaN or inf."""
        _refuse_not_finite(x)
        seen, _ = _split(x)
        # a half's square overflows in real models
        self._squares += seen.float().square().sum(dim=0)
        self.tokens += len(seen)

    def count(self, other: "InputNorm", times: float) -> None:
        """Count the tokens of `other` in, each `times`: a fraction where there are too many of them."""
        self._squares += times * other._squares
        self.tokens += round(times * other.tokens)

    @property
    def norm(self) -> Tensor:
        return self._squares.sqrt()


class Gram:
    """The second moment of a layer's input, H = X^T X / tokens [in_features, in_features].

    It is the Hessian of the layer's squared output error (up to a factor 2), the same for every row of W. The last
    eighth of each batch of tokens goes to `held_out` instead.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.tokens = 0
        self.held_out_tokens = 0
        self._sum = torch.zeros(in_features, in_features, device=device)
        self._held_out_sum = torch.zeros_like(self._sum)
        # on and above the diagonal; whole once `_mirror` was called after the last `add`
        self._whole = True
        self._factors: dict[tuple[float, bool], _Factor] = {}

    def add(self, x: Tensor) -> None:
        """Count the tokens x [tokens, in_features] in. Raises ValueError on NaN or inf."""
        _refuse_not_finite(x)
        self._factors.clear()
        seen, unseen = _split(x if x.dtype in gram.DTYPES else x.float())
        self._whole = False
        gram.accumulate(self._sum, seen)
        gram.accumulate(self._held_out_sum, unseen)
        self.tokens += len(seen)
        self.held_out_tokens += len(unseen)

    def count(self, other: "Gram", times: float) -> None:
        """Count the tokens of `other` in, each `times`: a fraction where there are too many of them."""
        self._factors.clear()
        self._whole = False
        self._sum.add_(other._sum, alpha=times)
        self._held_out_sum.add_(other._held_out_sum, alpha=times)
        self.tokens += round(times * other.tokens)
        self.held_out_tokens += round(times * other.held_out_tokens)

    @property
    def hessian(self) -> Tensor:
        self._mirror()
        return self._sum / max(self.tokens, 1)

    @property
    def held_out_hessian(self) -> Tensor | None:
        """The same of the held-out tokens, to choose a setting by; None when there are none."""
        self._mirror()
        return self._held_out_sum / self.held_out_tokens if self.held_out_tokens else None

    @property
    def norm(self) -> Tensor:
        """What InputNorm holds."""
        return self._sum.diagonal().sqrt()

    @property
    def damping(self) -> float | None:
        """What the last factorisation took; None before there was one."""
        return next(reversed(self._factors.values())).damping if self._factors else None

    @property
    def retries(self) -> int | None:
        """How often the last factorisation had to raise its damping; None before there was one."""
        return next(reversed(self._factors.values())).retries if self._factors else None

    @property
    def dead(self) -> Tensor:
        """Inputs that were never active [in_features] bool."""
        return self._sum.diagonal() == 0

    def error(self, weight: Tensor, pruned: Tensor) -> float:
        """The relative output error ||X (W - W')^T|| / ||X W^T|| on the tokens that were solved for."""
        self._mirror()
        return _relative_error(self._sum, weight, pruned)

    def held_out_error(self, weight: Tensor, pruned: Tensor) -> float | None:
        """The same on the held-out tokens; None when there are none."""
        self._mirror()
        return _relative_error(self._held_out_sum, weight, pruned) if self.held_out_tokens else None

    def inverse_cholesky(self, damping: float, per_input: bool = False) -> tuple[Tensor, float]:
        """The upper triangular U with (damped H)^-1 = U^T U, row-major, and the damping it took.

        per_input  False: damping * mean(diag H) is added to every diagonal entry.
                   True: damping * h_jj, as if H were scaled to unit diagonal first and back after

        When the damped H is not positive definite the damping grows tenfold, up to 1; the value used is returned and
        `retries` counts the steps, so that a report can show both. Layers that share an input share the result.

        Raises ValueError when H holds NaN or infinity; LinAlgError, a RuntimeError, when no damping up to 1 suffices.
        """
        asked = (damping, per_input)
        # the one asked for last is the last: `damping` and `retries` speak of it
        factor = self._factors.pop(asked, None) or self._factor(damping, per_input)
        self._factors[asked] = factor
        return factor.u, factor.damping

    def _mirror(self) -> None:
        if not self._whole:
            gram.mirror(self._sum)
            gram.mirror(self._held_out_sum)
            self._whole = True

    def _factor(self, damping: float, per_input: bool) -> "_Factor":
        used, retries = damping, 0
        while True:
            # made anew for each try: the factorisation uses it up, and a copy would be the largest thing in memory
            h = self.hessian
            diagonal = h.diagonal()
            mean = diagonal.mean()
            # an input that was never active says nothing about its weights: keep H invertible
            diagonal[self.dead] = mean if mean > 0 else 1.0
            diagonal += used * (diagonal.clone() if per_input else mean)
            u, failed = inverse_cholesky(h)
            if not failed:
                return _Factor(u, used, retries)
            if bad := int((~self._sum.isfinite()).sum()):
                raise ValueError(f"Hessian holds {bad} NaN or infinite values: the activations overflow its sums")
            if used >= 1:
                raise torch.linalg.LinAlgError(f"Hessian is not positive definite at damping {used} (asked: {damping})")
            used, retries = min(max(used * 10, 1e-4), 1.0), retries + 1


@dataclass(frozen=True, eq=False)
class _Factor:
    """U, the damping it took, and how often that was raised to get there."""

    u: Tensor
    damping: float
    retries: int


class GradSquare:
    """How much the loss feels each weight: the mean of its squared gradients (empirical Fisher).

    `mean_square` [out_features, in_features] float32 over `samples` gradients, one a calibration sequence.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device | str = "cpu"):
        self.samples = 0
        self._squares = torch.zeros(out_features, in_features, device=device)

    def add(self, gradient: Tensor | None) -> None:
        """Count one gradient [out_features, in_features] in; None is zero. Raises ValueError on NaN or inf."""
        if gradient is not None:
            if not gradient.isfinite().all():
                raise ValueError(f"gradient holds {int((~gradient.isfinite()).sum())} NaN or infinite values")
            self._squares += gradient.float().square()
        self.samples += 1

    @property
    def mean_square(self) -> Tensor:
        return self._squares / max(self.samples, 1)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens to solve with and those held out."""
    seen = len(x) - len(x) // HELD_OUT_PARTS
    return x[:seen], x[seen:]


def _relative_error(second_moment: Tensor, weight: Tensor, pruned: Tensor) -> float:
    w = weight.float()
    # one product at a time, and in place: while a layer is pruned this would need more than the factorisation
    squared = [(x @ second_moment).mul_(x).sum() for x in (w - pruned.float(), w)]
    # a layer whose output is zero has no relative error to speak of
    return float((squared[0].clamp(min=0) / squared[1]).sqrt()) if squared[1] > 0 else 0.0


def _refuse_not_finite(x: Tensor) -> None:
    if not x.isfinite().all():
        raise ValueError(f"activations hold {int((~x.isfinite()).sum())} NaN or infinite values")
