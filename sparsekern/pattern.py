"""Which weights stay: a pattern turns a saliency into a mask.

A mask is True where a weight is kept. Counts are exact and ties go to the lower index: of two equal saliencies the one
that stands first in its row (then in the first row) is kept, so the same input always gives the same mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sparsekern.ops import keep_largest as op
from sparsekern.ops.kernel import pick

Scope = Literal["row", "block", "layer", "model"]


@dataclass(frozen=True)
class Unstructured:
    """Prune round(sparsity * size) weights, wherever they stand.

    sparsity  fraction pruned, 0..1
    scope     where saliencies compete: each output row ("row"), the columns a solver updates together ("block"), the
              whole layer ("layer") or all layers ("model", which prune() resolves); None leaves it to the method, as
              its paper has it

    Raises ValueError for a sparsity outside 0..1 or an unknown scope.
    """

    sparsity: float
    scope: Scope | None = None

    def __post_init__(self):
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity must lie in 0..1, got {self.sparsity}")
        if self.scope not in ("row", "block", "layer", "model", None):
            raise ValueError(f'scope must be "row", "block", "layer" or "model", got {self.scope!r}')

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}%"

    def with_scope(self, scope: Scope) -> "Unstructured":
        """This pattern, with `scope` where it named none."""
        return self if self.scope else replace(self, scope=scope)

    def check(self, in_features: int) -> None:
        """Every layer can hold an unstructured mask."""

    def spread(self, saliencies: Mapping[str, Tensor]) -> "dict[str, Unstructured]":
        """Scope "model", layer by layer: all weights compete, and each layer learns how many it loses.

        saliencies  by layer, [out_features, in_features] float32, lowest is pruned first

        Returns a pattern of scope "layer" for each; together they prune round(sparsity * size) weights exactly, and
        layer by layer the same ones, ties to the layer that stands first.
        """
        flat = torch.cat([saliency.reshape(-1) for saliency in saliencies.values()])
        kept = keep_largest(flat[None], [self.kept(len(flat))])[0]
        parts = kept.split([saliency.numel() for saliency in saliencies.values()])
        return {
            name: Unstructured(1 - int(part.sum()) / max(part.numel(), 1), "layer")
            for name, part in zip(saliencies, parts, strict=True)
        }

    def kept(self, size: int) -> int:
        """How many of `size` weights stay."""
        return size - round(self.sparsity * size)

    def mask(self, saliency: Tensor) -> Tensor:
        """The weights to keep.

        saliency  [out_features, in_features], lowest is pruned first

        Returns a bool tensor of the same shape with exactly round(sparsity * size) False. Scope "row" spreads the
        rounding over the rows, so that they differ by one weight at most and the total is still exact. Scope "block"
        means: the columns given here are the block.
        """
        if self.scope == "model":
            raise ValueError('scope "model" is for prune(): one layer does not know what the others hold')
        rows, columns = saliency.shape
        if self.scope != "row":
            return keep_largest(saliency.reshape(1, -1), [self.kept(saliency.numel())]).view(rows, columns)
        ends = [self.kept(columns * row) for row in range(rows + 1)]
        return keep_largest(saliency, [after - before for before, after in zip(ends, ends[1:], strict=False)])


@dataclass(frozen=True)
class NM:
    """Keep n of every m neighbouring inputs: NM(2, 4) is what sparse tensor cores read.

    Raises ValueError unless 0 < n <= m.
    """

    n: int
    m: int

    def __post_init__(self):
        if not 0 < self.n <= self.m:
            raise ValueError(f"N:M keeps N of every M, so 0 < N <= M is needed, got {self.n}:{self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def with_scope(self, scope: Scope) -> "NM":
        """Groups compete with nobody: a scope changes nothing."""
        return self

    def check(self, in_features: int) -> None:
        """Raises ValueError when `in_features` cannot be cut into groups."""
        if in_features % self.m:
            raise ValueError(f"pattern {self} needs in_features to be a multiple of {self.m}, got {in_features}")

    def mask(self, saliency: Tensor) -> Tensor:
        """The n largest of every group of m.

        saliency  [out_features, in_features], lowest is pruned first

        Returns a bool tensor of the same shape. Raises ValueError when in_features is not a multiple of m.
        """
        self.check(saliency.shape[1])
        groups = saliency.reshape(-1, self.m)
        # filled on the card, where a number of the host's would be waited for
        kept = torch.full((1,), self.n, device=saliency.device).expand(len(groups))
        return _keep_largest(groups, kept).view_as(saliency)


Pattern = Unstructured | NM


def as_pattern(spec: "Pattern | str | float") -> Pattern:
    """Read "2:4", "50%", "0.5" or 0.5; a pattern comes back as it is.

    Raises ValueError for anything else, saying what is understood.
    """
    if isinstance(spec, Unstructured | NM):
        return spec
    text = str(spec).strip()
    n, colon, m = text.partition(":")
    try:
        if colon:
            return NM(int(n), int(m))
        return Unstructured(float(text[:-1]) / 100 if text.endswith("%") else float(text))
    except ValueError as error:
        reason = f": {error}" if "must lie" in str(error) or "is needed" in str(error) else ""
        raise ValueError(f'pattern must be N:M like "2:4" or a sparsity like 0.5, got {spec!r}{reason}') from None


def keep_largest(saliency: Tensor, kept: Sequence[int]) -> Tensor:
    """The kept[i] largest of row i, ties to the lower index, exactly.

    saliency  [rows, columns]
    kept      one count a row, 0..columns

    Returns a bool tensor [rows, columns]. Raises ValueError on NaN.
    """
    return _keep_largest(saliency, torch.tensor(kept, dtype=torch.int64))


def _keep_largest(saliency: Tensor, kept: Tensor) -> Tensor:
    return pick(op.KERNELS, saliency).run(saliency, kept)
