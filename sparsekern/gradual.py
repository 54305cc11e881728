"""GradualMagnitude: magnitude pruning spread over training, a few weights at a time, along a cubic schedule.

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3,   t = t_0, t_0 + dt, ..., t_0 + n dt

after t optimizer steps: many weights go early, when there are many to choose from, few at the end. As in the paper the
masks are made anew from the magnitudes each time, and a pruned weight gets no gradient, so its magnitude is 0 and it
stays pruned: each mask lies within the one before.

The paper prunes each layer's smallest weights. Here any pattern is grown into by one rule: of the weights that the
final pattern would prune now, the smallest go. A group of 2:4 thus never loses more than two on the way, and whatever
the pattern, every layer (for scope "model" the model) has round(s_t * size) pruned, at the end what the pattern says.

    gradual = GradualMagnitude(model, "2:4", CubicSchedule(begin=0, end=800, every=20))
    gradual.attach(optimizer)
    for batch in batches:
        ...                     # loss.backward(); optimizer.step()
        gradual.step()
    gradual.detach()

Source: Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern import hf
from sparsekern.experts import Expert
from sparsekern.fixed_masks import FixedMasks
from sparsekern.pattern import NM, Pattern, Unstructured, as_pattern, keep_largest

Spec = Pattern | str | float
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class CubicSchedule:
    """When to prune, and how much by then; counted in optimizer steps.

    begin    t_0: steps before the first pruning; 0 prunes before the first step, if `initial` says so
    end      t_0 + n dt: steps before the last one, after which the masks are fixed
    every    dt; the last pruning is at `end`, whether or not `every` divides the way there
    initial  s_i, the sparsity at `begin`

    Raises ValueError for a schedule that ends before it begins, and for a sparsity outside 0..1.
    """

    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self):
        if not 0 <= self.begin < self.end:
            raise ValueError(f"a schedule needs 0 <= begin < end, got begin {self.begin} and end {self.end}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        if not 0 <= self.initial <= 1:
            raise ValueError(f"initial sparsity must lie in 0..1, got {self.initial}")

    def prunes_at(self, step: int) -> bool:
        """Whether masks are made anew after `step` optimizer steps."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)

    def sparsity(self, step: int, final: float) -> float:
        """s_t on the way to s_f = `final`: 0 before `begin`, `final` from `end` on."""
        if step < self.begin:
            return 0.0
        left = 1 - min(1.0, (step - self.begin) / (self.end - self.begin))
        return final + (self.initial - final) * left**3


@dataclass(frozen=True, eq=False)
class _Matrix:
    """One W [out_features, in_features] and the parameter that it lies in.

    key   the parameter's name, which experts share
    view  from a tensor of the parameter's shape to W's part of it, [out_features, in_features]
    """

    name: str
    key: str
    parameter: nn.Parameter
    view: Callable[[Tensor], Tensor]
    pattern: Pattern

    def saliency(self, masks: Mapping[str, Tensor]) -> Tensor:
        """|W| [out_features, in_features] float32, and -1 where it is pruned: those go first."""
        size = self.view(self.parameter.detach()).float().abs()
        return size.masked_fill(~self.view(masks[self.key]), -1.0)


