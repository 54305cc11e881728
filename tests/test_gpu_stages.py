"""bench/card without a card: its stages timed on the CPU, where torch.cuda is stood in for, and the run around them.

What stands in for a function or a class of torch.cuda takes the arguments, and has the methods, of the one in the torch
that is installed; no other.
"""

import contextlib
import json
import re
import stat
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from torch._subclasses import FakeTensorMode

from sparsekern.formats import SemiStructured
from sparsekern.ops import compiled

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")


@pytest.fixture
def card(monkeypatch, one_thread):
    """torch.cuda, as far as bench/card uses it: what is captured has run, and a replay does nothing."""
    from card import clock

    # it names torch.cuda's classes in annotations, which are to be the real ones
    assert transformers.LlamaForCausalLM
    for name in ("CUDAGraph", "Stream", "current_stream", "graph_pool_handle", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name)))
    entered = mock.create_autospec(torch.cuda.stream, side_effect=lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", entered)
    # as few rounds as there are medians of
    whole = clock.alternate
    monkeypatch.setattr(clock, "alternate", lambda variants, rounds, seconds, device: whole(variants, 8, 0.05, device))
    return torch.cuda


def test_what_stands_in_refuses_what_torch_would_refuse(card):
    with pytest.raises(TypeError):
        card.CUDAGraph().capture_begin(memory="pool")
    with pytest.raises(AttributeError):
        card.Stream().wait()


# what each stage's rows answer on a CPU too
TARGETS = {
    "conversions": ["prune mask, pack, unpack: of the copy's bandwidth", "expand to dense: of the copy's bandwidth"],
    "solver": ["sweep of a block of 4096 rows", "SparseGPT of a 4096x4096 layer"],
}
STAGES = ("ceilings", "layers llama-3-8b", "conversions", "packing", "solver", "model")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_timed_to_its_last_row(name, card, tmp_path):
    from card import report, stages, targets
    from card.record import Record
    from card.worker import Setting, work

    lines = []

    class Pipe:
        def write(self, line):
            lines.append(json.loads(line))

        def flush(self):
            pass

    setting = Setting("cpu", tiny=True, timed=True, until=time.time() + 300)
    stage = stages.find(name)
    stages.import_module(stage.module)
    assert work(name, stages.cases_of(stage, setting), setting, 0, Pipe()) == 0
    rows = [line["row"] for line in lines if "row" in line]
    assert lines[-1] == {"end": sum("begin" in line for line in lines)}
    assert all(row["times"] for row in rows), [row.get("error") for row in rows]
    assert all(row["errors"] == {} for row in rows)
    # what asks the card a question on its way is timed as it is launched, all else captured
    assert (card.CUDAGraph.call_count > 0) == (name != "conversions")
    if name != "solver":
        assert {variant for row in rows for variant in row["eager"]} == set()
    ceilings = {"stage": "ceilings", "work": {"copy": 1.0}, "times": {"copy": {"median": 1.0}}}
    verdicts = {target.what: target.verdict([ceilings, *rows])[0] for target in targets.TARGETS}
    for what in TARGETS.get(name, ()):
        assert verdicts[what] != "not measured", what
    where = {"gpu": "a card", "date": "2026-11-30"}
    record = Record(tmp_path / "a-card.json", where, tiny=False, rows=rows, seconds=1.0)
    page = report.page(record.to_json())
    assert all(report.line(row) for row in rows)
    if name == "solver":
        assert "by_halves to 32" in page
        assert "The fastest: " in page
        assert "library" in page


def test_a_call_that_cannot_be_captured_is_timed_as_it_is_launched_and_says_so(card):
    from card.clock import time_variants
    from card.worker import Setting

    card.CUDAGraph.return_value.capture_end.side_effect = RuntimeError("operation not permitted when capturing")
    setting = Setting("cpu", tiny=True, timed=True, until=time.time() + 60)
    timed = time_variants({"a": lambda _: torch.zeros(1)}, None, setting)
    assert list(timed.latencies) == timed.eager == ["a"]
    assert timed.errors == {"a, captured": "RuntimeError: operation not permitted when capturing"}
    # asked for as it is, there is nothing to say
    timed = time_variants({"a": lambda _: torch.zeros(1)}, None, setting, capture=False)
    assert (list(timed.latencies), timed.eager, timed.errors) == (["a"], [], {})


def test_a_card_that_no_longer_answers_asks_for_another_process(card, monkeypatch):
    from card.worker import Case, Setting, work

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pipe, setting = mock.Mock(), Setting("cpu", tiny=True, timed=False, until=time.time() + 60)
    assert work("stage", [Case("one", lambda: [])], setting, 0, pipe) == 0
    card.synchronize.side_effect = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert work("stage", [Case("one", lambda: [])], setting, 0, pipe) == 3


def test_every_kernel_that_packs_is_asked_for_what_it_gives(card):
    """By the ops' own descriptions of their results: the kernels themselves are a card's."""
    from card import packing

    weight = torch.randn(48, 256).bfloat16()
    for variants in (packing.of_24(weight, False), packing.of_bitmap(weight, False)):
        kernels = {name: variant for name, variant in variants.items() if variant.expected}
        assert len(kernels) >= 5
        for name, variant in kernels.items():
            if "to dense" not in name:
                with FakeTensorMode(allow_non_fake_inputs=True):
                    found = variant.call()
                found = (found,) if isinstance(found, torch.Tensor) else found
                for got, wanted in zip(found, variant.expected, strict=False):
                    assert got.dtype == wanted.dtype, name
                    assert got.dim() == wanted.dim(), name
    wrong = packing.Variant(lambda: (weight + 1, None), 0, (weight,))
    with pytest.raises(RuntimeError, match=r"the result \[48, 256\] is not the reference's"):
        wrong.check()


def test_a_wrong_result_costs_its_own_number_and_is_named_in_the_record_and_under_the_table(card, monkeypatch):
    from card import report, solver
    from card.worker import Setting

    from sparsekern.ops import inverse_cholesky

    setting = Setting("cpu", tiny=True, timed=True, until=time.time() + 60)
    by_halves = inverse_cholesky.by_halves

    def wrong(h, corner):
        u, failed = by_halves(h, corner)
        return (u * 1.1 if corner == 32 else u), failed

    monkeypatch.setattr(inverse_cholesky, "by_halves", wrong)
    (row,) = solver.factor(160, setting)
    assert list(row["times"]) == ["library", "by_halves to 64"]
    assert "U^T U H is off the identity by 0.2" in row["errors"]["by_halves to 32"]
    data = {"tiny": False, "where": {"gpu": "a card", "date": "2026-11-30"}, "seconds": 1.0}
    rows = [{"stage": "solver", "case": "inverse_cholesky", **row}, {"stage": "model", "case": "2:4", "error": "gone"}]
    block = report.block({**data, "rows": rows})
    assert "- solver inverse_cholesky inverse_cholesky, by_halves to 32: RuntimeError: U^T U H is off" in block
    assert "- model 2:4: gone" in block
    assert "| by_halves to 32 | error |" in report.page({**data, "rows": rows})


@pytest.mark.skipif(compiled.why_not("cpu") is not None, reason="no kernel has an order of its own")
def test_a_kernel_whose_weight_is_another_one_is_named_and_the_others_are_timed(card, monkeypatch):
    from card import conversions
    from card.worker import Setting

    setting = Setting("cpu", tiny=True, timed=True, until=time.time() + 60)
    expand = conversions._expand
    kernels = []

    def another(kernel, operands, shape):
        kernels.append(kernel.name)
        return expand(kernel, operands, shape) * (1 if kernel.name != kernels[0] else 2)

    monkeypatch.setattr(conversions, "_expand", another)
    (converted,) = conversions.measure(SemiStructured, (48, 256), setting)
    assert converted["errors"] == {kernels[0]: "RuntimeError: the expanded weight is another one"}
    assert f"{kernels[0]} prepare" not in converted["times"]
    assert converted["times"]["pack"]


def test_each_call_of_a_baseline_reads_a_weight_of_its_own():
    from card.layers import add_baseline

    from sparsekern.baselines import Dense

    read = []

    def run(x, prepared, bias):
        read.append(prepared[0].data_ptr())
        assert prepared[1] == "algorithm"
        return x @ prepared[0].T

    weight, to, refused, errors = torch.randn(8, 16), {}, {}, {}
    library = Dense("library", lambda weight, *_: (weight.clone(), "algorithm"), run, lambda weight: None)
    add_baseline(to, library, weight, 2, 3, "library", refused, errors)
    assert (refused, errors, to["library"].nbytes) == ({}, {}, weight.nbytes)
    for number in range(3):
        to["library"].run(torch.randn(2, 16), number)
    assert len(set(read)) == 3
    absent = Dense("absent", None, None, lambda weight: "it is not here")
    add_baseline(to, absent, weight, 2, 3, "absent", refused, errors)
    assert refused == {"absent": "it is not here"}


def test_a_slow_shape_leaves_the_others_their_share_and_says_what_it_left_out():
    from card import layers
    from card.worker import Setting

    setting = Setting("cpu", tiny=True, timed=False, until=time.time() + 60)
    assert setting.share(4).seconds_left == pytest.approx(15, abs=1)
    over = Setting("cpu", tiny=True, timed=False, until=time.time() - 1)
    first, second = layers.cases(over, "tiny", (1, 33))
    for case in (first, second):
        assert list(case.rows()) == [{"left_out": "time over before 1, 33 tokens"}]


def test_the_stages_that_must_not_be_missing_share_what_is_left_of_the_time():
    from card.stages import STAGES

    needed = sum(stage.seconds for stage in STAGES if not stage.spare)
    assert STAGES[-1].spare
    for left in (400.0, 170.0, 20.0):
        remaining, got = left, []
        for number, stage in enumerate(STAGES):
            got.append(stage.share(remaining, STAGES[number + 1 :], 1.0))
            remaining -= got[-1]
        # each has as large a part of its own time as the others have; the spare ones have the rest
        parts = [seconds / stage.seconds for seconds, stage in zip(got, STAGES, strict=True) if not stage.spare]
        assert parts == pytest.approx([min(1.0, left / needed)] * len(parts))
        spared = sum(seconds for seconds, stage in zip(got, STAGES, strict=True) if stage.spare)
        assert spared == pytest.approx(max(0.0, min(left - needed, sum(s.seconds for s in STAGES if s.spare))))
        # one that takes three times as long is stopped, and those behind it share what it has left
        late = left - 3 * got[0]
        assert STAGES[1].share(late, STAGES[2:], 1.0) > 0.7 * got[1]


def script(path, text):
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_tests_and_the_sanitizer_run_at_once_and_what_hangs_is_cut(monkeypatch, tmp_path):
    from card import correctness

    passes, hangs = tmp_path / "test_passes.py", tmp_path / "test_hangs.py"
    passes.write_text("def test_a(): pass\n")
    hangs.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n")
    tool = script(
        tmp_path / "compute-sanitizer", "print('checked obs_sweep\\n========= ERROR SUMMARY: 0 errors', flush=True)"
    )
    monkeypatch.setattr(correctness.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(correctness, "SUITES", {"passes": [str(passes)], "hangs": [str(hangs)]})
    monkeypatch.setattr(correctness, "AFTER", {"after": [str(passes)]})
    monkeypatch.setattr(correctness, "SHARE_OF_TIME", 0.5)
    rows = {row["what"]: row for row in correctness.run(14.0, tiny=False)}
    assert list(rows) == ["passes", "hangs", "memcheck", "racecheck", "after"]
    assert (rows["passes"]["passed"], rows["after"]["passed"], rows["hangs"]["passed"]) == (1, 1, 1)
    assert rows["hangs"]["error"] == "stopped when its time was over, after 1 tests"
    assert rows["memcheck"]["summary"] == "ERROR SUMMARY: 0 errors"
    assert rows["racecheck"]["checked"] == 1
    monkeypatch.setattr(correctness.shutil, "which", lambda name: None)
    monkeypatch.setattr(correctness, "SUITES", {})
    monkeypatch.setattr(correctness, "AFTER", {})
    assert [row["left_out"] for row in correctness.run(1.0, tiny=False)] == ["compute-sanitizer is not installed"]


def test_racecheck_looks_at_every_kernel_of_ours():
    from card import correctness

    written = "".join(path.read_text() for path in (ROOT / "sparsekern/ops/triton").glob("*.py"))
    kernels = re.findall(r"^def (_\w+_kernel)\(", written, re.MULTILINE)
    assert len(kernels) >= 6
    assert [name for name in kernels if not any(part in name for part in correctness.OURS)] == []
    for path in (ROOT / "csrc/cuda").glob("*.cu"):
        # so is each name, as the compiler writes it
        assert "namespace sparsekern" in path.read_text(), path
    assert "--kernel-name kns=sparsekern" in " ".join(correctness.TOOLS["racecheck"])
    assert correctness.TOOLS["memcheck"] == []


def test_a_build_that_fails_or_hangs_is_a_row(monkeypatch, tmp_path):
    from card import correctness

    monkeypatch.setattr(correctness, "ROOT", tmp_path)
    answers = iter([{"cuda": "it was not built"}, {"wgmma": "no CUTLASS"}])
    monkeypatch.setattr(correctness, "not_built", lambda: next(answers))
    (tmp_path / "setup.py").write_text("print('compiling')\n")
    (row,) = correctness.build(20.0, [9, 0])
    assert (row["built_now"], row["not_built"]) == (True, {"wgmma": "no CUTLASS"})
    assert "error" not in row
    answers = iter([{"cuda": "it was not built"}] * 2)
    (tmp_path / "setup.py").write_text("raise SystemExit('nvcc fatal: no such thing')\n")
    (row,) = correctness.build(20.0, [9, 0])
    assert row["error"].startswith("cuda: it was not built; nvcc fatal: no such thing")
    answers = iter([{"cuda": "it was not built"}] * 2)
    (tmp_path / "setup.py").write_text("import time; time.sleep(600)\n")
    (row,) = correctness.build(1.0, [9, 0])
    assert row["error"] == "cuda: it was not built; the build was stopped after 1 s"


# a process of a stage, at tiny sizes
WORKER = """
import sys
sys.path[:0] = [{root!r}, {bench!r}]
import card.worker as worker
import gpu
real = worker.Setting
worker.Setting = lambda device, tiny, timed, until: real(device, True, False, until)
sys.exit(gpu.main(["--worker", sys.argv[1], "--device", "cpu", *sys.argv[2:]]))
"""


def test_a_run_goes_from_stage_to_stage_and_leaves_its_files(monkeypatch, tmp_path, capfd):
    import gpu

    code = WORKER.format(root=str(ROOT), bench=str(ROOT / "bench"))
    monkeypatch.setattr(gpu, "worker_of", lambda stage, device: gpu.Worker(stage, [sys.executable, "-c", code, stage]))
    monkeypatch.setattr(gpu, "where_am_i", lambda commit: {"gpu": "NVIDIA H100", "date": "2026-11-30"})
    assert gpu.main(["--output", str(tmp_path), "--only", "ceilings", "packing", "--seconds", "450"]) == 0
    data = json.loads((tmp_path / "h100-2026-11-30.json").read_text())
    assert [row["stage"] for row in data["rows"]] == ["ceilings", "packing", "packing"]
    assert (tmp_path / "h100-2026-11-30.md").read_text().startswith("# NVIDIA H100, 2026-11-30")
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last == {
        "files": ["h100-2026-11-30.json", "h100-2026-11-30.md"],
        "rows": 3,
        "with_an_error": 0,
        "left_out": 0,
    }
    assert gpu.main(["--output", str(tmp_path), "--only", "ceilings", "packing", "--seconds", "0"]) == 0
    data = json.loads((tmp_path / "h100-2026-11-30.json").read_text())
    assert [row["left_out"] for row in data["rows"]] == ["time over before it began"] * 2
    assert gpu.main(["--show", str(tmp_path / "h100-2026-11-30.json")]) == 0
    with pytest.raises(ValueError, match="there is no stage 'decode'; there are ceilings"):
        gpu.main(["--only", "decode"])
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.newest() == tmp_path / "h100-2026-11-30.json"


def test_a_card_that_hangs_when_it_is_asked_for_is_no_card(monkeypatch, capfd, tmp_path):
    import gpu
    from card import record

    monkeypatch.setattr(record, "MACHINE", "import time; time.sleep(600)")
    monkeypatch.setattr(record, "ANSWER_SECONDS", 0.5)
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert "did not end within" in capfd.readouterr().err
