"""permute(): put channels in an order that N:M pruning loses less in, and leave what the model says as it is.

An order of the inputs of one layer is undone by the same order of the outputs of those before it (channel_sites.py),
so it costs nothing when the model runs. It is chosen to keep the most of Wanda's saliency w_ij^2 h_jj under an N:M mask
(channel_order.py), h_jj the mean square of input j on the calibration tokens. Saliencies that know the inverse Hessian
were tried, w_ij^2 / [H^-1]_jj: after SparseGPT they were no better on held-out tokens.

That a site changes nothing is tried on the model before it is used: all of them at once in a random order, and when
something the model or a consumer puts out on the first batch has moved by more than rounding, halves of them, until
those at fault are found and left alone.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from sparsekern import channel_order, hf
from sparsekern.calibrate import Walk
from sparsekern.channel_sites import Site, find
from sparsekern.pattern import NM, Pattern, as_pattern
from sparsekern.stats import InputNorm

# the relative change of an output that summing in another order may cause, through all blocks; a channel out of place
# changes its consumer's output by about 1
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# random directions that an output is projected on, so that all layers' outputs can be held at once
DIRECTIONS = 8


@dataclass(frozen=True)
class SiteReport:
    """What permuting did at one layer.

    layer, before  whose inputs were put in another order, and the layers whose outputs followed
    retained       the part of the saliency that an N:M mask keeps in the order it had; None where none was looked for
    permuted       the same in the order found
    kept           the order found is in place
    why            why not
    """

    layer: str
    before: tuple[str, ...] = ()
    retained: float | None = None
    permuted: float | None = None
    kept: bool = False
    why: str | None = None
    seconds: float = 0.0


@dataclass
class PermuteReport:
    """What permuting did to a model; `difference` is the relative change of its output on the first batch."""

    pattern: str
    sites: list[SiteReport] = field(default_factory=list)
    difference: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        kept = [site for site in self.sites if site.kept]
        lines = [f"{site.layer}: stays in its order: {site.why}" for site in self.sites if not site.kept]
        lost = [
            1 - sum(getattr(site, order) for site in kept) / max(len(kept), 1) for order in ("retained", "permuted")
        ]
        gain = f", saliency lost to {self.pattern} {lost[0]:.2%} -> {lost[1]:.2%}" if kept else ""
        output = f"output moved by {self.difference:.1e}"
        lines.append(f"permuted the inputs of {len(kept)} layers{gain}; {output}; {self.seconds:.1f} s")
        return "\n".join(lines)


def permute(
    model: nn.Module, pattern: Pattern | str, calibration: Iterable[Any], *, seed: int = 0, progress: bool = False
) -> PermuteReport:
    """Reorder channels inside the model's blocks, in place, so that pruning to N:M loses less.

    pattern      "2:4" or another N:M; what is pruned to N:M already keeps its order
    calibration  batches, as prune() takes them
    seed         of the search: the same gives the same order
    progress     show a progress bar on standard error

    What the model puts out stays the same but for rounding: a layer where it would not stays as it was, and the report
    says so. Raises ValueError for a pattern that is not N:M, and for what calibrate.Walk refuses.
    """
    started = time.perf_counter()
    pattern = as_pattern(pattern)
    if not isinstance(pattern, NM):
        raise ValueError(f"permuting channels helps N:M patterns only: {pattern} keeps weights wherever they stand")
    walk = Walk(model, calibration, InputNorm)
    layers, (sites, refused) = dict(hf.layers(model)), find(model)
    mean_squares = {}
    for name, _, stats in walk:
        if name in sites:
            mean_squares[name] = stats.norm.square() / max(stats.tokens, 1)
        del stats
    refused |= {name: why for name, site in sites.items() if (why := _unfit(site, pattern, name in mean_squares))}
    generator = torch.Generator().manual_seed(seed)
    trial = _Trial(walk, layers, [site for name, site in sites.items() if name not in refused], generator)
    refused |= trial.at_fault()
    report = PermuteReport(str(pattern), [SiteReport(name, why=why) for name, why in refused.items()])
    orders = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress, console=Console(stderr=True)) as bar:
        task = bar.add_task("permuting", total=len(sites) - len(refused.keys() & sites.keys()))
        for name, site in sites.items():
            if name in refused:
                continue
            bar.update(task, description=name)
            begun = time.perf_counter()
            saliency = _saliency(site, hf.weight(layers[name]), mean_squares[name])
            order = channel_order.search(saliency, pattern, generator)
            row = _describe(site, saliency, order, pattern)
            if row.kept:
                site.reorder(layers, order)
                orders[name] = order
            report.sites.append(replace(row, seconds=time.perf_counter() - begun))
            bar.advance(task)
    report.difference = trial.difference()
    if not report.difference <= trial.tolerance:
        # sites that passed the trial do not come here, unless the model does not put out the same twice
        for name, order in orders.items():
            sites[name].reorder(layers, order.argsort(1))
        why = f"undone: together they moved the output by {report.difference:.1e}, more than rounding does"
        report.sites = [replace(row, kept=False, why=why) if row.kept else row for row in report.sites]
        report.difference = trial.difference()
    report.seconds = time.perf_counter() - started
    return report


def _unfit(site: Site, pattern: NM, called: bool) -> str | None:
    units, copies, channels = site.columns.shape
    if not called:
        return "never called on the calibration batches"
    if channels % pattern.m:
        what = "a head" if units * copies > 1 else "the layer"
        return f"{what} has {channels} channels, not a multiple of {pattern.m}"
    return None


def _saliency(site: Site, weight: Tensor, mean_square: Tensor) -> Tensor:
    """w_ij^2 h_jj as [units, channels, copies * out_features]: a unit's copies are more rows of the same channels."""
    saliency = weight.float().square() * mean_square
    return saliency[:, site.columns.flatten()].unflatten(1, site.columns.shape).permute(1, 3, 2, 0).flatten(2)


