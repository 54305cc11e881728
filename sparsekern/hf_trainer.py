"""hf_trainer: callbacks for transformers' Trainer: a pruned model is fine-tuned with its zeros, or pruned on the way.

    Trainer(model, args, train_dataset=..., callbacks=[KeepZeros()]).train()
    Trainer(model, args, train_dataset=..., callbacks=[GradualPruning("2:4")]).train()

What is pruned is exactly 0 after every optimizer step, and so is its part of the optimizer's state; its gradient is 0
before it is clipped. So each checkpoint holds the zeros, and training resumed from one goes on as if never stopped: the
masks are the zeros of the checkpoint, and those of them that are kept weights stand in its trainer_state.json.

`import sparsekern` leaves this until a callback is asked for, and nothing here imports the Trainer itself.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.trainer_callback import ExportableState, TrainerCallback

from sparsekern.fixed_masks import FixedMasks
from sparsekern.gradual import CubicSchedule, GradualMagnitude
from sparsekern.linear import SparseLinear
from sparsekern.pattern import NM, Pattern, Scope, Unstructured, as_pattern

# name of a parameter -> where its kept weights are zero: start and length of each run, counted in memory order
Runs = dict[str, list[int]]
Spec = Pattern | str | float


class _Masking(TrainerCallback, ExportableState):
    """What both callbacks share: what they refuse, and what a checkpoint must hold beside the weights."""

    def on_init_end(self, args, state, control, model=None, **others) -> None:
        # before hours of tokenising; the model is not there yet when the Trainer has a model_init
        if model is not None:
            _refuse(args, model)

    def _resumed(self, state: Any) -> dict[str, Any] | None:
        """What this callback stored in the checkpoint that is resumed from; None at a start."""
        stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if isinstance(stored, list):
            raise ValueError(f"{type(self).__name__} is among the callbacks {len(stored)} times; give it once")
        return stored and stored["attributes"]


class KeepZeros(_Masking):
    """Fine-tune a pruned model: the zeros that are there when training begins stay exactly zero.

    at_least  the part of a weight's elements that must be zero for it to count as pruned: in half precision a few
              weights are zero by chance, and may move

    Masks are for trainable weights of two or more dimensions, other than embeddings and those that hold nothing but
    zeros, which wait for their first step. `fixed` holds them while training runs. Works with whatever the Trainer
    does on one process or with data parallelism.

    At the start of training raises ValueError for a model that holds no such zeros, a packed one, and sharded ones
    (FSDP, DeepSpeed); at its end when any of the zeros is lost.
    """

    def __init__(self, at_least: float = 0.001):
        if not 0 < at_least <= 1:
            raise ValueError(f"at_least is a part of a weight's elements, 0..1, got {at_least}")
        self.at_least = at_least
        self.fixed: FixedMasks | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **others) -> None:
        _refuse(args, model)
        _refuse_copies(model, optimizer)
        self._let_go()
        masks = _zeros(model, self.at_least)
        self._parameters = dict(model.named_parameters())
        if resumed := self._resumed(state):
            _keep(masks, resumed["kept_zeros"])
        self.fixed = FixedMasks(model, masks).attach(optimizer)

    def on_train_end(self, args, state, control, **others) -> None:
        # the best checkpoint may have been loaded just now
        self.fixed.check()
        self._let_go()

    def state(self) -> dict[str, Any]:
        kept = {} if self.fixed is None else _kept_zeros(self._parameters, self.fixed.masks)
        return {"args": {"at_least": self.at_least}, "attributes": {"kept_zeros": kept}}

    def _let_go(self) -> None:
        if self.fixed is not None:
            self.fixed.detach()
        self.fixed = None


class GradualPruning(_Masking):
    """Prune by magnitude while the Trainer trains, along the cubic schedule of `sparsekern.gradual`.

    pattern     "2:4", "50%" or 0.5; or one for each layer by name, others stay dense
    scope       of an unstructured pattern: "row", "layer" or "model"
    begin, end  the parts of training, 0..1, at which the first and the last weights go; what follows only recovers
    every       optimizer steps from one pruning to the next
    initial     sparsity at the first pruning
    skip        names of layers to leave dense, with wildcards

    `gradual` holds the masks while training runs. Raises ValueError at the start of training as KeepZeros and
    GradualMagnitude do, and for load_best_model_at_end: the best model may be one from before the last pruning.
    """

    def __init__(
        self,
        pattern: Spec | Mapping[str, Spec],
        scope: Scope | None = None,
        begin: float = 0.0,
        end: float = 0.75,
        every: int = 10,
        initial: float = 0.0,
        skip: Iterable[str] = (),
    ):
        if not 0 <= begin < end <= 1:
            raise ValueError(f"begin and end are parts of training, 0 <= begin < end <= 1, got {begin} and {end}")
        self.pattern = {k: _plain(v) for k, v in pattern.items()} if isinstance(pattern, Mapping) else _plain(pattern)
        self.scope, self.begin, self.end = scope, begin, end
        self.every, self.initial, self.skip = every, initial, [skip] if isinstance(skip, str) else list(skip)
        self.gradual: GradualMagnitude | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **others) -> None:
        _refuse(args, model)
        _refuse_copies(model, optimizer)
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end may bring back a model from before the last pruning; train without it"
            )
        self._let_go()
        parts = {"begin": round(self.begin * state.max_steps), "end": round(self.end * state.max_steps)}
        schedule = {**parts, "every": self.every, "initial": self.initial}
        resumed = self._resumed(state)
        if state.global_step and not resumed:
            raise ValueError("the checkpoint was written without GradualPruning; begin a new training from its weights")
        # more epochs than before make no other schedule of what has begun
        schedule = CubicSchedule(**(resumed["settings"]["schedule"] if resumed else schedule))
        gradual = GradualMagnitude(model, self._pattern(), schedule, self.skip)
        self._parameters = dict(model.named_parameters())
        if resumed:
            masks = {name: self._parameters[name].detach() != 0 for name in gradual.masks}
            _keep(masks, resumed["kept_zeros"])
            gradual.load_state_dict({**resumed, "masks": masks})
        self.gradual = gradual.attach(optimizer)

    def on_optimizer_step(self, args, state, control, **others) -> None:
        self.gradual.step()

    def on_train_end(self, args, state, control, **others) -> None:
        self.gradual.check()
        if not self.gradual.finished:
            warnings.warn(
                f"training ended after {self.gradual.steps} optimizer steps, before the last pruning at "
                f"{self.gradual.schedule.end}: sparsity is {self.gradual.sparsity:.1%}, and the pattern does not hold",
                stacklevel=2,
            )
        self._let_go()

    def state(self) -> dict[str, Any]:
        settings = ("pattern", "scope", "begin", "end", "every", "initial", "skip")
        attributes = {}
        if self.gradual is not None:
            attributes = {
                "steps": self.gradual.steps,
                "settings": self.gradual.settings,
                "kept_zeros": _kept_zeros(self._parameters, self.gradual.masks),
            }
        return {"args": {name: getattr(self, name) for name in settings}, "attributes": attributes}

    def _pattern(self) -> Pattern | dict[str, Pattern]:
        def scoped(spec: str | float) -> Pattern:
            pattern = as_pattern(spec)
            return pattern.with_scope(self.scope) if self.scope else pattern

        if isinstance(self.pattern, Mapping):
            return {name: scoped(spec) for name, spec in self.pattern.items()}
        return scoped(self.pattern)

    def _let_go(self) -> None:
        if self.gradual is not None:
            self.gradual.detach()
        self.gradual = None


def _plain(spec: Spec) -> str | float:
    """The pattern as JSON has it."""
    if isinstance(spec, Unstructured) and spec.scope:
        raise ValueError(f"the scope is an argument of its own: GradualPruning({spec.sparsity}, {spec.scope!r})")
    as_pattern(spec)
    return str(spec) if isinstance(spec, NM) else getattr(spec, "sparsity", spec)


def _zeros(model: nn.Module, at_least: float) -> dict[str, Tensor]:
    """The masks that the zeros of the model's trainable weights are, by parameter name."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    masks, frozen = {}, []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in embeddings:
            continue
        kept = parameter.detach() != 0
        if at_least <= 1 - int(kept.sum()) / max(kept.numel(), 1) < 1:
            if parameter.requires_grad:
                masks[name] = kept
            else:
                frozen.append(name)
    if frozen and not masks:
        raise ValueError(
            f"{frozen[0]}: its zeros cannot be lost, because it is frozen, like all {len(frozen)} weights that hold "
            "zeros; model.requires_grad_(True) trains them. Adapters need no KeepZeros, and fill the zeros when merged"
        )
    if not masks:
        raise ValueError(
            f"{type(model).__name__} holds no zeros to keep: in no weight are {at_least:.1%} zero; prune it first, or "
            "use GradualPruning"
        )
    return masks


