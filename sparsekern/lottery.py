"""find_ticket: iterative magnitude pruning with rewinding, for any module and any training function.

Round 0 trains the dense network, theta_0 -> theta_T. Every further round

    m      <- m without the round(rate * |m|) kept weights that are smallest after training
    theta  <- m * theta_k                    rewinding: k = 0, or late, k > 0
              m * theta_T                    learning-rate rewinding: only the training starts over
    theta  <- trained from step k to T, the mask held

A mask whose network trains to the dense one's quality is a winning ticket.

Sources: Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019, https://arxiv.org/abs/1803.03635 (k = 0); Frankle
et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020, https://arxiv.org/abs/1912.05671 (k > 0);
Renda et al., Comparing Rewinding and Fine-tuning in Neural Network Pruning, ICLR 2020,
https://arxiv.org/abs/2003.02389 (learning-rate rewinding).
"""

import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsekern.fixed_masks import FixedMasks, Select
from sparsekern.lottery_journal import Journal, digest
from sparsekern.methods import Magnitude
from sparsekern.pattern import Unstructured
from sparsekern.training import Training

Masks = dict[str, Tensor]
State = dict[str, Tensor]
Train = Callable[[nn.Module, Training], Mapping[str, Any] | None]
LOST = "lost_in."  # before a parameter's name, in a round's file


@dataclass(frozen=True)
class Round:
    """One training.

    kept     weights that were trained, of the `size` that can be pruned
    layers   the same by parameter name, as (kept, size)
    steps    that the optimizer took
    metrics  what `train` returned
    """

    round: int
    kept: int
    size: int
    layers: dict[str, tuple[int, int]]
    steps: int
    metrics: dict[str, Any]

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.size

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Round":
        layers = {name: tuple(counts) for name, counts in entry["layers"].items()}
        return cls(entry["round"], entry["kept"], entry["size"], layers, entry["steps"], entry["metrics"])

    def to_json(self) -> dict[str, Any]:
        """What json.dumps takes."""
        return {**asdict(self), "sparsity": self.sparsity}

    def __str__(self) -> str:
        metrics = ", ".join(f"{name} {_short(value)}" for name, value in self.metrics.items())
        return f"round {self.round}: {self.kept:,} of {self.size:,} weights ({self.kept / self.size:.2%}); {metrics}"


@dataclass(frozen=True, eq=False)
class Ticket:
    """What a search found: the masks of every round, and the weights that they are rewound to.

    theta    the state of the model at the rewinding step
    lost_in  by parameter name, int16: the round that a weight was pruned before; 0: it is still there
    """

    rounds: list[Round]
    theta: State
    lost_in: dict[str, Tensor]
    settings: dict[str, Any]

    def masks(self, round: int = -1) -> Masks:
        """By parameter name, True = kept, as `round` was trained with; -1: the last."""
        number = self.rounds[round].round
        return {name: (lost == 0) | (lost > number) for name, lost in self.lost_in.items()}

    def rewind(self, model: nn.Module, round: int = -1) -> FixedMasks:
        """Put theta_k * mask of `round` into `model`; returns the masks, to attach to the optimizer that trains it."""
        model.load_state_dict(self.theta)
        masks = FixedMasks(model, self.masks(round))
        masks.apply()
        return masks

    def to_json(self) -> dict[str, Any]:
        """What json.dumps takes: no weights."""
        return {"settings": self.settings, "rounds": [one.to_json() for one in self.rounds]}

    def __str__(self) -> str:
        return "\n".join(str(one) for one in self.rounds)


