"""stages: what a run on a card consists of, in the order of its worth, each with the longest time that it may take."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module

from card.worker import Case, Setting


@dataclass(frozen=True)
class Stage:
    """One process's work.

    seconds  at most, of a run of DEFAULT_SECONDS
    module   has its cases
    tiny     whether a tiny run has it: not where another stage runs the same lines
    spare    it has only the time that the others leave
    """

    name: str
    seconds: float
    module: str
    cases: Callable[[object, Setting], Iterable[Case]] = lambda module, setting: module.cases(setting)
    tiny: bool = True
    spare: bool = False

    def share(self, left: float, following: Sequence["Stage"], scale: float) -> float:
        """Seconds of those that are left: its own, or as much less as those behind it must do with too."""
        others = sum(stage.seconds for stage in following if self.spare or not stage.spare)
        return min(self.seconds * scale, left * self.seconds / (self.seconds + others))


DEFAULT_SECONDS = 450.0


def _layers(model: str, few: bool = False, compiled: bool = False) -> Callable[[object, Setting], Iterable[Case]]:
    def cases(module, setting: Setting) -> Iterable[Case]:
        tokens = module.COMPILED_TOKENS if compiled else module.FEW_TOKENS if few else module.ALL_TOKENS
        return module.cases(setting, model, tokens, compiled)

    return cases


STAGES = (
    Stage("ceilings", 15, "card.ceilings"),
    Stage("layers llama-3-8b", 75, "card.layers", _layers("llama-3-8b")),
    Stage("conversions", 20, "card.conversions"),
    Stage("packing", 15, "card.packing"),
    Stage("solver", 60, "card.solver"),
    Stage("model", 90, "card.model"),
    Stage("layers llama-3-70b", 60, "card.layers", _layers("llama-3-70b", few=True), tiny=False, spare=True),
    Stage("layers llama-3.2-1b", 30, "card.layers", _layers("llama-3.2-1b", few=True), tiny=False, spare=True),
    Stage("compiled llama-3-8b", 45, "card.layers", _layers("llama-3-8b", compiled=True), spare=True),
)


def find(name: str) -> Stage:
    """The stage called `name`. Raises ValueError for an unknown one, naming those there are."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise ValueError(f"there is no stage {name!r}; there are {', '.join(stage.name for stage in STAGES)}")


def cases_of(stage: Stage, setting: Setting) -> Iterable[Case]:
    """The cases of a stage; its module is imported here, in the process that runs them."""
    return stage.cases(import_module(stage.module), setting)
