"""timing: the one way anything is timed here, so that a ratio can be believed.

The variants alternate in one process and their order rotates from round to round, so that a change of clock, of
temperature or of neighbours meets all of them alike. A ratio is the median over the rounds of (time of one / time of
the other in the same round). It exists only when both are steady, p90 <= 1.5 x p10; otherwise there is the reason.

On a CPU a sample is dropped when the machine took the processor away, because then it says nothing about the variant:

    the threads of this process waited on a run queue for more than 5 % of it (Linux: /proc/self/task/*/schedstat),
    or, where the kernel keeps no such account, were switched out against their will (getrusage, ru_nivcsw).

torch's pool is woken before each sample: in a model the layers follow each other and find it awake.
"""

import itertools
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median as median_of
from typing import NamedTuple

import torch

Json = dict[str, object]

STEADY = 1.5  # largest p90 / p10 that still counts as one number
FEWEST_SAMPLES = 8  # fewer say nothing about p10 and p90
WAITED_SHARE = 0.05  # of a sample's time, on a run queue
# past the last-level cache of every processor this is used on, when the machine does not say
UNKNOWN_CACHE_BYTES = 128 << 20
FLUSH_BYTES = 512 << 20  # past the L2 of every card, and longer to read than an op takes to be launched


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of `values` lie, between neighbours by straight line."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class Sample(NamedTuple):
    """One call. `disturbed`: the machine took the processor away meanwhile."""

    seconds: float
    disturbed: bool = False


@dataclass(frozen=True)
class Latency:
    """How long one call takes, in seconds: median, p10 and p90 over `rounds` samples; `dropped` more did not count."""

    median: float
    p10: float
    p90: float
    rounds: int
    dropped: int = 0

    @classmethod
    def of(cls, samples: Sequence["Sample"]) -> "Latency":
        """From the samples that count; from all of them, and then unsteady, when hardly any does."""
        clean = [sample.seconds for sample in samples if not sample.disturbed]
        used = clean if len(clean) >= FEWEST_SAMPLES else [sample.seconds for sample in samples]
        low, high = percentile(used, 0.1), percentile(used, 0.9)
        return cls(median_of(used), low, high, len(clean), len(samples) - len(clean))

    @property
    def unsteady(self) -> str | None:
        """Why this is not one number, in words; None when it is."""
        if self.rounds < FEWEST_SAMPLES:
            return f"{self.rounds} of {self.rounds + self.dropped} samples were undisturbed"
        if self.p90 > STEADY * self.p10:
            return f"p90 is {self.p90 / self.p10:.1f} x p10"
        return None

    @property
    def steady(self) -> bool:
        return self.unsteady is None

    def to_json(self) -> Json:
        return {**asdict(self), "steady": self.steady}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Latency":
        return cls(**{key: value for key, value in data.items() if key != "steady"})  # type: ignore[arg-type]

    def __str__(self) -> str:
        scale, unit = (1e3, "ms") if self.median >= 1e-3 else (1e6, "us")
        return f"{self.median * scale:.3g} {unit} ({self.p10 * scale:.3g}–{self.p90 * scale:.3g})"


@dataclass(frozen=True)
class Ratio:
    """A time divided by another: median, p10 and p90 over the rounds, or None three times and the reason."""

    median: float | None
    p10: float | None
    p90: float | None
    reason: str | None = None

    @classmethod
    def unknown(cls, reason: str) -> "Ratio":
        return cls(None, None, None, reason)

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Ratio":
        return cls(**data)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.median is None:
            return f"– ({self.reason})"
        return f"{self.median:.2f}x ({self.p10:.2f}–{self.p90:.2f})"


@dataclass(frozen=True)
class Alternation:
    """What `alternate` measured: for each variant one sample per round."""

    samples: dict[str, list[Sample]]

    def latency(self, name: str) -> Latency:
        return Latency.of(self.samples[name])

    def per_round(self, numerator: str, denominator: str) -> list[float]:
        """The ratio of the two times in every round in which both samples count."""
        pairs = zip(self.samples[numerator], self.samples[denominator], strict=True)
        return [over.seconds / under.seconds for over, under in pairs if not (over.disturbed or under.disturbed)]

    def ratio(self, numerator: str, denominator: str) -> Ratio:
        """How many times longer `numerator` takes than `denominator`: the speed-up of the second over the first."""
        for name in (numerator, denominator):
            if unsteady := self.latency(name).unsteady:
                return Ratio.unknown(f"{name} is unsteady: {unsteady}")
        ratios = self.per_round(numerator, denominator)
        if len(ratios) < FEWEST_SAMPLES:
            return Ratio.unknown(f"{len(ratios)} rounds have both samples undisturbed")
        return Ratio(median_of(ratios), percentile(ratios, 0.1), percentile(ratios, 0.9))


