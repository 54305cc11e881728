"""Plan: decisions on times made by hand, and that a kind of layer is measured once."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekern as sk
from sparsekern.formats import Bitmap
from sparsekern.ops import LINEAR_KERNELS
from sparsekern.ops.kernel import Kernel
from sparsekern.plan import (
    DENSE,
    MOST_COPIES,
    Decision,
    Kind,
    Plan,
    Times,
    Unmeasured,
    check_linear,
    decision_of,
    random_input,
    rotate,
)
from sparsekern.timing import Alternation, Latency, Ratio, Sample


def times(dense, sparse):
    """Steady latencies and their ratio."""
    return Times(Latency(dense, dense, dense, 100), Latency(sparse, sparse, sparse, 100), Ratio(*[dense / sparse] * 3))


def unsteady(dense, sparse):
    latencies = (Latency(10 * p10, p10, 20 * p10, 100) for p10 in (dense, sparse))
    return Times(*latencies, Ratio.unknown("fast is unsteady: p90 is 20.0 x p10"))


def test_sparse_serves_where_it_is_faster_at_every_number_of_tokens():
    decision = decision_of("fast", {1: times(2.0, 1.0), 4: times(3.0, 2.0)})
    assert decision.kernel == "fast"
    assert decision.reason == (
        "fast is 2.00x (2.00–2.00) F.linear at 1 token, fast is 1.50x (1.50–1.50) F.linear at 4 tokens"
    )


def test_a_layer_stays_dense_where_sparse_loses_once():
    decision = decision_of("fast", {1: times(2.0, 1.0), 16: times(1.0, 2.0)})
    assert decision.kernel is None
    assert decision.reason == "stays dense: fast is 0.50x (0.50–0.50) F.linear at 16 tokens"


def test_as_fast_as_dense_is_not_faster():
    assert decision_of("fast", {1: times(1.0, 1.0)}).kernel is None


@pytest.mark.parametrize(("sparse", "kernel"), [(1.0, "fast"), (3.0, None)], ids=["faster", "slower"])
def test_unsteady_times_are_decided_by_their_fastest_tenth_without_a_ratio(sparse, kernel):
    decision = decision_of("fast", {1: unsteady(2.0, sparse)})
    assert decision.kernel == kernel
    assert "by p10 alone (fast is unsteady: p90 is 20.0 x p10)" in decision.reason
    assert "0x" not in decision.reason.replace("20.0 x", "")


@pytest.fixture
def calls(monkeypatch):
    """A kernel that is right and takes half of dense's time by a clock that is not one; counts the timings."""
    seen = []

    def alternate(variants, seconds, device):
        seen.append(tuple(variants))
        for variant in variants.values():
            variant(0), variant(1)
        return Alternation({DENSE: [Sample(2.0)] * 10, "fast": [Sample(1.0)] * 10})

    fast = Kernel(
        "fast",
        lambda x, operands, bias, *_: F.linear(x, operands[0], bias),
        lambda packed: None,
        lambda packed: (packed.to_dense(),),
    )
    monkeypatch.setattr("sparsekern.plan.alternate", alternate)
    monkeypatch.setitem(LINEAR_KERNELS, Bitmap, (fast, *LINEAR_KERNELS[Bitmap]))
    return seen


def a_weight(rows=24, columns=16, sparsity=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    kept = torch.arange(rows * columns).view(rows, columns) % 100 >= sparsity * 100
    return weight.where(kept, 0.0)


def test_layers_of_one_kind_are_measured_once_for_each_number_of_tokens(calls):
    plan = Plan(arena=1 << 12)
    for seed in range(3):
        weight = a_weight(seed=seed)
        decision = plan.decide(Bitmap.pack(weight), weight, tokens=(1, 4))
        assert decision.kernel == "fast"
        assert decision.times[4].ratio.median == 2
    assert calls == [(DENSE, "fast")] * 2
    plan.decide(Bitmap.pack(weight), weight, tokens=(1,))
    wider = a_weight(columns=20)
    plan.decide(Bitmap.pack(wider), wider, tokens=(1, 4))
    assert len(calls) == 2 + 1 + 2


@pytest.fixture
def stored(calls, tmp_path):
    """A file with one decision in it."""
    weight = a_weight()
    plan = Plan(arena=1 << 12)
    plan.decide(Bitmap.pack(weight), weight, tokens=(1,))
    plan.save(tmp_path / "plan.json")
    calls.clear()
    return tmp_path / "plan.json"


def test_a_plan_read_from_a_file_measures_nothing_again(stored, calls):
    weight = a_weight()
    plan = Plan.load(stored)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).decisions == plan.decisions
    assert plan.decide(Bitmap.pack(weight), weight, tokens=(1,)) in plan.decisions.values()
    assert not calls


