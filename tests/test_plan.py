"""Plan: every candidate is checked and timed once a kind of layer, and known the next time."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekern as sk
from sparsekern.decisions import DENSE, Decision
from sparsekern.formats import Bitmap, Dense, SemiStructured
from sparsekern.ops import LINEAR_KERNELS
from sparsekern.ops.kernel import Kernel
from sparsekern.plan import MOST_COPIES, Plan, Unmeasured, check_linear, random_input, rotate
from sparsekern.timing import Alternation, Sample


@pytest.fixture
def calls(monkeypatch):
    """A kernel that is right and takes half of dense's time by a clock that is not one; counts the timings."""
    seen = []

    def alternate(variants, seconds, device):
        seen.append(tuple(variants))
        for variant in variants.values():
            variant(0), variant(1)
        return Alternation({name: [Sample(1.0 if name == "bitmap fast" else 2.0)] * 10 for name in variants})

    fast = Kernel(
        "fast",
        lambda x, operands, bias, *_: F.linear(x, operands[0], bias),
        lambda packed: None,
        lambda packed: (packed.to_dense(),),
    )
    monkeypatch.setattr("sparsekern.plan.alternate", alternate)
    monkeypatch.setattr("sparsekern.plan.ONEDNN", Refusing)
    monkeypatch.setitem(LINEAR_KERNELS, Bitmap, (fast, LINEAR_KERNELS[Bitmap][-1]))
    monkeypatch.setitem(LINEAR_KERNELS, Dense, LINEAR_KERNELS[Dense][-1:])
    return seen


class Refusing:
    """A baseline that is not there."""

    refuses = staticmethod(lambda weight: "not here")


def a_weight(rows=24, columns=16, sparsity=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    kept = torch.arange(rows * columns).view(rows, columns) % 100 >= sparsity * 100
    return weight.where(kept, 0.0)


def test_layers_of_one_kind_are_measured_once_for_each_number_of_tokens(calls):
    plan = Plan(arena=1 << 12)
    for seed in range(3):
        weight = a_weight(seed=seed)
        decision = plan.decide((Bitmap.pack(weight),), weight, tokens=(1, 4))
        assert decision.kernel == "fast"
        assert decision.times[4].ratios["bitmap fast"].median == 2
    assert calls == [(DENSE, "bitmap fast")] * 2
    assert (plan.measured, plan.recalled) == (1, 0)
    plan.decide((Bitmap.pack(weight),), weight, tokens=(1,))
    wider = a_weight(columns=20)
    plan.decide((Bitmap.pack(wider),), wider, tokens=(1, 4))
    assert len(calls) == 2 + 1 + 2


@pytest.fixture
def stored(calls, tmp_path):
    """A file with one decision in it."""
    weight = a_weight()
    plan = Plan(arena=1 << 12)
    plan.decide((Bitmap.pack(weight),), weight, tokens=(1,))
    plan.save(tmp_path / "plan.json")
    calls.clear()
    return tmp_path / "plan.json"


def test_a_plan_read_from_a_file_measures_nothing_again(stored, calls):
    weight = a_weight()
    plan = Plan.load(stored)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).decisions == plan.decisions
    assert plan.decide((Bitmap.pack(weight),), weight, tokens=(1,)) in plan.decisions.values()
    assert not calls


