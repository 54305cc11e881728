"""Refine: any method's mask, with the weights on it solved for by least squares.

Source: the last stage of ALPS, Meng et al. 2024, https://arxiv.org/abs/2406.07831, section 3.3.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparsekern.methods.least_squares import choose_damping, solve_on_support, unit_diagonal
from sparsekern.pattern import Pattern
from sparsekern.stats import Gram, InputNorm


@dataclass(frozen=True)
class Refine:
    """Prune by `method`, then fit the weights it kept by conjugate gradients.

    steps    conjugate gradient steps, at most
    damping  added to the unit diagonal of the scaled H; None chooses it on the held-out tokens. With less than 1e-6,
             where H says nothing what float32 rounds off would decide

    Raises ValueError for a method that leaves nothing to fit on a Gram matrix, and for one that quantises.
    """

    method: Any
    steps: int = 20
    damping: float | None = None

    needs: ClassVar[type] = Gram

    def __post_init__(self):
        if self.method.needs not in (None, InputNorm, Gram):
            raise ValueError(f"{type(self.method).__name__} needs {self.method.needs.__name__}: it cannot be refined")
        if (bits := getattr(self.method, "bits", None)) is not None:
            raise ValueError(
                f"refining would move weights off the {bits}-bit grid; refine what GPTQ prunes by first:"
                f" GPTQ(first=Refine(...))"
            )
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.damping is not None and not self.damping >= 1e-6:
            raise ValueError(f"damping must be at least 1e-6 or None, got {self.damping}")

    def check(self, in_features: int, pattern: Pattern) -> None:
        """Raises ValueError where `method` does."""
        if hasattr(self.method, "check"):
            self.method.check(in_features, pattern)

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Tensor:
        """The pruned and refined weight [out_features, in_features] float32, zeros where `method` put them."""
        weight = weight.float()
        pruned = self.method.prune(weight, stats, pattern).where(~stats.dead, 0.0)
        damping = self.damping if self.damping is not None else choose_damping(weight, stats, pattern)
        h, scale = unit_diagonal(stats.hessian)
        scaled, start, support = weight * scale, pruned * scale, pruned != 0
        change = solve_on_support(scaled, start, h, support, damping, self.steps) - start
        # the change is scaled back, not the weight: what was at its optimum stays as it is, bit for bit
        return (pruned + change / scale).where(support, 0.0)
