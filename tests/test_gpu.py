"""bench/gpu.py without a card: lost and hanging processes, how a row is timed, what is made of the rows."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")


def worker(code, lost=None):
    """What run_stage starts: a process that answers as `code` says; `number` is the case to begin with."""
    import gpu

    before = "import json, os, sys, time\npipe = os.fdopen(int(sys.argv[-1]), 'w')\n"
    before += "number = json.loads(sys.stdin.readline())['first']\n"
    before += "def say(**line): print(json.dumps(line), file=pipe, flush=True)\n"
    return gpu.Worker("stage", [sys.executable, "-c", before + code])


CASES = """
for number in range(number, 4):
    say(begin=number, case=f"case {number}")
    if number == 1: os.kill(os.getpid(), 11)
    if number == 2:
        say(row={"case": "case 2", "error": "an illegal memory access"})
        sys.exit(3)
    say(row={"case": f"case {number}"})
say(end=4)
"""


def test_a_process_that_is_lost_costs_one_case_and_another_goes_on_behind_it(monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "worker_of", lambda stage, device: worker(CASES))
    rows = list(gpu.run_stage("stage", worker(CASES), "cpu", time.time() + 60))
    assert [(row["case"], row.get("error")) for row in rows] == [
        ("case 0", None),
        ("case 1", "the process ended with status -11"),
        ("case 2", "an illegal memory access"),
        ("case 3", None),
    ]


def test_a_process_that_hangs_is_stopped_and_what_it_had_is_kept(monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1.0)
    hangs = worker(
        'say(begin=0, case="first"); say(row={"case": "first"}); say(begin=1, case="hangs"); time.sleep(600)'
    )
    rows = list(gpu.run_stage("stage", hangs, "cpu", time.time()))
    assert rows[0] == {"case": "first"}
    assert rows[1]["case"] == "hangs"
    assert "stopped" in rows[1]["error"]


def test_what_a_process_has_started_ends_with_it(tmp_path):
    """compute-sanitizer's program would stay on the card, and a compiler beside what is timed."""
    from card import process

    child = "import subprocess, sys; subprocess.run([sys.executable, '-uc', 'import time; print(1); time.sleep(600)'])"
    read, write = os.pipe()
    started = process.start([sys.executable, "-c", child], stdout=write)
    os.close(write)
    assert os.read(read, 1) == b"1"
    assert process.wait(started, time.monotonic() + 0.1)
    assert started.returncode == -9
    # nobody holds the other end any more
    with os.fdopen(read) as rest:
        assert rest.read() == "\n"
    process.stop(started)


def test_a_command_that_does_not_answer_is_given_up(monkeypatch):
    from card import record

    monkeypatch.setattr(record, "ANSWER_SECONDS", 0.5)
    status, said, why = record.answer([sys.executable, "-c", "import time; time.sleep(60)"])
    assert (status, said) == (124, "")
    assert "did not end within" in why
    assert record.answer(["no-such-program-anywhere"])[0] == 127


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"setuptools": "65.5.0"}, "setuptools must be 77 or newer, got 65.5.0: .* -m pip install 'setuptools>=77'"),
        ({"pybind11": None}, "pybind11 not installed: .* -m pip install pybind11"),
        ({"setuptools": None, "ninja": None}, "setuptools and ninja not installed: .* install setuptools ninja"),
    ],
    ids=["old setuptools", "no pybind11", "two missing"],
)
def test_a_card_without_the_tools_to_build_is_told_at_once(versions, words, monkeypatch, capsys, tmp_path):
    import gpu
    from card import correctness

    there = {"setuptools": "81.0.0", "pybind11": "3.0.1", "ninja": "1.13"}
    monkeypatch.setattr(correctness, "version", lambda name: (there | versions)[name])
    monkeypatch.setattr(correctness.shutil, "which", lambda name: None)
    monkeypatch.setattr(correctness, "not_built", lambda: {"cuda": "it was not built"})
    monkeypatch.setattr(gpu, "where_am_i", lambda commit: {"gpu": "a card", "date": "2026-11-30"})
    assert gpu.main(["--output", str(tmp_path / "out")]) == 1
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_case_that_fails_is_a_row_and_the_others_run(tmp_path):
    from card.worker import Case, Setting, work

    def fails():
        yield {"done": 1}
        raise RuntimeError("no such thing")

    lines = []

    class Pipe:
        def write(self, line):
            lines.append(json.loads(line))

        def flush(self):
            pass

    cases = [Case("fails", fails), Case("works", lambda: [{"done": 2}])]
    assert work("stage", cases, Setting("cpu", True, False, time.time() + 60), 0, Pipe()) == 0
    rows = [line["row"] for line in lines if "row" in line]
    assert rows[0] == {"stage": "stage", "case": "fails", "done": 1}
    assert rows[1]["error"] == "RuntimeError: no such thing"
    assert rows[2] == {"stage": "stage", "case": "works", "done": 2}
    lines.clear()
    work("stage", cases, Setting("cpu", True, False, time.time() - 1), 0, Pipe())
    assert lines[0]["row"]["left_out"] == "time over before 2 cases"


