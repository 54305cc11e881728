"""allocate(): how sparse each layer is to be, when the model as a whole is to be so sparse.

Candidates propose a sparsity for every layer, all with the same number of zeros in sum:

    Uniform    every layer the same
    OWL        blocks with many outliers stay denser: Yin et al. 2023, https://arxiv.org/abs/2310.05175
    LossAware  what the loss loses by a layer's error is estimated at several sparsities and its sum minimised; ours

The last one expands the loss around the dense model. With G_i the mean squared gradient of the loss with respect to
output i of a layer, and D(s) = W - W' the change that pruning to sparsity s makes,

    cost(s) = sum_i G_i [D(s) H D(s)^T]_ii,     G_i = sum_j F_ij / tr H,     F the mean squared gradient of W

and layers with n weights get s = argmin cost(s) - price * n * s, one price for all (Everett 1963) such that the sum of
zeros is the one asked for.

None of the estimates is believed: the model is pruned by each proposal, its loss is measured on calibration batches
that pruning did not see, and the lowest wins; on a tie the one that stands first, which by default is Uniform.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

from sparsekern import hf
from sparsekern.batches import Batch, read_batches
from sparsekern.calibrate import Walk
from sparsekern.gradients import mean_loss, squared_gradients
from sparsekern.methods import SparseGPT
from sparsekern.oneshot import prune, select
from sparsekern.pattern import Pattern, Unstructured, as_pattern
from sparsekern.stats import Gram, InputNorm

# every eighth batch, and at least one, decides
HELD_OUT_PARTS = 8
# the gradients of so many batches are enough to weigh layers against each other
GRADIENT_BATCHES = 32


class Candidate(Protocol):
    """What proposes how sparse each layer is to be; its settings are a frozen dataclass."""

    def propose(
        self, model: nn.Module, layers: Mapping[str, hf.Layer], pattern: Unstructured, batches: Sequence[Batch]
    ) -> dict[str, float]:
        """A sparsity for each of the layers; the model stays as it is. What they sum up to is made right after."""


@dataclass(frozen=True)
class Uniform:
    """Every layer the same."""

    def propose(
        self, model: nn.Module, layers: Mapping[str, hf.Layer], pattern: Unstructured, batches: Sequence[Batch]
    ) -> dict[str, float]:
        return dict.fromkeys(layers, pattern.sparsity)


@dataclass(frozen=True)
class OWL:
    """Blocks in which more of Wanda's saliencies are outliers stay denser.

    outlier  times the mean saliency of its block is what an outlier exceeds (M)
    width    how far a block may be from the sparsity asked for (lambda)
    """

    outlier: float = 5.0
    width: float = 0.08

    def propose(
        self, model: nn.Module, layers: Mapping[str, hf.Layer], pattern: Unstructured, batches: Sequence[Batch]
    ) -> dict[str, float]:
        saliencies: dict[str, list[Tensor]] = {}
        ratios: dict[str, float] = {}
        blocks = {name: block for block, _ in hf.blocks(model) for name in layers if name.startswith(f"{block}.")}
        last = None
        for name, layer, stats in Walk(model, batches, InputNorm):
            if name not in layers:
                continue
            if blocks[name] != last and last is not None:
                ratios[last] = self._outliers(saliencies.pop(last))
            last = blocks[name]
            saliencies.setdefault(last, []).append((hf.weight(layer).float().abs() * stats.norm).flatten())
        ratios |= {block: self._outliers(rest) for block, rest in saliencies.items()}
        lowest, highest = min(ratios.values()), max(ratios.values())
        scale = 2 * self.width / (highest - lowest) if highest > lowest else 0.0
        middle = sum(ratios.values()) / len(ratios)
        return {name: pattern.sparsity - scale * (ratios.get(blocks[name], middle) - middle) for name in layers}

    def _outliers(self, saliencies: list[Tensor]) -> float:
        whole = sum(float(part.sum(dtype=torch.float64)) for part in saliencies)
        size = sum(part.numel() for part in saliencies)
        return sum(int((part > self.outlier * whole / size).sum()) for part in saliencies) / size


@dataclass(frozen=True)
class LossAware:
    """The least sum of what the loss is estimated to lose by each layer's error.

    width   how far a layer may be from the sparsity asked for
    points  sparsities at which each layer is pruned on trial; between them the logarithm of the cost is interpolated
    solver  the method that prunes on trial, with a Gram matrix
    """

    width: float = 0.15
    points: int = 5
    solver: Any = field(default=SparseGPT(), repr=False)

    def propose(
        self, model: nn.Module, layers: Mapping[str, hf.Layer], pattern: Unstructured, batches: Sequence[Batch]
    ) -> dict[str, float]:
        gradients = {
            name: stats.mean_square.sum(dim=1)
            for name, _, stats in squared_gradients(model, batches[:GRADIENT_BATCHES], layers)
        }
        low, high = max(pattern.sparsity - self.width, 0.0), min(pattern.sparsity + self.width, 1.0)
        tried = torch.linspace(low, high, self.points, dtype=torch.float64)
        costs: dict[str, Tensor] = {}
        for name, layer, stats in Walk(model, batches, Gram):
            if name in gradients:
                costs[name] = self._costs(hf.weight(layer), stats, gradients.pop(name), tried.tolist())
            del stats
        grid = torch.linspace(low, high, 301, dtype=torch.float64)
        sizes = {name: hf.weight(layers[name]).numel() for name in costs}
        curves = {name: _interpolated(cost, self.points, len(grid)) for name, cost in costs.items()}
        return dict.fromkeys(layers, pattern.sparsity) | _cheapest(curves, sizes, grid, pattern.sparsity)

    @torch.no_grad()
    def _costs(self, weight: Tensor, stats: Gram, gradient: Tensor, tried: list[float]) -> Tensor:
        w, h = weight.float(), stats.hessian
        sensitivity = gradient / h.diagonal().sum().clamp(min=1e-30)
        changes = (w - self.solver.prune(weight, stats, Unstructured(sparsity)).float() for sparsity in tried)
        costs = [float(sensitivity @ ((d @ h) * d).sum(dim=1)) for d in changes]
        return torch.tensor(costs, dtype=torch.float64)


# what the command line calls a choice of candidates: whatever is compared, Uniform is among it
CANDIDATES = {"owl": (Uniform(), OWL()), "loss": (Uniform(), LossAware()), "best": (Uniform(), OWL(), LossAware())}


@dataclass(frozen=True)
class Proposal:
    """What one candidate proposed, and the held-out loss of the model that was pruned by it."""

    candidate: str
    sparsities: dict[str, float]
    loss: float


@dataclass
class AllocationReport:
    """What was proposed; `chosen` is the proposal with the lowest loss, `dense_loss` that of the model as it was."""

    method: str
    pattern: Unstructured
    held_out_batches: int
    dense_loss: float
    proposals: list[Proposal] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def chosen(self) -> Proposal:
        # min() takes the first of equals
        return min(self.proposals, key=lambda proposal: proposal.loss)

    @property
    def patterns(self) -> dict[str, Unstructured]:
        """The chosen pattern of each layer by name, as prune() takes them."""
        return _patterns(self.pattern, self.chosen.sparsities)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "chosen": self.chosen.candidate}

    def __str__(self) -> str:
        lines = [
            f"{proposal.candidate}: held-out loss {proposal.loss:.4f}, sparsity of layers "
            f"{min(proposal.sparsities.values()):.1%} to {max(proposal.sparsities.values()):.1%}"
            for proposal in self.proposals
        ]
        return "\n".join([*lines, f"chosen for {self.pattern}: {self.chosen.candidate}, {self.seconds:.1f} s"])


def allocate(
    model: nn.Module,
    method: Any,
    pattern: Pattern | str | float,
    calibration: Iterable[Any],
    *,
    candidates: Sequence[Candidate] = (Uniform(), OWL(), LossAware()),
    skip: Iterable[str] = (),
    progress: bool = False,
) -> AllocationReport:
    """Choose a sparsity for each layer such that `pattern` holds over all of them, by the loss on held-out batches.

    method       what the model will be pruned by; each candidate's proposal is tried with it
    pattern      a sparsity; its scope is every layer's
    calibration  at least two batches, as prune() takes them, with labels where they are dicts: an eighth is held out
    candidates   whose proposals are compared; of equal losses the first wins

    The sum of zeros is exact: round(sparsity * weights of all layers). The model comes back as it was given. Raises
    ValueError for an N:M pattern or scope "model", fewer than two batches or no candidate; TypeError for a model that
    gives no loss.
    """
    started = time.perf_counter()
    pattern, batches = as_pattern(pattern), read_batches(calibration)
    if not isinstance(pattern, Unstructured):
        raise ValueError(f"pattern {pattern} gives every layer the same sparsity; allocate takes a sparsity like 0.5")
    if pattern.scope == "model":
        raise ValueError('scope "model" chooses the sparsity of each layer itself; give allocate another scope')
    if len(batches) < 2:
        raise ValueError("allocate needs at least two calibration batches, one of them to be held out, got 1")
    if not candidates:
        raise ValueError("allocate needs at least one candidate, got none")
    layers = dict(select(model, pattern, skip, method)[0])
    held_out = max(len(batches) // HELD_OUT_PARTS, 1)
    batches, unseen = batches[:-held_out], batches[-held_out:]
    report = AllocationReport(repr(method), pattern, held_out, mean_loss(model, unseen))
    sizes = {name: hf.weight(layer).numel() for name, layer in layers.items()}
    kept = {name: hf.weight(layer).to("cpu", copy=True) for name, layer in layers.items()}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, disable=not progress, console=Console(stderr=True)) as bar:
        task = bar.add_task("allocating", total=len(candidates))
        for candidate in candidates:
            bar.update(task, description=f"allocating: {type(candidate).__name__}")
            sparsities = _exact(candidate.propose(model, layers, pattern, batches), sizes, pattern)
            try:
                prune(model, method, _patterns(pattern, sparsities), batches, skip=skip, errors=False)
                loss = mean_loss(model, unseen)
            finally:
                for name, layer in layers.items():
                    hf.weight(layer).copy_(kept[name])
            report.proposals.append(Proposal(repr(candidate), sparsities, loss))
            bar.advance(task)
    report.seconds = time.perf_counter() - started
    return report


def _patterns(pattern: Unstructured, sparsities: Mapping[str, float]) -> dict[str, Unstructured]:
    return {name: replace(pattern, sparsity=sparsity) for name, sparsity in sparsities.items()}


def _exact(proposed: Mapping[str, float], sizes: Mapping[str, int], pattern: Unstructured) -> dict[str, float]:
    """The proposal, all of it shifted, kept within 0..1 and rounded so that the sum of zeros is the pattern's."""
    n = torch.tensor([sizes[name] for name in proposed], dtype=torch.float64)
    s = torch.tensor(list(proposed.values()), dtype=torch.float64)
    total = round(pattern.sparsity * sum(sizes.values()))
    low, high = -float(s.max()), 1 - float(s.min())
    for _ in range(100):
        shift = (low + high) / 2
        low, high = (shift, high) if (n * (s + shift).clamp(0, 1)).sum() < total else (low, shift)
    zeros = n * (s + high).clamp(0, 1)
    counts = zeros.floor()
    missing = total - int(counts.sum())
    # the largest remainders are rounded up, and never a full layer
    remainder = (zeros - counts).where(counts < n, -1.0)
    counts[remainder.argsort(descending=True, stable=True)[:missing]] += 1
    return {name: int(count) / sizes[name] for name, count in zip(proposed, counts.tolist(), strict=True)}


def _interpolated(cost: Tensor, points: int, count: int) -> Tensor:
    """The cost at `count` even steps from its first point to its last, its logarithm linear in between."""
    logarithm = cost.clamp(min=1e-30).log()
    at = torch.linspace(0, points - 1, count, dtype=torch.float64)
    left = at.floor().clamp(max=points - 2).long()
    return torch.lerp(logarithm[left], logarithm[left + 1], at - left).exp()


def _cheapest(curves: dict[str, Tensor], sizes: dict[str, int], grid: Tensor, sparsity: float) -> dict[str, float]:
    """Where each curve is lowest when zeros earn a price, the price that gives `sparsity` over all weights."""
    names = list(curves)
    cost = torch.stack([curves[name] for name in names])
    n = torch.tensor([sizes[name] for name in names], dtype=torch.float64)

    def at(price: float) -> Tensor:
        return grid[(cost - price * n[:, None] * grid).argmin(dim=1)]

    low, high = 0.0, float(cost.max() / n.min()) * len(grid) + 1e-30
    for _ in range(100):
        price = (low + high) / 2
        low, high = (price, high) if (n * at(price)).sum() < sparsity * n.sum() else (low, price)
    return dict(zip(names, at(high).tolist(), strict=True))