def find_ticket(
    model: nn.Module,
    train: Train,
    rate: float = 0.2,
    rounds: int = 10,
    rewind_step: int = 0,
    scope: Literal["model", "layer"] = "model",
    *,
    rewind_weights: bool = True,
    select: Select | None = None,
    seed: int = 0,
    directory: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    after_round: Callable[[Round], object] = lambda _: None,
) -> Ticket:
    """Prune `model` in `rounds` rounds, training it before each and after the last; it is left as the last trained it.

    train           called once a round with the model and a Training; trains in place, may return metrics
    rate            of the weights that are left, pruned each round
    rewind_step     k: back to the weights after k optimizer steps, and training starts from there
    scope           where magnitudes compete: all layers, or each layer on its own
    rewind_weights  False: learning-rate rewinding; the weights stay as trained, only training goes back to step k
    select          called with name and parameter: may it be pruned? None: the weights of linear, convolutional,
                    recurrent and attention layers, but none that an embedding shares; never a bias or a norm
    seed            of torch, random and numpy at the beginning of every round, so that a round depends on the weights
                    alone; yours are put back at the end. For the same reason no gradient is left over from the round
                    before, and training modes and requires_grad are those that `model` came with
    directory       where every round is recorded. The same call continues a run that was killed, bit for bit on the
                    same machine, and one with more rounds continues a finished one
    settings        what `train` depends on, as JSON: recorded, and another one is refused on continuing
    after_round     called with each round, recorded ones too

    `train` makes its own optimizer, attaches it before it changes anything, and begins at `training.start`:

        def train(model, training):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            training.attach(optimizer)                      # holds the mask, counts the steps
            for step in range(training.start, 1000):        # 0, then rewind_step
                x, y = batch(step)
                optimizer.param_groups[0]["lr"] = rate_at(step)
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
            return {"accuracy": accuracy(model)}

        ticket = find_ticket(model, train, rounds=10, rewind_step=100)
        masks = ticket.rewind(model, round=5)               # the ticket itself, untrained

    Raises ValueError for settings that make no sense, for a `train` that attaches no optimizer, changes or replaces
    weights on its own, brings an optimizer that has stepped before, leaves a prunable parameter out, ignores
    `training.start`, or ends before step k, and when weights are NaN after training.
    """
    _check(rate, rounds, rewind_step, scope)
    select = select or _prunable(model)
    sizes = {name: list(p.shape) for name, p in model.named_parameters() if select(name, p) and _check_size(name, p)}
    if not any(math.prod(size) for size in sizes.values()):
        raise ValueError(f"{type(model).__name__} has no weight that may be pruned; say with `select` which may")
    described = {
        **{"rate": rate, "rewind_step": rewind_step, "rewind_weights": rewind_weights, "scope": scope, "seed": seed},
        "settings": dict(settings or {}),
        "parameters": sizes,
        "sha256 of the model's first weights": digest(_state(model)),
    }
    search = _Search(model, train, list(sizes), described)
    with Journal.open(directory, described) if directory is not None else nullcontext() as journal, _own_randomness():
        if journal is not None:
            search.resume(journal, rounds)
            for one in search.rounds:
                after_round(one)
        for number in range(len(search.rounds), rounds + 1):
            after_round(search.next(number, journal))
    return Ticket(search.rounds, search.theta, search.lost_in, described)


def shrink(weights: Mapping[str, Tensor], masks: Masks, rate: float, scope: Literal["model", "layer"]) -> Masks:
    """The masks without the round(rate * kept) smallest of the kept weights.

    weights  by name, any shape
    masks    by name, True = kept

    Scope "model" counts over all of them together, "layer" each for itself. Raises ValueError on NaN.
    """
    # a pruned weight ranks below every kept one, so masks are nested and counts exact
    flat = {}
    for name, weight in weights.items():
        magnitude = Magnitude().saliency(weight.detach().flatten(1), None)
        flat[name] = magnitude.where(masks[name].flatten(1), -1.0)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}

    def pattern(left: int, size: int, scope: str) -> Unstructured:
        return Unstructured(1 - (left - round(rate * left)) / max(size, 1), scope)

    if scope == "model":
        patterns = pattern(sum(kept.values()), sum(s.numel() for s in flat.values()), "model").spread(flat)
    else:
        patterns = {name: pattern(kept[name], saliency.numel(), "layer") for name, saliency in flat.items()}
    return {name: patterns[name].mask(saliency).view_as(weights[name]) for name, saliency in flat.items()}


def trained(directory: str | Path, round: int) -> State:
    """The state that a recorded round ended with, for load_state_dict.

    Raises ValueError when `directory` holds no search, or not that round.
    """
    journal = Journal.read(directory)
    if not 0 <= round < len(journal.rounds):
        raise ValueError(f"{str(directory)!r} holds rounds 0..{len(journal.rounds) - 1}, got round = {round}")
    return {name: value for name, value in journal.tensors(round).items() if not name.startswith(LOST)}