class FakeGraph:
    """A captured graph that remembers how often it was replayed."""

    replays = 0

    def replay(self):
        self.replays += 1
        time.sleep(0.001)


def test_a_row_alternates_replays_of_graphs_and_divides_by_their_calls(monkeypatch):
    from card import clock
    from card.worker import Setting

    graphs = {}

    def captured(call, calls, pool):
        if call(0) == "refuses":
            raise RuntimeError("operation not permitted when stream is capturing")
        return graphs.setdefault(call(0), FakeGraph())

    monkeypatch.setattr(clock, "captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def raises(number):
        raise ValueError("shape")

    variants = {"a": lambda number: "a", "b": lambda number: "refuses", "c": raises}
    timed = clock.time_variants(variants, "a", Setting("cpu", True, True, 0), calls=4, rounds=10, seconds=1.0)
    assert graphs["a"].replays >= 10
    # a replay of four calls takes 1 ms
    assert 0.2e-3 < timed.latencies["a"].median < 0.9e-3
    assert timed.eager == ["b"]
    assert timed.errors == {
        "b, captured": "RuntimeError: operation not permitted when stream is capturing",
        "c": "ValueError: shape",
    }
    assert set(timed.ratios) == {"b"}


def test_an_output_that_is_wrong_or_not_all_written_is_no_result():
    from card.clock import check_linear, poisoned

    x, weight = torch.randn(100, 32), torch.randn(24, 32)
    check_linear(lambda _: x @ weight.T, x, weight)
    with pytest.raises(RuntimeError, match="1 of 2400 outputs are NaN"):
        check_linear(
            lambda _: (x @ weight.T).index_put((torch.tensor(50), torch.tensor(3)), torch.tensor(torch.nan)), x, weight
        )
    with pytest.raises(RuntimeError, match="the result is off by"):
        check_linear(lambda _: x @ (1.01 * weight).T, x, weight)
    with poisoned():
        assert torch.empty(3).isnan().all()


def latency(seconds):
    return {"median": seconds, "p10": seconds, "p90": seconds, "rounds": 100, "dropped": 0, "steady": True}


def layer_row(tokens, linear, ours, library=None, size=8192):
    names = {"F.linear": linear, "2:4 cuda": ours, **({"2:4 cuSPARSELt": library} if library else {})}
    return {
        "stage": "layers llama-3-70b",
        "model": "llama-3-70b",
        "layers": ["q_proj"],
        "out_features": size,
        "in_features": size,
        "tokens": tokens,
        "dtype": "bfloat16",
        "times": {name: latency(seconds) for name, seconds in names.items()},
        "speedup": {name: {"median": linear / seconds} for name, seconds in names.items() if name != "F.linear"},
        "bytes": {"F.linear": 2 * size**2, "2:4 cuda": 9 * size**2 // 8, "2:4 cuSPARSELt": 9 * size**2 // 8},
        "errors": {},
        "refused": {"2:4 cusparselt": "torch brings no cuSPARSELt"},
        "eager": [],
    }


def ran(rows, tiny=False):
    where = {"gpu": "NVIDIA H200", "date": "2026-11-30", "torch": "2.11.0", "driver": "580", "commit": "abc"}
    return {"gpu": "sparsekern", "tiny": tiny, "where": where, "seconds": 400.0, "rows": rows}


CEILINGS = {
    "stage": "ceilings",
    "work": {"copy": 4e9, "read": 4e9, "product": 8e11},
    "times": {"copy": latency(1e-3), "read": latency(1e-3), "product": latency(1e-3)},
    "errors": {},
}
MODEL = {
    "stage": "model",
    "model": "llama-3-8b",
    "pattern": "2:4",
    "pass": "decode",
    "tokens": 1,
    "times": {"dense": latency(0.005), "sparse": latency(0.004)},
    "speedup": {"sparse": {"median": 1.25}},
    "errors": {},
    "swapped": 224,
    "stay_dense": 1,
}


def test_a_target_is_judged_by_the_worst_row_in_its_range():
    from card.targets import TARGETS

    # 8192 x 8192 at 2:4 is 75.5 MB: 18.9 us at 4 TB/s
    rows = [CEILINGS, layer_row(1, 40e-6, 20e-6, 30e-6), layer_row(32, 40e-6, 25e-6), layer_row(64, 40e-6, 80e-6)]
    verdicts = {target.what: target.verdict(rows) for target in TARGETS}
    floor, over = (
        verdicts["2:4 decode: of the byte floor, weights from 100 MB, to 32 tokens"],
        verdicts["2:4 decode over cuBLAS, weights from 100 MB, to 32 tokens"],
    )
    assert floor == ("75% (8192x8192, 32 tokens, worst of 2 rows)", "missed")
    assert over == ("1.6x (8192x8192, 32 tokens, worst of 2 rows)", "met")
    assert verdicts["2:4 decode over cuSPARSELt's best, to 16 tokens"] == ("1.5x (8192x8192, 1 token)", "met")
    assert verdicts["50 % decode over cuBLAS, to 8 tokens"] == ("not measured", "not measured")


def test_what_no_card_has_measured_reads_not_measured():
    from card import report

    for data in (None, ran([CEILINGS, layer_row(1, 4e-5, 2e-5)], tiny=True), ran([])):
        text = report.block(data)
        assert text.startswith("No card has measured this yet.")
        numbers = [
            line
            for line in text.splitlines()
            if line.startswith("| ") and "wanted" not in line and "tokens a" not in line
        ]
        assert len(numbers) == 15 + 5
        assert all("not measured" in line for line in numbers)


def test_a_run_becomes_a_page_and_drawings_with_every_row(tmp_path):
    from card import report

    rows = [CEILINGS, layer_row(1, 40e-6, 20e-6), layer_row(32, 40e-6, 25e-6), MODEL]
    rows += [{"stage": "solver", "case": "block 50%", "error": "out of memory"}]
    rows += [{"stage": "tests", "what": "tests/on_card", "passed": 12, "failed": 0, "failures": [], "skips": []}]
    path = tmp_path / "h200-2026-11-30.json"
    files = report.write(ran(rows), path)
    assert [file.name for file in files] == [
        "h200-2026-11-30.md",
        "h200-2026-11-30-llama-3-70b.png",
        "h200-2026-11-30-model.png",
    ]
    text = files[0].read_text()
    for part in (
        "# NVIDIA H200, 2026-11-30",
        "| 1 | 40.0 us 84% | 20.0 us 2.00x 94% | not measured |",
        "| 2:4 | 250, 1.25x (224 of 225 layers sparse) | not measured |",
        "- 2:4 cusparselt: torch brings no cuSPARSELt",
        "- solver block 50%: error: out of memory",
        "tests tests/on_card: passed 12",
    ):
        assert part in text, part
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])


