"""Timing: the arithmetic, on samples made by hand and a clock that is not one."""

import contextlib
from typing import ClassVar

import pytest
import torch

from sparsekern import timing
from sparsekern.timing import (
    FEWEST_SAMPLES,
    Alternation,
    Bandwidth,
    Latency,
    Processor,
    Ratio,
    Sample,
    alternate,
    cache_bytes,
    percentile,
    read_bandwidth,
)


class FakeClock:
    """Calls the variant and answers with the seconds that it returns; what returns a Sample is taken as it is."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def time(self, call):
        answer = call()
        return answer if isinstance(answer, Sample) else Sample(answer)


def samples(*seconds):
    return [Sample(value) for value in seconds]


def test_percentiles_lie_on_the_line_between_neighbours():
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile(range(11), 0.1) == 1
    assert percentile([7.0], 0.9) == 7


def test_a_latency_leaves_disturbed_samples_out():
    latency = Latency.of([*samples(*[2.0] * 10), Sample(50.0, disturbed=True)])
    assert (latency.median, latency.p10, latency.p90, latency.rounds, latency.dropped) == (2.0, 2.0, 2.0, 10, 1)
    assert latency.steady


def test_a_latency_of_disturbed_samples_has_a_number_but_is_not_steady():
    latency = Latency.of([Sample(2.0, disturbed=True)] * 20)
    assert latency.median == 2.0
    assert latency.unsteady == "0 of 20 samples were undisturbed"


@pytest.mark.parametrize(("spread", "steady"), [(1.5, True), (1.51, False)], ids=str)
def test_steady_means_p90_within_one_and_a_half_of_p10(spread, steady):
    latency = Latency(median=1.2, p10=1.0, p90=spread, rounds=100)
    assert latency.steady is steady
    assert latency.unsteady == (None if steady else "p90 is 1.5 x p10")


def test_a_latency_survives_json():
    latency = Latency.of(samples(*range(1, 11)))
    assert Latency.from_json(latency.to_json()) == latency


def test_a_ratio_is_the_median_of_the_ratios_of_each_round():
    """The machine gets slower over the run; the medians of each variant alone would say 2.4."""
    machine = [1.0, 1.0, 1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.3]
    ratios = [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 1.0]
    dense = [over * seconds / 2 for over, seconds in zip(ratios, machine, strict=True)]
    timed = Alternation({"dense": samples(*[2.0] * 10), "sparse": samples(*[1.0] * 10)})
    assert timed.ratio("dense", "sparse") == Ratio(2.0, 2.0, 2.0)
    timed = Alternation({"dense": samples(*dense), "sparse": samples(*[seconds / 2 for seconds in machine])})
    assert timed.per_round("dense", "sparse") == pytest.approx(ratios)


def test_a_round_counts_for_a_ratio_only_when_both_samples_do():
    sparse = [*samples(*[1.0] * 9), Sample(9.0, disturbed=True)]
    timed = Alternation({"dense": samples(*[3.0] * 10), "sparse": sparse})
    assert timed.per_round("dense", "sparse") == [3.0] * 9


def test_there_is_no_ratio_when_one_of_the_two_is_unsteady():
    unsteady = samples(*[1.0] * 5, *[2.0] * 5)
    timed = Alternation({"dense": samples(*[3.0] * 10), "sparse": unsteady})
    ratio = timed.ratio("dense", "sparse")
    assert ratio == Ratio(None, None, None, "sparse is unsteady: p90 is 2.0 x p10")
    assert str(ratio) == "– (sparse is unsteady: p90 is 2.0 x p10)"
    assert timed.ratio("sparse", "dense").median is None


def test_there_is_no_ratio_when_no_round_has_both_samples():
    good, bad = Sample(1.0), Sample(1.0, disturbed=True)
    timed = Alternation({"a": [good] * 10 + [bad] * 10, "b": [bad] * 10 + [good] * 10})
    assert timed.ratio("a", "b").reason == "0 rounds have both samples undisturbed"


def test_variants_alternate_in_rotated_order_and_get_the_number_of_the_round():
    calls = []

    def variant(name):
        return lambda number: calls.append((name, number)) or 1.0

    alternate({name: variant(name) for name in "abc"}, rounds=3, clock=FakeClock())
    warm_up = [(name, number) for number in (0, 1) for name in "abc"]
    assert calls[:6] == warm_up
    assert "".join(name for name, _ in calls[6:]) == "abc" + "bca" + "cab"
    assert [number for _, number in calls[6:]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_disturbed_rounds_are_made_up_for_but_not_for_ever():
    flaky = alternate({"a": lambda number: Sample(1.0, number % 2 == 1)}, rounds=10, clock=FakeClock())
    assert (flaky.latency("a").rounds, flaky.latency("a").dropped) == (10, 9)
    hopeless = alternate({"a": lambda _: Sample(1.0, True)}, rounds=10, clock=FakeClock())
    assert hopeless.latency("a").dropped == 30


def test_when_time_runs_out_there_are_enough_rounds_to_say_anything():
    timed = alternate({"a": lambda _: 1.0, "b": lambda _: 1.0}, rounds=100, seconds=0, clock=FakeClock())
    assert [len(taken) for taken in timed.samples.values()] == [FEWEST_SAMPLES] * 2


def test_the_processor_is_timed_and_its_accounts_are_closed():
    with Processor() as clock:
        sample = clock.time(lambda: sum(range(1000)))
    assert sample.seconds > 0
    with Processor() as clock:
        assert clock.time(lambda: None).seconds < sample.seconds + 1


def test_a_sample_in_which_threads_waited_is_disturbed(monkeypatch):
    waited = iter([0.0, 0.0, 0.0, 100.0])
    with Processor() as clock:
        monkeypatch.setattr(clock, "_waited", lambda: next(waited))
        assert not clock.time(lambda: None).disturbed
        assert clock.time(lambda: None).disturbed


def test_without_an_account_a_switch_against_our_will_disturbs(monkeypatch):
    clock = Processor()  # not entered: nothing is open
    switches = iter([3, 3, 3, 4])
    monkeypatch.setattr(clock, "_waited", lambda: next(switches))
    assert not clock.time(lambda: None).disturbed
    assert clock.time(lambda: None).disturbed


def test_bandwidth_is_bytes_over_seconds_and_turns_the_percentiles_round():
    bandwidth = Bandwidth.of(Latency(median=2.0, p10=1.0, p90=4.0, rounds=10), read_bytes=8_000_000_000)
    assert (bandwidth.median, bandwidth.p10, bandwidth.p90) == (4e9, 2e9, 8e9)
    assert str(bandwidth) == "4.0 GB/s (2.0–8.0)"


def test_read_bandwidth_counts_the_bytes_of_the_buffer():
    buffer = torch.zeros(1000, dtype=torch.float64)
    assert read_bandwidth(lambda _: 0.5, buffer, clock=FakeClock()).median == 16000


def test_a_latency_prints_in_the_unit_that_fits():
    assert str(Latency(0.00125, 0.00120, 0.00130, 10)) == "1.25 ms (1.2–1.3)"
    assert str(Latency(12.5e-6, 12e-6, 13e-6, 10)) == "12.5 us (12–13)"


def test_the_cache_is_known_or_none():
    size = cache_bytes()
    assert size is None or size > 0


def test_few_samples_are_not_steady():
    assert not Latency.of(samples(*[1.0] * (FEWEST_SAMPLES - 1))).steady
    assert Latency.of(samples(*[1.0] * FEWEST_SAMPLES)).steady


class FakeEvent:
    """An event of a card that needs 2 ms for everything."""

    recorded: ClassVar[list] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.recorded.append(self)

    def synchronize(self):
        assert self is self.recorded[-1]

    def elapsed_time(self, end):
        return 2.0 * (self.recorded.index(end) - self.recorded.index(self))


def test_a_card_is_timed_by_events_around_the_call_and_behind_a_read_that_empties_its_cache(monkeypatch):
    """Emulated: the clock's own lines run, on tensors of the CPU."""
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    clock, seen = timing.Card(torch.device("cpu")), []
    with clock:
        clock._sum.fill_(7.0)
        # by then the buffer of zeros was read, and one event recorded
        sample = clock.time(lambda: seen.append((float(clock._sum), len(FakeEvent.recorded))))
    assert seen == [(0.0, 1)]
    assert sample == Sample(0.002)