def test_a_plan_says_what_it_holds_for(stored):
    machine = json.loads(stored.read_text())["machine"]
    assert machine["processor"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__
    assert {"instruction_set", "sparsekern", "abi"} < machine.keys()


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("processor", "another processor"),
        ("instruction_set", "none"),
        ("threads", 77),
        ("torch", "2.0.0"),
        ("sparsekern", "9.9"),
        ("abi", -1),
    ],
)
def test_a_plan_of_another_machine_is_refused_with_what_differs(stored, fact, value):
    data = json.loads(stored.read_text())
    data["machine"][fact] = value
    stored.write_text(json.dumps(data))
    with pytest.raises(
        ValueError, match=rf"plan\.json': the plan was measured with {fact} {value!r}, here it is .*Plan\(\)"
    ):
        Plan.load(stored)


def test_a_plan_of_a_card_that_is_not_here_is_refused(stored):
    data = json.loads(stored.read_text())
    data["decisions"][0]["kind"]["device"] = "NVIDIA X1"
    with pytest.raises(ValueError, match="the plan was measured on 'NVIDIA X1', which is not here"):
        Plan.from_json(data)


def without(name):
    return lambda data: data.pop(name)


def kind_with(**changed):
    return lambda data: data["decisions"][0]["kind"].update(changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("machine"), "not a plan: KeyError: 'machine'"),
        (without("plan"), "not a plan: KeyError: 'plan'"),
        (lambda data: data.update(format_version=2), "the plan's format_version is 2, this sparsekern reads 1"),
        (lambda data: data.update(decisions=7), "not a plan: TypeError"),
        (lambda data: data["machine"].pop("torch"), "not a plan: KeyError: 'torch'"),
        (kind_with(out_features="24"), "not a plan: out_features must be int, got '24'"),
        (kind_with(tokens=3), "not a plan: TypeError"),
        (kind_with(colour="red"), "not a plan: TypeError"),
        (lambda data: data["decisions"][0].update(kernel="magic"), "bitmap has no kernel 'magic', only fast, "),
        (lambda data: data["decisions"][0].pop("reason"), "not a plan: KeyError: 'reason'"),
        (lambda data: data["decisions"][0]["times"].update({"x": 1}), "invalid literal for int"),
    ],
)
def test_a_damaged_plan_is_refused_in_words(stored, damage, message):
    data = json.loads(stored.read_text())
    damage(data)
    stored.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"plan\.json': .*{message}"):
        Plan.load(stored)


@pytest.mark.parametrize("octets", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"[" * 100_000], ids=repr)
def test_a_file_that_is_no_plan_is_refused_in_words(tmp_path, octets):
    (tmp_path / "plan.json").write_bytes(octets)
    with pytest.raises(ValueError, match=r"plan\.json': not a plan: "):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="no such plan: '.*missing'"):
        Plan.load(tmp_path / "missing")


def test_a_plan_is_written_whole_or_not_at_all(stored, monkeypatch):
    before = stored.read_bytes()

    def break_down(*_):
        raise OSError("no space left")

    monkeypatch.setattr("sparsekern.plan.os.fsync", break_down)
    with pytest.raises(OSError, match="no space left"):
        Plan().save(stored)
    assert stored.read_bytes() == before
    assert list(stored.parent.iterdir()) == [stored]
    assert stored.stat().st_mode & 0o777 == 0o644


def test_a_kernel_that_is_wrong_is_not_timed(calls, monkeypatch):
    wrong = Kernel("wrong", lambda x, *_: x.new_zeros(len(x), 24), lambda packed: None, lambda packed: ())
    monkeypatch.setitem(LINEAR_KERNELS, Bitmap, (wrong,))
    weight = a_weight()
    with pytest.raises(RuntimeError, match=r"kernel wrong is wrong: y\[0, \d+\] is 0, should be "):
        Plan(arena=0).decide(Bitmap.pack(weight), weight)
    assert not calls