def test_a_plan_says_what_it_holds_for(stored):
    machine = json.loads(stored.read_text())["machine"]
    assert machine["processor"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__
    assert {"instruction_set", "sparsekern", "kernels"} < machine.keys()


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("processor", "another processor"),
        ("instruction_set", "none"),
        ("threads", 77),
        ("torch", "2.0.0"),
        ("sparsekern", "9.9"),
        ("kernels", {}),
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
        (lambda data: data.update(format_version=1), "the plan's format_version is 1, this sparsekern reads 2"),
        (lambda data: data.update(decisions=7), "not a plan: TypeError"),
        (lambda data: data["machine"].pop("torch"), "not a plan: KeyError: 'torch'"),
        (kind_with(out_features="24"), "not a plan: out_features must be int, got '24'"),
        (kind_with(tokens=3), "not a plan: TypeError"),
        (kind_with(colour="red"), "not a plan: TypeError"),
        (lambda data: data["decisions"][0].update(kernel="magic"), "bitmap has no kernel 'magic', only fast, "),
        (lambda data: data["decisions"][0].update(format="magic"), "no format 'magic', only 2:4, bitmap, "),
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

    monkeypatch.setattr("sparsekern.plan_cache.os.fsync", break_down)
    with pytest.raises(OSError, match="no space left"):
        Plan().save(stored)
    assert stored.read_bytes() == before
    assert list(stored.parent.iterdir()) == [stored]
    assert stored.stat().st_mode & 0o777 == 0o644


def test_a_kernel_that_is_wrong_is_not_timed(calls, monkeypatch):
    wrong = Kernel("wrong", lambda x, *_: x.new_zeros(len(x), 24), lambda packed: None, lambda packed: ())
    monkeypatch.setitem(LINEAR_KERNELS, Bitmap, (wrong,))
    weight = a_weight()
    with pytest.raises(RuntimeError, match=r"kernel bitmap wrong is wrong: y\[0, \d+\] is 0, should be "):
        Plan(arena=0).decide((Bitmap.pack(weight),), weight)
    assert not calls


def test_where_only_the_reference_serves_the_layer_stays_dense_unmeasured(calls, monkeypatch):
    refusing = Kernel("fast", None, lambda packed: "not built: no compiler", None)
    monkeypatch.setitem(LINEAR_KERNELS, Bitmap, (refusing, LINEAR_KERNELS[Bitmap][-1]))
    weight = a_weight()
    decision = Plan().decide((Bitmap.pack(weight),), weight)
    reason = "only the reference accepts it, which rebuilds the weight: fast: not built: no compiler"
    assert decision == Decision(None, None, reason, {})
    assert not calls


def test_unmeasured_takes_the_first_kernel(calls):
    weight = a_weight()
    assert Unmeasured().decide((Bitmap.pack(weight),), weight) == Decision("bitmap", "fast", "not measured", {})
    assert not calls


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_real_measurement_decides_something(dtype):
    weight = a_weight(rows=64, columns=96).to(dtype)
    decision = Plan(seconds=0.0, arena=1 << 16).decide((Bitmap.pack(weight),), weight, tokens=(1, 3))
    assert decision.format in (None, "bitmap", "dense")
    assert set(decision.times) == {1, 3} or decision.reason.startswith("only the reference")
    # every dtype has our own dense kernel beside the sparse one
    assert all({"bitmap cpu", "dense cpu", "F.linear"} <= {*times.latencies} for times in decision.times.values())
    assert decision.reason


def test_a_kernel_that_serves_two_formats_is_one_candidate(calls, monkeypatch):
    monkeypatch.setitem(LINEAR_KERNELS, SemiStructured, LINEAR_KERNELS[Bitmap])
    weight = a_weight()
    weight[:, ::2] = 0
    Plan(arena=0).decide((Bitmap.pack(weight), SemiStructured.pack(weight)), weight)
    assert calls == [(DENSE, "bitmap fast")]


def test_own_dense_panels_are_a_candidate_of_every_layer(calls, monkeypatch):
    panels = Kernel("panels", lambda x, operands, *_: F.linear(x, operands[0]), lambda p: None, lambda p: (p.weight,))
    monkeypatch.setitem(LINEAR_KERNELS, Dense, (panels,))
    weight = torch.randn(24, 16)
    decision = Plan(arena=0).decide((), weight)
    assert calls == [(DENSE, "dense panels")]
    assert decision.reason.startswith("stays dense: dense panels is 1.00x")


def test_what_was_measured_is_known_to_the_next_plan_of_the_same_cache(calls, tmp_path):
    weight = a_weight()
    first, cache = Plan(arena=1 << 12, cache=tmp_path / "not/there/yet"), tmp_path / "not/there/yet"
    decision = first.decide((Bitmap.pack(weight),), weight)
    assert str(first) == "1 kinds of layer measured now, 0 known from before"
    calls.clear()
    second = Plan(arena=1 << 12, cache=cache)
    assert second.decide((Bitmap.pack(weight),), weight) == decision
    assert str(second) == "0 kinds of layer measured now, 1 known from before"
    assert not calls
    # two that were open at once lose nothing of each other
    third, fourth = Plan(arena=1 << 12, cache=cache), Plan(arena=1 << 12, cache=cache)
    for plan, tokens in ((third, (2,)), (fourth, (3,))):
        plan.decide((Bitmap.pack(weight),), weight, tokens)
    assert len(Plan(cache=cache).decisions) == 3


def test_what_was_measured_in_the_cache_of_the_processor_is_not_known_out_of_it(calls, tmp_path):
    weight = a_weight()
    for arena in (1 << 12, 1 << 13):
        Plan(arena=arena, cache=tmp_path).decide((Bitmap.pack(weight),), weight)
    assert len(calls) == 2


def test_unsteady_times_are_measured_again_the_next_time(calls, tmp_path, monkeypatch):
    def noisy(variants, seconds, device):
        return Alternation({name: [Sample(1.0), Sample(9.0)] * 5 for name in variants})

    monkeypatch.setattr("sparsekern.plan.alternate", noisy)
    weight = a_weight()
    plan = Plan(arena=0, cache=tmp_path)
    assert not plan.decide((Bitmap.pack(weight),), weight).steady
    assert plan.decisions
    assert not Plan(cache=tmp_path).decisions


@pytest.mark.parametrize("octets", [b"", b"{", b"\xff\xfe", b"[]"], ids=repr)
def test_a_damaged_cache_is_measured_anew_and_replaced(calls, tmp_path, octets):
    weight = a_weight()
    Plan(arena=0, cache=tmp_path).decide((Bitmap.pack(weight),), weight)
    (file,) = tmp_path.iterdir()
    file.write_bytes(octets)
    Plan(arena=0, cache=tmp_path).decide((Bitmap.pack(weight),), weight)
    assert len(calls) == 2
    assert len(Plan(cache=tmp_path).decisions) == 1


def test_a_cache_that_cannot_be_written_is_done_without_and_said_so(calls, tmp_path):
    (tmp_path / "home").write_text("no directory")
    weight = a_weight()
    plan = Plan(arena=0, cache=tmp_path / "home/.cache")
    assert plan.decide((Bitmap.pack(weight),), weight).format == "bitmap"
    assert "1 kinds of layer measured now" in str(plan)
    assert "not kept for the next time: NotADirectoryError" in str(plan)


def test_the_users_cache_is_in_their_home_and_nowhere_without_one(monkeypatch, tmp_path):
    from sparsekern.plan_cache import user_cache

    monkeypatch.setattr("sparsekern.plan_cache.Path.home", lambda: tmp_path)
    for platform, folder in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr("sparsekern.plan_cache.sys.platform", platform)
        assert user_cache() == tmp_path / folder / "sparsekern"

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("sparsekern.plan_cache.Path.home", nowhere)
    assert user_cache() is None
    monkeypatch.setattr("sparsekern.plan.user_cache", user_cache)
    assert Plan.for_model(nn.Linear(4, 4)).cache is None


def test_unmeasured_takes_the_format_it_is_given():
    weight = a_weight()
    packings = (Bitmap.pack(weight),)
    assert Unmeasured(Bitmap).decide(packings, weight).format == "bitmap"
    assert Unmeasured(Dense).decide(packings, weight).format == "dense"
    decision = Unmeasured(SemiStructured).decide(packings, weight)
    assert (decision.format, decision.reason) == (None, "2:4 does not hold it")


@pytest.mark.parametrize(
    ("decided", "kind"),
    [(("2:4", "reference"), sk.SparseLinear), ((None, None), nn.Linear), (("dense", "reference"), sk.SparseLinear)],
    ids=["sparse", "dense", "own panels"],
)
def test_a_plan_is_asked_at_load_with_the_dense_weight(tmp_path, decided, kind):
    asked = []

    class Asked:
        def decide(self, packings, weight, tokens):
            (packed,) = packings
            asked.append((type(weight), torch.equal(weight, packed.to_dense()), tokens))
            return Decision(*(decided if len(asked) == 1 else (None, None)), "", {})

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in model:
        layer.weight.data[:, torch.arange(64) % 4 > 1] = 0
    weights = [layer.weight.clone() for layer in model]
    sk.save(model, tmp_path / "out")
    loaded = sk.load(tmp_path / "out", into=model, tokens=(1, 4), plan=Asked())
    assert asked == [(torch.Tensor, True, (1, 4))] * 2
    assert [type(layer) for layer in loaded] == [kind, nn.Linear]
    assert (
        getattr(loaded[0], "format", type(None))
        is {"2:4": SemiStructured, "dense": Dense, None: type(None)}[decided[0]]
    )
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(loaded, weights, strict=True))


def test_a_stored_plan_knows_where_it_was_measured(stored):
    assert Plan.load(stored).arena == 1 << 12
    assert Plan.load(stored, arena=7).arena == 7