class Processor:
    """The clock of a CPU, and whether the threads of this process had the processor while it ran."""

    def __init__(self) -> None:
        self._accounts: list[int] = []
        # longer than torch's smallest share of a parallel loop, for every thread
        self._wake = torch.zeros(1 << 18)

    def __enter__(self) -> "Processor":
        # held open: a pread takes 1 us, and a longer pause would put the pool to sleep
        for thread in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ():
            try:
                self._accounts.append(os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY))
            except FileNotFoundError:
                # the thread ended meanwhile, or this kernel keeps no account
                continue
        return self

    def __exit__(self, *_: object) -> None:
        for account in self._accounts:
            os.close(account)
        self._accounts.clear()

    def time(self, call: Callable[[], object]) -> Sample:
        self._wake.fill_(1.0)
        before = self._waited()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        waited = self._waited() - before
        return Sample(seconds, waited > (WAITED_SHARE * seconds if self._accounts else 0))

    def _waited(self) -> float:
        if not self._accounts:
            return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        # "time on the processor, time waited on a run queue, turns", in nanoseconds
        return sum(int((os.pread(account, 64, 0).split() or (0, 0))[1]) for account in self._accounts) * 1e-9


class Card:
    """The clock of a CUDA device: events around each call, behind a read that empties the L2.

    A read: lines that a write leaves behind would go to memory while the call runs. It also keeps the card busy while
    the call is launched, so that the launch is not timed.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self._sum = torch.zeros((), device=device)

    def __enter__(self) -> "Card":
        torch.cuda.synchronize(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self._device)

    def time(self, call: Callable[[], object]) -> Sample:
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.sum(self._flush, 0, out=self._sum)
            start.record()
            call()
            end.record()
            end.synchronize()
        return Sample(start.elapsed_time(end) * 1e-3)


Clock = Processor | Card


def clock_of(device: torch.device | str) -> Clock:
    device = torch.device(device)
    return Card(device) if device.type == "cuda" else Processor()


def alternate(
    variants: Mapping[str, Callable[[int], object]],
    rounds: int = 100,
    seconds: float | None = None,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> Alternation:
    """Time `variants` against each other.

    variants  called with the number of the round, to pick the buffers of that round: use each again only after more
              bytes than the cache holds were read, or a cache is timed
    rounds    wanted undisturbed; more are run to get them, until the time is over
    seconds   stop by then, but not before there are enough rounds to say anything; None: after three times as many
    """
    names = list(variants)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    # the first calls choose kernels and start threads
    for warm_up in range(2):
        for name in names:
            variants[name](warm_up)
    clean, start = 0, time.perf_counter()
    with clock or clock_of(device) as running:
        for number in itertools.count():
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                variant = variants[name]
                samples[name].append(running.time(lambda variant=variant, number=number: variant(number)))
            clean += not any(samples[name][-1].disturbed for name in names)
            done = number + 1
            over = done >= 3 * rounds if seconds is None else time.perf_counter() - start >= seconds
            if clean >= rounds or (over and done >= FEWEST_SAMPLES):
                break
    return Alternation(samples)


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of reading memory: median, p10 and p90."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, latency: Latency, read_bytes: int) -> "Bandwidth":
        return cls(read_bytes / latency.median, read_bytes / latency.p90, read_bytes / latency.p10)

    def to_json(self) -> Json:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median / 1e9:.1f} GB/s ({self.p10 / 1e9:.1f}–{self.p90 / 1e9:.1f})"


def read_bandwidth(
    read: Callable[[torch.Tensor], object], buffer: torch.Tensor, rounds: int = 12, clock: Clock | None = None
) -> Bandwidth:
    """How fast `read` goes through `buffer`, which must be larger than the cache to say something about memory."""
    timed = alternate({"read": lambda _: read(buffer)}, rounds=rounds, device=buffer.device, clock=clock)
    return Bandwidth.of(timed.latency("read"), buffer.nbytes)


def cache_bytes() -> int | None:
    """Bytes of the last-level cache that cpu0 sees; None when the machine does not say."""
    folder = "/sys/devices/system/cpu/cpu0/cache"
    sizes = []
    for index in os.listdir(folder) if os.path.isdir(folder) else ():
        path = f"{folder}/{index}/size"
        if index.startswith("index") and os.path.exists(path):
            with open(path) as file:
                text = file.read().strip()
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=None)


def arena_bytes(device: torch.device | str = "cpu") -> int:
    """How many bytes the variants must read together before one of them meets a buffer again: four caches."""
    if torch.device(device).type == "cuda":
        return FLUSH_BYTES
    return 4 * (cache_bytes() or UNKNOWN_CACHE_BYTES)