def _kept_zeros(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> Runs:
    """Where weights that are kept are zero at present."""
    runs = {}
    for name, mask in masks.items():
        places = (mask & (parameters[name].detach() == 0)).flatten().nonzero().flatten()
        if len(places):
            breaks = places.diff(prepend=places[:1] - 2).ne(1).nonzero().flatten()
            lengths = torch.cat([breaks[1:], breaks.new_tensor([len(places)])]) - breaks
            runs[name] = torch.stack([places[breaks], lengths], dim=1).flatten().tolist()
    return runs


def _keep(masks: dict[str, Tensor], runs: Runs) -> None:
    """Take the zeros in `runs` for kept weights."""
    for name, numbers in runs.items():
        # a weight of which only kept ones are zero has no mask
        if name in masks:
            flat = masks[name].view(-1)
            for start, length in zip(numbers[::2], numbers[1::2], strict=True):
                flat[start : start + length] = True


def _refuse(args: Any, model: nn.Module) -> None:
    """Raises ValueError for models whose weights are not whole, or not dense."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            raise ValueError(
                f"{name} is packed, and packed weights are not trained: sparsekern.densify(model) first, then "
                "model.requires_grad_(True)"
            )
    sharded = [n for n, p in model.named_parameters() if hasattr(p, "ds_id") or hasattr(p, "device_mesh")]
    for way in ("fsdp", "deepspeed"):
        if getattr(args, way, None):
            sharded.append(way)
    if sharded:
        raise ValueError(
            f"{sharded[0]}: masks need whole weights, and these are sharded (FSDP, DeepSpeed ZeRO); train on one "
            "device, or with plain data parallelism"
        )


def _refuse_copies(model: nn.Module, optimizer: Optimizer) -> None:
    """Raises ValueError when the optimizer steps something else than the model's parameters."""
    own = {id(parameter) for parameter in model.parameters()}
    foreign = sum(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"])
    if foreign:
        raise ValueError(
            f"the optimizer holds {foreign} tensors that are no parameters of {type(model).__name__}, copies or shards "
            "that masks would not reach; use one that steps the model's own"
        )
