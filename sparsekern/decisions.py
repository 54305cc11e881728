"""decisions: which of the candidates serves a layer, from their times; nothing here measures.

The candidates are sparse kernels, own dense panels and F.linear; the fastest of the dense ones at a number of tokens is
the best dense there, and every candidate is compared with it in the same rounds. What is slower than the best dense by
more than the noise at any number of tokens is out. Of the others those count whose worst ratio is the largest, within
the noise, and of these the one with the largest geometric mean.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern.timing import Alternation, Json, Latency, Ratio

DENSE = "F.linear"
OWN_DENSE = "dense"  # the name of the format whose kernels read a dense weight in panels
PREPACKED = "prepacked"
# medians of the same kernel, timed twice in alternation, were seen to differ by less
NOISE = 0.03
DENSITY_STEP = 0.05


@dataclass(frozen=True)
class Kind:
    """What layers have in common that are as fast as each other.

    candidates  every kernel that may serve, as "format kernel"
    arena       bytes that were rotated through: a model that fits the cache is measured there
    """

    candidates: tuple[str, ...]
    out_features: int
    in_features: int
    density: float
    dtype: str
    device: str
    threads: int
    arena: int
    tokens: tuple[int, ...]

    @classmethod
    def of(
        cls, candidates: Sequence[str], weight: Tensor, arena: int, tokens: Sequence[int], kept: int | None = None
    ) -> "Kind":
        """kept: how many weights are not zero, where that is known."""
        density = (int(weight.count_nonzero()) if kept is None else kept) / max(weight.numel(), 1)
        device = weight.device
        return cls(
            candidates=tuple(candidates),
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            density=round(round(density / DENSITY_STEP) * DENSITY_STEP, 2),
            dtype=str(weight.dtype).removeprefix("torch."),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            threads=torch.get_num_threads(),
            arena=arena,
            tokens=tuple(tokens),
        )

    @classmethod
    def from_json(cls, data: Mapping) -> "Kind":
        """Raises ValueError or TypeError for what is none."""
        kind = cls(**{**data, "candidates": tuple(data["candidates"]), "tokens": tuple(data["tokens"])})
        for name, wanted in cls.__annotations__.items():
            value = getattr(kind, name)
            plain = tuple if name in ("candidates", "tokens") else wanted
            if type(value) is not plain:
                raise ValueError(f"not a plan: {name} must be {plain.__name__}, got {value!r}")
        return kind


@dataclass(frozen=True)
class Times:
    """Every candidate at one number of tokens.

    best    the fastest of the dense ones that can serve a layer
    ratios  best / candidate in the same rounds: above 1 the candidate is faster
    """

    latencies: dict[str, Latency]
    best: str
    ratios: dict[str, Ratio]

    @classmethod
    def of(cls, timed: Alternation, dense: Collection[str]) -> "Times":
        """dense: the names of the candidates that are dense and can serve."""
        latencies = {name: timed.latency(name) for name in timed.samples}
        # what disturbs only ever adds time: unsteady ones are told apart by their fastest tenth
        steady = all(latencies[name].steady for name in dense)
        best = min(dense, key=lambda name: latencies[name].median if steady else latencies[name].p10)
        return cls(latencies, best, {name: timed.ratio(best, name) for name in latencies if name != best})

    def worth(self, name: str, over: str | None = None) -> float:
        """How many times as fast as the best dense, or as `over`; by p10 where the samples were unsteady."""
        over = over or self.best
        if name == over:
            return 1.0
        if over == self.best and self.ratios[name].median is not None:
            return self.ratios[name].median
        latencies = (self.latencies[over], self.latencies[name])
        over_latency, own = latencies
        if all(latency.steady for latency in latencies):
            return over_latency.median / own.median
        return over_latency.p10 / own.p10

    @property
    def steady(self) -> bool:
        return all(ratio.median is not None for ratio in self.ratios.values())

    def clause(self, name: str, tokens: int) -> str:
        """One candidate in words."""
        at = f"at {tokens} token" + ("" if tokens == 1 else "s")
        if name == self.best:
            return f"{name} is the best dense {at}"
        if self.ratios[name].median is not None:
            return f"{name} is {self.ratios[name]} {self.best} {at}"
        faster = "faster" if self.worth(name) > 1 else "not faster"
        return f"{name} is {faster} than {self.best} {at} by p10 alone ({self.ratios[name].reason})"

    def to_json(self) -> Json:
        latencies = {name: latency.to_json() for name, latency in self.latencies.items()}
        return {"best": self.best, "latencies": latencies, "ratios": {n: r.to_json() for n, r in self.ratios.items()}}

    @classmethod
    def from_json(cls, data: Mapping) -> "Times":
        latencies = {name: Latency.from_json(entry) for name, entry in data["latencies"].items()}
        return cls(latencies, data["best"], {name: Ratio.from_json(entry) for name, entry in data["ratios"].items()})


@dataclass(frozen=True)
class Decision:
    """Which format and kernel serve a layer; None and None: it stays as it is.

    times  by number of tokens, empty when none was needed
    """

    format: str | None
    kernel: str | None
    reason: str
    times: dict[int, Times]

    @property
    def steady(self) -> bool:
        return all(entry.steady for entry in self.times.values())

    def to_json(self) -> Json:
        times = {str(tokens): times.to_json() for tokens, times in self.times.items()}
        return {"format": self.format, "kernel": self.kernel, "reason": self.reason, "times": times}

    @classmethod
    def from_json(cls, data: Mapping) -> "Decision":
        times = {int(tokens): Times.from_json(entry) for tokens, entry in data["times"].items()}
        return cls(data["format"], data["kernel"], data["reason"], times)


def decision_of(candidates: Mapping[str, tuple[str, str]], times: Mapping[int, Times]) -> Decision:
    """The candidate that serves, and the reason in words.

    candidates  name of each kernel that may serve -> its format and its own name; F.linear is one without being named
    times       by number of tokens
    """
    own = [name for name, (format, _) in candidates.items() if format == OWN_DENSE]
    sparse = [name for name in candidates if name not in own]
    worth = {name: [entry.worth(name) for entry in times.values()] for name in (DENSE, *candidates)}
    # what is no faster than F.linear is not worth a change
    over_linear = {name: [entry.worth(name, DENSE) for entry in times.values()] for name in own}
    able = [DENSE, *sparse, *(n for n in own if min(over_linear[n]) >= 1 and _mean(over_linear[n]) > 1 + NOISE)]
    able = [name for name in able if min(worth[name]) >= 1 - NOISE]
    if not able:
        # one dense kernel is the best here, another there
        able = [DENSE]
    largest = max(min(worth[name]) for name in able)
    # sparse first: as fast in fewer bytes is better
    finalists = sorted((n for n in able if min(worth[n]) >= largest * (1 - NOISE)), key=lambda n: n not in sparse)
    chosen = max(finalists, key=lambda name: _mean(worth[name]))
    said = [entry.clause(name, tokens) for name in (sparse or own) for tokens, entry in times.items()]
    if chosen in sparse:
        reason = ", ".join(entry.clause(chosen, tokens) for tokens, entry in times.items())
    elif chosen in own:
        gains = ", ".join(f"{over_linear[chosen][i]:.2f}x at {tokens}" for i, tokens in enumerate(times))
        reason = f"own dense panels, {gains} tokens over {DENSE}: a gain that is not from sparsity"
        reason += f"; {', '.join(said)}" if sparse else ""
    else:
        reason = "stays dense: " + ", ".join(said)
    for tokens, entry in times.items():
        if PREPACKED in entry.latencies and entry.worth(PREPACKED) > max(entry.worth(chosen), 1) * (1 + NOISE):
            faster = entry.worth(PREPACKED) / entry.worth(chosen)
            reason += f"; oneDNN with a prepacked weight would be {faster:.2f}x as fast at {tokens} tokens"
    format, kernel = candidates.get(chosen, (None, None))
    return Decision(format, kernel, reason, dict(times))


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
