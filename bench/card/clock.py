"""clock: how a call is timed on a card.

A variant is captured into a CUDA graph: as many calls one after the other as take about 0.1 ms, each with buffers of
its own. A sample is one replay between two events, behind a read that empties the L2 (timing.Card): no buffer was read
before, and no launch is timed. The variants of a row alternate, and a ratio is of samples of the same round.

What cannot be captured is timed without: one call between the events, whose launch the emptying hides.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from card.worker import Setting, errors_of
from sparsekern.timing import Alternation, Json, Latency, Ratio, Sample, alternate

ROUNDS = 100
SAMPLE_S = 1e-4  # what a replay should take, so that its start and end do not count
MOST_CALLS = 16
# relative to float64, root mean square over an output
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
CHECKED_TOKENS = 64
NOT_MEASURED = "not measured"


@dataclass
class Timed:
    """The times of a row's variants, by name; `errors` of those that have none, `eager` were not captured."""

    latencies: dict[str, Latency] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    eager: list[str] = field(default_factory=list)

    def to_json(self) -> Json:
        return {
            "times": {name: latency.to_json() for name, latency in self.latencies.items()},
            "speedup": {name: ratio.to_json() for name, ratio in self.ratios.items()},
            "errors": self.errors,
            "eager": self.eager,
        }


def calls_for(seconds: float) -> int:
    """How many calls of about this time a sample needs."""
    return max(1, min(MOST_CALLS, round(SAMPLE_S / max(seconds, 1e-7))))


def time_variants(
    variants: Mapping[str, Callable[[int], object]],
    baseline: str | None,
    setting: Setting,
    calls: int = 1,
    rounds: int = ROUNDS,
    seconds: float | None = None,
    capture: bool = True,
) -> Timed:
    """Time `variants` against `baseline`.

    variants  called with 0..calls-1, each number with buffers of its own
    capture   False: one call a sample, as it is launched

    Where nothing is to be timed, every variant is called once.
    """
    timed = Timed()
    if not setting.timed:
        timed.errors |= errors_of({name: lambda call=call: call(0) for name, call in variants.items()})
        return timed
    device = torch.device(setting.device)
    replays, counts = {}, {}
    pool = torch.cuda.graph_pool_handle()
    for name, call in variants.items():
        ready = None
        if capture:
            graph: list[torch.cuda.CUDAGraph] = []
            failed = dict(errors_of({name: lambda call=call, to=graph: to.append(captured(call, calls, pool))}))
            ready = graph[0].replay if graph else None
        if ready is None:
            # as it is launched; what fails then too is left out
            failed_too = dict(errors_of({name: lambda call=call: (call(0), torch.cuda.synchronize())}))
            if failed_too:
                timed.errors |= failed_too
                continue
            if capture:
                timed.eager.append(name)
                timed.errors |= {f"{name}, captured": why for why in failed.values()}
            replays[name], counts[name] = (lambda number, call=call: call(number % calls)), 1
        else:
            replays[name], counts[name] = (lambda _, replay=ready: replay()), calls
    if not replays:
        return timed
    taken = alternate(replays, rounds, seconds, device)
    each = {name: [Sample(s.seconds / counts[name], s.disturbed) for s in taken.samples[name]] for name in replays}
    alternation = Alternation(each)
    timed.latencies = {name: alternation.latency(name) for name in replays}
    if baseline in replays:
        timed.ratios = {name: alternation.ratio(baseline, name) for name in replays if name != baseline}
    return timed


def captured(call: Callable[[int], object], calls: int, pool: object = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `calls` calls.

    torch.cuda.graph would collect garbage and give all cached memory back each time, which costs more than the timing.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        # the first calls load code and take workspaces, which a capture may not
        for number in range(2):
            call(number % calls)
        stream.synchronize()
        graph.capture_begin(*([] if pool is None else [pool]))
        try:
            for number in range(calls):
                call(number)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    # a replay that fails is this call's failure, not one of the timing
    graph.replay()
    torch.cuda.synchronize()
    return graph


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds NaN."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def check_linear(call: Callable[[int], Tensor], x: Tensor, weight: Tensor) -> None:
    """Is what `call` returns x weight^T, every element written, and the first and last tokens as float64 has them?

    Raises RuntimeError when it is not.
    """
    with poisoned():
        y = call(0)
    if unwritten := int((~y.isfinite()).sum()):
        raise RuntimeError(f"{unwritten} of {y.numel()} outputs are NaN or infinite")
    half = CHECKED_TOKENS // 2
    for part in [slice(None)] if len(x) <= CHECKED_TOKENS else [slice(half), slice(-half, None)]:
        expected = torch.cat([x[part].double() @ rows.double().T for rows in weight.split(8192)], dim=1)
        off = float((y[part].double() - expected).norm() / expected.norm().clamp(min=1e-30))
        # NaN is not within anything
        if not off <= TOLERANCE[x.dtype]:
            raise RuntimeError(f"the result is off by {off:.2g}, allowed is {TOLERANCE[x.dtype]}")