def test_what_pytest_and_the_sanitizer_print_is_counted_also_when_they_were_stopped():
    from card import correctness

    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    printed = "tests/a.py::test_one[2:4 cuda] PASSED [ 50%]\ntests/a.py::test_two SKIPPED (no CUDA device) [100%]\n"
    row = correctness._tests(printed + "SKIPPED [1] tests/a.py:3: no CUDA device\n", done, cut=False)
    assert (row["passed"], row["skipped"], row["failed"], row.get("error")) == (1, 1, 0, None)
    assert row["skips"] == ["SKIPPED [1] tests/a.py:3: no CUDA device"]
    row = correctness._tests(printed + "tests/a.py::test_three FAILED [ 3%]\n", done, cut=True)
    assert row["failures"] == ["tests/a.py::test_three"]
    assert row["error"] == "stopped when its time was over, after 3 tests"
    watched = "checked obs_sweep\nchecked keep_largest\n========= ERROR SUMMARY: 0 errors\n"
    assert correctness._sanitizer(watched, done, cut=False) == {
        "checked": 2,
        "summary": "ERROR SUMMARY: 0 errors",
    }
    assert "behind keep_largest" in correctness._sanitizer(watched, done, cut=True)["error"]


def test_one_forward_pass_goes_where_the_one_before_it_went_and_sees_what_is_cached(one_thread):
    from card import model
    from card.worker import Setting
    from torch.fx.experimental.proxy_tensor import make_fx

    from sparsekern import shapes

    dense = model.random_model(shapes.find("tiny"), Setting("cpu", True, False, 0)).float()
    step = model.Step(dense, 2, 5)
    first = step()
    with torch.no_grad():
        whole = dense(input_ids=torch.cat([step.before, step.ids], dim=1)).logits[:, -1:]
    torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(step(), first)
    # the cache matters, and nothing in a pass asks for a number, which a capture could not answer
    step.cache.layers[0].values.mul_(2.0)
    assert not torch.equal(step(), first)
    make_fx(lambda: step(), tracing_mode="fake", _allow_non_fake_inputs=True)()


def test_without_a_card_nothing_is_run_and_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    ran = subprocess.run(
        [sys.executable, "bench/gpu.py", "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert "no card was found" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_build_on_the_spot_is_for_the_card_that_is_there(monkeypatch):
    from card import correctness

    monkeypatch.delenv("SPARSEKERN_CUDA_ARCHS", raising=False)
    assert correctness.for_card([9, 0])["SPARSEKERN_CUDA_ARCHS"] == "90a"
    assert correctness.for_card([8, 6])["SPARSEKERN_CUDA_ARCHS"] == "86"
    assert "SPARSEKERN_CUDA_ARCHS" not in correctness.for_card(None)
    monkeypatch.setenv("SPARSEKERN_CUDA_ARCHS", "80 90a")
    assert correctness.for_card([9, 0])["SPARSEKERN_CUDA_ARCHS"] == "80 90a"