class _Search:
    """The state between two rounds."""

    def __init__(self, model: nn.Module, train: Train, names: list[str], settings: dict[str, Any]):
        self.model, self.train, self.names, self.settings = model, train, names, settings
        self.rounds: list[Round] = []
        self.lost_in = {name: torch.zeros(model.get_parameter(name).shape, dtype=torch.int16) for name in names}
        self.theta: State = {}
        self._modes = [(module, module.training) for module in model.modules()]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def resume(self, journal: Journal, rounds: int) -> None:
        """Take over what was recorded."""
        if len(journal.rounds) > rounds + 1:
            raise ValueError(f"{len(journal.rounds) - 1} rounds are recorded already, got rounds = {rounds}")
        self.rounds = [Round.from_json(entry) for entry in journal.rounds]
        if not self.rounds:
            return
        self.theta = journal.theta()
        tensors = journal.tensors(len(self.rounds) - 1)
        self.lost_in = {name: tensors.pop(LOST + name) for name in self.names}
        self.model.load_state_dict(tensors)

    def next(self, number: int, journal: Journal | None) -> Round:
        """Prune, rewind, train, record."""
        rewind_step = self.settings["rewind_step"]
        if number:
            self._prune(number)
            if self.settings["rewind_weights"]:
                self.model.load_state_dict(self.theta)
        kept = {name: lost == 0 for name, lost in self.lost_in.items()}
        masks = FixedMasks(self.model, kept)
        masks.apply()
        self._forget()
        training = Training(self.model, masks, number, rewind_step if number else 0, None if number else rewind_step)
        _seed(self.settings["seed"])
        metrics = training.run(self.train)
        if training.captured is not None:
            self.theta = training.captured
        layers = {name: (int(mask.sum()), mask.numel()) for name, mask in kept.items()}
        counts = [sum(column) for column in zip(*layers.values(), strict=True)]
        self.rounds.append(Round(number, *counts, layers, training.steps, _as_json(metrics)))
        if journal is not None:
            if not number:
                journal.record_theta(self.theta)
            lost = {LOST + name: tensor for name, tensor in self.lost_in.items()}
            journal.record(asdict(self.rounds[-1]), {**_state(self.model), **lost})
        return self.rounds[-1]

    def _forget(self) -> None:
        """Undo what a round leaves behind beside the weights: a continued search would lack it."""
        for module, mode in self._modes:
            module.training = mode
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable).grad = None

    def _prune(self, number: int) -> None:
        weights = {name: self.model.get_parameter(name) for name in self.names}
        for name, weight in weights.items():
            if missing := int((~weight.isfinite()).sum()):
                raise ValueError(
                    f"{name} holds {missing} NaN or infinite weights after round {number - 1}; training diverged"
                )
        kept = {name: (lost == 0).to(weights[name].device) for name, lost in self.lost_in.items()}
        for name, mask in shrink(weights, kept, self.settings["rate"], self.settings["scope"]).items():
            self.lost_in[name][(kept[name] & ~mask).cpu()] = number


def _prunable(model: nn.Module) -> Select:
    """The matrices of layers; a parameter that an embedding shares is an embedding."""
    layers = nn.Linear | nn.Bilinear | _ConvNd | nn.RNNBase | nn.MultiheadAttention
    held = {id(p) for module in model.modules() if _is(module, layers) for p in module.parameters(recurse=False)}
    looked_up = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for p in module.parameters(recurse=False)
    }
    # of an attention's bias_k and bias_v, which have three dimensions
    return lambda name, p: id(p) in held - looked_up and p.dim() > 1 and not name.rpartition(".")[2].startswith("bias")


def _is(module: nn.Module, layers: Any) -> bool:
    # transformers' Conv1D says nf where nn.Linear says out_features
    return isinstance(module, layers) or (hasattr(module, "nf") and hasattr(module, "weight"))


def _state(model: nn.Module) -> State:
    """A copy of parameters and buffers. Raises ValueError for a state that is no tensor."""
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: its state is {type(value).__name__}, and only tensors can be rewound")
    return {name: value.detach().clone() for name, value in state.items()}


def _check(rate: float, rounds: int, rewind_step: int, scope: str) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie between 0 and 1, got {rate}")
    if not 1 <= rounds < 1 << 15:
        raise ValueError(f"rounds must lie in 1..32767, got {rounds}")
    if rewind_step < 0:
        raise ValueError(f"rewind_step must not be negative, got {rewind_step}")
    if scope not in ("model", "layer"):
        raise ValueError(f'scope must be "model" or "layer", got {scope!r}')


def _check_size(name: str, parameter: nn.Parameter) -> bool:
    if parameter.is_meta:
        raise ValueError(f"{name}: the weight is on the meta device; load the model without offloading")
    if parameter.dim() < 2:
        raise ValueError(f"{name}: only matrices and larger compete by magnitude, got shape {list(parameter.shape)}")
    return True


def _as_json(metrics: object) -> dict[str, Any]:
    """What comes back from the journal is what was returned. Raises ValueError for what JSON has no words for."""
    if not isinstance(metrics, Mapping | None):
        raise ValueError(f"train must return a mapping of metrics or None, got {type(metrics).__name__}")
    try:
        return json.loads(json.dumps(dict(metrics or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"train must return finite numbers, texts and lists of them: {error}") from error


def _short(value: object) -> str:
    if isinstance(value, list | dict):
        return f"{len(value)} values"
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % (1 << 32))


@contextmanager
def _own_randomness() -> Iterator[None]:
    """The caller's generators are at the end where they were."""
    numpy = sys.modules.get("numpy")
    state, legacy = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(state)
            if legacy is not None:
                numpy.random.set_state(legacy)
