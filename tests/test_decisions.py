"""Decisions: who serves a layer, on times made by hand."""

import json

import pytest
import torch

from sparsekern.decisions import DENSE, PREPACKED, Decision, Kind, Times, decision_of
from sparsekern.timing import Alternation, Sample

SPARSE = {"bitmap cpu": ("bitmap", "cpu")}
OWN = {"dense cpu": ("dense", "cpu")}
BOTH = SPARSE | OWN


def times(candidates=BOTH, **seconds):
    """Steady ones; linear, own, sparse, other, prepacked."""
    names = {"linear": DENSE, "own": "dense cpu", "sparse": "bitmap cpu", "other": "2:4 cpu", "prepacked": PREPACKED}
    samples = {names[name]: [Sample(each)] * 10 for name, each in seconds.items()}
    return Times.of(Alternation(samples), [DENSE, *(name for name in samples if name == "dense cpu")])


def unsteady(linear, sparse):
    """Whose p10 is what is given, and p90 twenty times that."""
    samples = {DENSE: linear, "bitmap cpu": sparse}
    spread = {name: [Sample(p10)] * 5 + [Sample(20 * p10)] * 5 for name, p10 in samples.items()}
    return Times.of(Alternation(spread), [DENSE])


def test_sparse_serves_where_it_is_faster_than_every_dense_at_every_number_of_tokens():
    decision = decision_of(BOTH, {1: times(linear=3, own=2, sparse=1), 4: times(linear=3, own=4, sparse=2)})
    assert (decision.format, decision.kernel) == ("bitmap", "cpu")
    assert decision.reason == (
        "bitmap cpu is 2.00x (2.00–2.00) dense cpu at 1 token, bitmap cpu is 1.50x (1.50–1.50) F.linear at 4 tokens"
    )


def test_own_dense_panels_serve_where_sparse_loses_once_and_the_gain_is_not_called_sparsity():
    decision = decision_of(BOTH, {1: times(linear=3, own=2, sparse=1), 64: times(linear=3, own=2, sparse=2.5)})
    assert (decision.format, decision.kernel) == ("dense", "cpu")
    assert "own dense panels, 1.50x at 1, 1.50x at 64 tokens over F.linear: a gain that is not from sparsity" in (
        decision.reason
    )
    assert "bitmap cpu is 0.80x (0.80–0.80) dense cpu at 64 tokens" in decision.reason


def test_a_layer_stays_as_it_is_where_nothing_beats_f_linear_everywhere():
    """Sparse loses at 16 to own panels, and those lose at 1 to F.linear."""
    decision = decision_of(BOTH, {1: times(linear=1, own=1.2, sparse=0.5), 16: times(linear=3, own=1, sparse=2)})
    assert (decision.format, decision.kernel) == (None, None)
    assert decision.reason.startswith("stays dense: bitmap cpu is 2.00x")
    assert "bitmap cpu is 0.50x (0.50–0.50) dense cpu at 16 tokens" in decision.reason


def test_a_loss_within_the_noise_is_none_and_a_larger_one_is():
    gain = {1: times(linear=2, sparse=1)}
    assert decision_of(SPARSE, gain | {512: times(linear=1, sparse=1.02)}).format == "bitmap"
    assert decision_of(SPARSE, gain | {512: times(linear=1, sparse=1.05)}).format is None


def test_of_two_sparse_kernels_the_one_with_the_larger_worst_ratio_serves():
    candidates = SPARSE | {"2:4 cpu": ("2:4", "cpu")}
    at_1, at_16 = times(linear=2, sparse=1, other=1.2), times(linear=2, sparse=1.9, other=1.4)
    assert decision_of(candidates, {1: at_1}).format == "bitmap"
    assert decision_of(candidates, {1: at_1, 16: at_16}).format == "2:4"


def test_own_panels_that_are_no_faster_than_f_linear_change_nothing():
    assert decision_of(OWN, {1: times(linear=1, own=0.99)}).format is None
    assert decision_of(OWN, {1: times(linear=1, own=0.5), 512: times(linear=1, own=1.2)}).format is None
    assert decision_of(OWN, {1: times(linear=1, own=0.5), 512: times(linear=1, own=0.9)}).format == "dense"


def test_a_prepacked_weight_that_would_be_faster_is_named_though_it_cannot_serve():
    decision = decision_of(SPARSE, {512: times(linear=2, sparse=1.9, prepacked=1)})
    assert decision.format == "bitmap"
    assert decision.reason.endswith("oneDNN with a prepacked weight would be 1.90x as fast at 512 tokens")
    assert "oneDNN" not in decision_of(SPARSE, {1: times(linear=2, sparse=0.9, prepacked=1)}).reason


@pytest.mark.parametrize(("sparse", "format"), [(1.0, "bitmap"), (3.0, None)], ids=["faster", "slower"])
def test_unsteady_times_are_decided_by_their_fastest_tenth_without_a_ratio(sparse, format):
    decision = decision_of(SPARSE, {1: unsteady(2.0, sparse)})
    assert decision.format == format
    assert not decision.steady
    assert "by p10 alone (F.linear is unsteady: p90 is 20.0 x p10)" in decision.reason
    assert "0x" not in decision.reason.replace("20.0 x", "")


def test_a_decision_survives_json():
    decision = decision_of(BOTH, {1: times(linear=3, own=2, sparse=1, prepacked=2)})
    assert decision.steady
    assert Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision


@pytest.mark.parametrize(("sparsity", "density"), [(0.0, 1.0), (0.49, 0.5), (0.52, 0.5), (0.53, 0.45)], ids=str)
def test_a_kind_knows_the_density_to_five_percent(sparsity, density):
    weight = (torch.arange(1600).view(100, 16) % 100 >= sparsity * 100).bfloat16()
    kind = Kind.of(["bitmap cpu"], weight, 7, [1, 4])
    assert kind.density == density
    assert (kind.candidates, kind.out_features, kind.in_features) == (("bitmap cpu",), 100, 16)
    assert (kind.arena, kind.tokens) == (7, (1, 4))
    assert (kind.dtype, kind.device, kind.threads) == ("bfloat16", "cpu", torch.get_num_threads())
    assert Kind.from_json(json.loads(json.dumps(vars(kind)))) == kind