def _describe(site: Site, saliency: Tensor, order: Tensor, pattern: NM) -> SiteReport:
    own = torch.arange(order.shape[1], device=order.device).expand_as(order)
    kept = [float(channel_order.retained(saliency, some, pattern).sum()) for some in (own, order)]
    whole = float(saliency.sum(dtype=torch.float64)) or 1.0
    moved = not torch.equal(order, own)
    return SiteReport(
        layer=site.consumer,
        before=tuple(dict.fromkeys(name for name, _ in site.producers)),
        retained=kept[0] / whole,
        permuted=kept[1] / whole,
        kept=moved,
        why=None if moved else "no order was found that retains more",
    )


class _Trial:
    """Whether the model, and every consumer in it, still puts out what it did when the trial was made."""

    def __init__(self, walk: Walk, layers: dict[str, nn.Module], sites: list[Site], generator: torch.Generator):
        # sites of one kind stand together, because they fail together
        self._sites = sorted(sites, key=lambda site: [part for part in site.consumer.split(".") if not part.isdigit()])
        self._walk, self._layers, self._generator = walk, layers, generator
        self._directions = {
            site.consumer: torch.randn(len(hf.weight(layers[site.consumer])), DIRECTIONS, generator=generator)
            for site in sites
        }
        self._model_before, self._consumers_before = self._run()
        self.tolerance = max(TOLERANCE[layer.weight.dtype] for layer in layers.values())

    def at_fault(self) -> dict[str, str]:
        """The sites that change what is put out, by consumer, with the reason. The model is left as it was."""
        return self._faults_among(self._sites) if self._sites else {}

    def difference(self) -> float:
        """The largest relative change of what the model puts out."""
        return _change(self._run()[0], self._model_before)

    def _faults_among(self, sites: list[Site]) -> dict[str, str]:
        orders = [torch.rand(site.columns.shape[::2], generator=self._generator).argsort(1) for site in sites]
        for site, order in zip(sites, orders, strict=True):
            site.reorder(self._layers, order.to(site.columns.device))
        try:
            model, consumers = self._run()
        finally:
            for site, order in zip(sites, orders, strict=True):
                site.reorder(self._layers, order.argsort(1).to(site.columns.device))
        change = _change(model + consumers, self._model_before + self._consumers_before)
        if change <= self.tolerance:
            return {}
        if len(sites) == 1:
            return {
                sites[0].consumer: f"another order changes what is put out by {change:.1e}: "
                f"something between or beside these layers tells their channels apart"
            }
        half = len(sites) // 2
        return self._faults_among(sites[:half]) | self._faults_among(sites[half:])

    def _run(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the model puts out on the first batch, and what each consumer does, projected [tokens, DIRECTIONS]."""
        seen: dict[str, list[Tensor]] = {name: [] for name in self._directions}

        def projector(name: str) -> Callable:
            def hook(layer: nn.Module, args: tuple, output: Tensor) -> None:
                seen[name].append(
                    output.reshape(-1, output.shape[-1]).float() @ self._directions[name].to(output.device)
                )

            return hook

        with ExitStack() as hooks:
            for name in seen:
                hooks.callback(self._layers[name].register_forward_hook(projector(name)).remove)
            output = list(_tensors(self._walk.first_output()))
        return output, [torch.cat(calls) for calls in seen.values()]


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a model puts out."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.float()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _change(now: list[Tensor], before: list[Tensor]) -> float:
    """The largest ||now - before|| / ||before||; infinite when a shape has changed."""
    if [tensor.shape for tensor in now] != [tensor.shape for tensor in before]:
        return float("inf")
    # max() would lose a NaN
    return float(
        torch.tensor(
            [0.0, *((a - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(now, before, strict=True))]
        ).max()
    )