def test_where_only_the_reference_serves_the_layer_stays_dense_unmeasured(calls, monkeypatch):
    refusing = Kernel("fast", None, lambda packed: "not built: no compiler", None)
    monkeypatch.setitem(LINEAR_KERNELS, Bitmap, (refusing, LINEAR_KERNELS[Bitmap][-1]))
    weight = a_weight()
    decision = Plan().decide(Bitmap.pack(weight), weight)
    reason = "only the reference accepts it, which rebuilds the weight: fast: not built: no compiler"
    assert decision == Decision(None, reason, {})
    assert not calls


def test_unmeasured_takes_the_first_kernel(calls):
    weight = a_weight()
    assert Unmeasured().decide(Bitmap.pack(weight), weight) == Decision("fast", "not measured", {})
    assert not calls


@pytest.mark.parametrize(("sparsity", "density"), [(0.0, 1.0), (0.49, 0.5), (0.52, 0.5), (0.53, 0.45)], ids=str)
def test_a_kind_knows_the_density_to_five_percent(sparsity, density):
    kind = Kind.of(Bitmap.pack(a_weight(rows=100, sparsity=sparsity) + 0.0), tokens=[1])
    assert kind.density == density
    assert (kind.format, kind.out_features, kind.in_features, kind.tokens) == ("bitmap", 100, 16, (1,))
    assert (kind.dtype, kind.device, kind.threads) == ("float32", "cpu", torch.get_num_threads())


def test_a_model_that_fits_the_cache_is_measured_in_the_cache():
    assert Plan.for_model(nn.Linear(4, 4)).arena == (16 + 4) * 4


def test_rotation_fills_the_arena_with_copies_of_their_own():
    operands = (torch.arange(8.0), torch.arange(2.0))  # 40 bytes
    copies = rotate(operands, arena=81)
    assert len(copies) == 3
    assert len({tensor.data_ptr() for copy in copies for tensor in copy}) == 6
    assert all(torch.equal(copy[0], operands[0]) for copy in copies)
    assert len(rotate(operands, arena=0)) == 1
    assert len(rotate(operands, arena=1 << 30)) == MOST_COPIES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_torch_computes_is_right_and_one_digit_off_is_not(dtype):
    weight, bias = torch.randn(37, 130).to(dtype), torch.randn(37).to(dtype)
    x = random_input(5, weight)
    y = F.linear(x, weight, bias)
    check_linear(y, x, weight, bias, "torch")
    y[3, 30] *= 1 + 4 * torch.finfo(dtype).eps + 1e-2
    with pytest.raises(RuntimeError, match=r"torch is wrong: y\[3, 30\] is "):
        check_linear(y, x, weight, bias, "torch")


def test_rows_are_checked_past_the_first_slice(monkeypatch):
    monkeypatch.setattr("sparsekern.plan.CHECKED_ROWS", 4)
    weight = torch.randn(10, 6)
    x = random_input(2, weight)
    y = F.linear(x, weight)
    check_linear(y, x, weight, None, "torch")
    y[1, 9] = torch.nan
    with pytest.raises(RuntimeError, match=r"y\[1, 9\] is nan"):
        check_linear(y, x, weight, None, "torch")


def test_a_real_measurement_decides_something():
    weight = a_weight(rows=64, columns=96)
    decision = Plan(seconds=0.0, arena=1 << 16).decide(Bitmap.pack(weight), weight, tokens=(1, 3))
    assert decision.kernel in (None, LINEAR_KERNELS[Bitmap][0].name, "cpu", "cuda")
    assert decision.reason


def test_a_plan_is_asked_at_load_with_the_dense_weight_that_densify_would_make(tmp_path):
    asked = []

    class Asked:
        def decide(self, packed, weight, tokens):
            asked.append((type(weight), torch.equal(weight, packed.to_dense()), tokens))
            return Decision("cpu" if len(asked) == 1 else None, "", {})

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in model:
        layer.weight.data[:, ::2] = 0
    sk.save(model, tmp_path / "out")
    loaded = sk.load(tmp_path / "out", into=model, tokens=(1, 4), plan=Asked())
    assert asked == [(torch.Tensor, True, (1, 4))] * 2
    assert [type(layer) for layer in loaded] == [sk.SparseLinear, nn.Linear]