class GradualMagnitude:
    """The masks of a model that is pruned while it is trained.

    pattern   "2:4", 0.5, Unstructured(0.9, "model"), ...; or one for each layer by name, others stay dense. An
              unstructured pattern of no scope has scope "layer", as in the paper; "row" and "model" are there too
    schedule  when, and how much by then
    skip      names of layers to leave dense, with wildcards: "*.down_proj"

    The layers are those that prune() takes; in a model without blocks every nn.Linear and convolution, the latter as
    W [out_channels, all else]. Zeros that are there stay, as far as the pattern prunes them. No weight changes until
    `attach`.

    Raises ValueError naming the layer when the pattern does not fit it, it holds more zeros than are asked for, or its
    weight is on the meta device; and for a model with nothing to prune.
    """

    def __init__(
        self, model: nn.Module, pattern: Spec | Mapping[str, Spec], schedule: CubicSchedule, skip: Iterable[str] = ()
    ):
        self.schedule, self.steps = schedule, 0
        self._model, self._optimizers = model, []
        self._matrices = _matrices(model, pattern, schedule, (skip,) if isinstance(skip, str) else tuple(skip))
        # where magnitudes compete, and counts are exact
        across = _across(self._matrices)
        self._scopes = [self._matrices] if across else [[matrix] for matrix in self._matrices]
        self._fixed = FixedMasks(model, self._zeros_that_stay())

    @property
    def masks(self) -> dict[str, Tensor]:
        """By parameter name, bool, True = kept: copies."""
        return self._fixed.masks

    @property
    def sparsity(self) -> float:
        """The fraction of the layers' weights that is pruned now."""
        masks = self.masks
        kept = [matrix.view(masks[matrix.key]) for matrix in self._matrices]
        return 1 - sum(int(mask.sum()) for mask in kept) / sum(mask.numel() for mask in kept)

    @property
    def finished(self) -> bool:
        """Whether the last pruning is done: from then on the masks are fixed, and the pattern holds."""
        return self.steps >= self.schedule.end

    @property
    def settings(self) -> dict[str, Any]:
        """The schedule and each layer's pattern, as JSON takes them."""
        patterns = {matrix.name: repr(matrix.pattern) for matrix in self._matrices}
        return {"schedule": asdict(self.schedule), "patterns": patterns}

    def attach(self, optimizer: Optimizer) -> "GradualMagnitude":
        """Keep what is pruned at zero through every step of `optimizer`; several may share the model.

        Returns self; raises as FixedMasks does.
        """
        self._fixed.attach(optimizer)
        if not any(optimizer is attached for attached in self._optimizers):
            self._optimizers.append(optimizer)
        if self.steps == 0 and self.schedule.prunes_at(0):
            self._prune()
        return self

    def detach(self) -> None:
        """Let go of the optimizers; the zeros stay."""
        self._fixed.detach()
        self._optimizers = []

    def check(self) -> None:
        """Raises ValueError unless every pruned weight is exactly +0.0."""
        self._fixed.check()

    def step(self) -> None:
        """Count one optimizer step, and prune when the schedule says so; call it after each `optimizer.step()`.

        Raises ValueError naming the layer when its weight holds NaN by then.
        """
        self.steps += 1
        if self.schedule.prunes_at(self.steps):
            self._prune()

    def state_dict(self) -> dict[str, Any]:
        """What to save beside the model's and the optimizer's: steps, settings, masks; torch.save takes it."""
        return {"steps": self.steps, "settings": self.settings, "masks": self.masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, on the weights of then. Raises ValueError when its settings are others."""
        mine = self.settings
        for setting, value in state["settings"].items():
            if value != mine[setting]:
                raise ValueError(f"saved with {setting} {value}, and here it is {mine[setting]}; go on with the same")
        self.restore(state["steps"], state["masks"])

    def restore(self, steps: int, masks: Mapping[str, Tensor]) -> None:
        """Go on after `steps` optimizer steps with these masks of the same parameters."""
        self.steps = steps
        self._mask({key: masks[key] for key in self.masks})

    def _zeros_that_stay(self) -> dict[str, Tensor]:
        """The first masks: what is zero and would be pruned anyway."""
        masks = {matrix.key: _all_kept(matrix.parameter) for matrix in self._matrices}
        for scope in self._scopes:
            finals = _finals(scope, masks)
            zero = [matrix.saliency(masks) == 0 for matrix in scope]
            there, asked = sum(int(z.sum()) for z in zero), sum(int((~final).sum()) for final in finals)
            if there > asked:
                raise ValueError(
                    f"{_words(scope)}: {there} weights are zero already, and {scope[0].pattern} prunes {asked}; ask "
                    "for more, or leave it as it is with skip"
                )
            for matrix, final, z in zip(scope, finals, zero, strict=True):
                matrix.view(masks[matrix.key]).copy_(final | ~z)
        return masks

    @torch.no_grad()
    def _prune(self) -> None:
        before = self.masks
        after = {key: _all_kept(mask) for key, mask in before.items()}
        for scope in self._scopes:
            masks = finals = _finals(scope, before)
            if not self.finished:
                pruned = sum(int((~matrix.view(before[matrix.key])).sum()) for matrix in scope)
                masks = self._on_the_way(scope, [matrix.saliency(before) for matrix in scope], finals, pruned)
            for matrix, mask in zip(scope, masks, strict=True):
                matrix.view(after[matrix.key]).copy_(mask)
        self._mask(after)

    def _on_the_way(
        self, scope: list[_Matrix], saliencies: list[Tensor], finals: list[Tensor], pruned: int
    ) -> list[Tensor]:
        """The masks that prune round(s_t * size) of what `finals` prune, and never fewer than the `pruned` ones."""
        # what the final pattern keeps is not to be had
        flat = torch.cat([s.masked_fill(kept, math.inf).view(-1) for s, kept in zip(saliencies, finals, strict=True)])
        count = max(pruned, round(self.schedule.sparsity(self.steps, scope[0].pattern.sparsity) * len(flat)))
        mask = keep_largest(flat[None], [len(flat) - count])[0]
        parts = mask.split([saliency.numel() for saliency in saliencies])
        return [part.view_as(saliency) for part, saliency in zip(parts, saliencies, strict=True)]

    def _mask(self, masks: Mapping[str, Tensor]) -> None:
        self._fixed.detach()
        self._fixed = FixedMasks(self._model, masks)
        for optimizer in self._optimizers:
            self._fixed.attach(optimizer)


def _all_kept(like: Tensor) -> Tensor:
    # not ones_like: in another order of memory a view of it could not be written to
    return torch.ones(like.shape, dtype=torch.bool, device=like.device)


def _finals(scope: list[_Matrix], masks: Mapping[str, Tensor]) -> list[Tensor]:
    """What each matrix would keep if it were pruned to its pattern now."""
    saliencies = {matrix.name: matrix.saliency(masks) for matrix in scope}
    for name, saliency in saliencies.items():
        if saliency.isnan().any():
            raise ValueError(f"{name}: weight holds {int(saliency.isnan().sum())} NaN values")
    patterns = {matrix.name: matrix.pattern for matrix in scope}
    if _across(scope):
        patterns = scope[0].pattern.spread(saliencies)
    return [patterns[name].mask(saliency) for name, saliency in saliencies.items()]


def _across(matrices: list[_Matrix]) -> bool:
    """Whether the weights of all layers compete."""
    return any(isinstance(m.pattern, Unstructured) and m.pattern.scope == "model" for m in matrices)


def _words(scope: list[_Matrix]) -> str:
    return scope[0].name if len(scope) == 1 else f"all {len(scope)} layers together"


def _matrices(
    model: nn.Module, pattern: Spec | Mapping[str, Spec], schedule: CubicSchedule, skip: tuple[str, ...]
) -> list[_Matrix]:
    """The layers to prune, each checked against its pattern. Raises ValueError as GradualMagnitude does."""
    layers = _layers(model)
    for glob in skip:
        if not any(fnmatch(name, glob) for name, _ in layers):
            raise ValueError(f"skip {glob!r} names no layer{_first(layers)}")
    layers = [(name, layer) for name, layer in layers if not any(fnmatch(name, glob) for glob in skip)]
    if isinstance(pattern, Mapping):
        if unknown := pattern.keys() - {name for name, _ in layers}:
            raise ValueError(f"pattern names {sorted(unknown)[0]!r}, which is no layer{_first(layers)}")
        layers = [(name, layer) for name, layer in layers if name in pattern]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer to prune: no nn.Linear or convolution that is not skipped"
        )
    keys = {id(parameter): key for key, parameter in model.named_parameters()}
    found = []
    for name, layer in layers:
        own = as_pattern(pattern[name] if isinstance(pattern, Mapping) else pattern).with_scope("layer")
        parameter = hf.parameter(layer)
        found.append(_Matrix(name, keys[id(parameter)], parameter, _view(layer), own))
        _check(found[-1], layer, schedule)
    if _across(found) and len({matrix.pattern for matrix in found}) > 1:
        raise ValueError('scope "model" is one pattern for all layers; give them other scopes to tell them apart')
    return found


def _layers(model: nn.Module) -> list[tuple[str, hf.Layer]]:
    """What prune() takes; without blocks every linear layer and convolution, whose weight is a parameter of its own."""
    try:
        return hf.layers(model)
    except hf.UnknownModelError:
        parameters = {id(parameter) for parameter in model.parameters()}
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and id(module.weight) in parameters:
                found.setdefault(id(module.weight), (name or type(module).__name__, module))
        return list(found.values())


def _view(layer: hf.Layer) -> Callable[[Tensor], Tensor]:
    """From a tensor of the shape of the layer's parameter to W's part of it."""
    if isinstance(layer, Expert):
        return lambda tensor: tensor[layer.index].T if layer.transposed else tensor[layer.index]
    if isinstance(layer, CONVOLUTIONS):
        return lambda tensor: tensor.flatten(1)
    # transformers' Conv1D holds W^T
    return (lambda tensor: tensor) if isinstance(layer, nn.Linear) else lambda tensor: tensor.T


def _check(matrix: _Matrix, layer: hf.Layer, schedule: CubicSchedule) -> None:
    """Raises ValueError, naming the layer, when its pattern cannot be grown into."""
    name, pattern = matrix.name, matrix.pattern
    if matrix.parameter.is_meta:
        raise ValueError(f"{name}: weight is on the meta device; load the model without offloading (device_map=None)")
    if isinstance(pattern, NM) and isinstance(layer, CONVOLUTIONS):
        kind = type(layer).__name__
        raise ValueError(f"{name}: pattern {pattern} is of a linear layer's inputs, and this is a {kind}; use skip")
    if isinstance(pattern, Unstructured) and pattern.scope == "block":
        raise ValueError(
            f'{name}: scope "block" is for solvers; magnitudes compete in a "row", a "layer" or the "model"'
        )
    if schedule.initial > pattern.sparsity:
        raise ValueError(f"{name}: a schedule from {schedule.initial:.0%} cannot end at pattern {pattern}")
    try:
        pattern.check(matrix.view(matrix.parameter).shape[1])
    except ValueError as error:
        raise ValueError(f"{name}: {error}; leave the layer dense with skip") from None


def _first(layers: list[tuple[str, hf.Layer]]) -> str:
    return f"; the first one is {layers[0][0]}" if layers else "; there is none"
