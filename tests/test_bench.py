"""Every bench script runs at a tiny size, so that none can rot, and ends with its result as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# what makes a script tiny; train_demo_model.py has a test of its own
TINY = [
    ["accuracy.py", "layers", "--tiny"],
    ["accuracy.py", "perplexity", "--tiny"],
    ["calls.py", "--tiny"],
    ["checkpoint.py", "--tiny"],
    ["finetune.py", "--tiny"],
    ["gpu.py", "--tiny"],
    ["linear.py", "--tiny"],
    ["model.py", "--tiny"],
    ["plan.py", "--tiny"],
    ["prune_model.py", "--tiny"],
    ["solver.py", "--tiny", "--methods", "sparsegpt", "admm"],
]
ELSEWHERE = {"train_demo_model.py"}


def test_every_bench_script_is_run_here():
    assert {path.name for path in (ROOT / "bench").glob("*.py")} == ELSEWHERE | {command[0] for command in TINY}


@pytest.mark.parametrize("script", TINY, ids=" ".join)
def test_a_bench_script_runs_and_ends_with_json(script):
    command = [sys.executable, str(ROOT / "bench" / script[0]), *script[1:]]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])


def test_perplexities_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import accuracy

    rows = [
        {"method": name, "pattern": spec, "perplexity": 9.0} for spec in ("50%", "2:4") for name in ("Wanda", "ADMM")
    ]
    accuracy.plot({"dense": {"value": 7.0}, "rows": rows}, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_fine_tuning_can_be_drawn_and_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import finetune

    rows = [
        {"variant": name, "pattern": pattern, "curve": [(0, 9.0), (4, 8.0)]}
        for name, pattern in (("dense", None), ("SparseGPT", "2:4"), ("gradual", "60%"))
    ]
    finetune.plot({"rows": rows}, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    size = finetune.asdict(finetune.TINY)
    finetune._write(tmp_path / "runs.json", {"size": size, "judge": "held-out", "runs": [{"seed": 0}]})
    assert finetune._done(tmp_path / "runs.json", finetune.TINY, "held-out") == [{"seed": 0}]
    with pytest.raises(ValueError, match="holds runs of .* on held-out text; give another file"):
        finetune._done(tmp_path / "runs.json", finetune.TINY, "validation")


def test_the_benchmarks_of_the_ops_run():
    command = [sys.executable, "-m", "pytest", "-q", "-k", "tiny", "--benchmark-disable", "-p", "no:cacheprovider"]
    ran = subprocess.run([*command, str(ROOT / "bench")], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout
    assert "passed" in ran.stdout


def test_every_op_has_its_benchmark():
    ops = {path.stem for path in (ROOT / "sparsekern/ops").glob("*.py")}
    # what is no op, and kernels of linear_24 and linear_bitmap, which have theirs there
    ops -= {"__init__", "kernel", "compiled", "linear_call", "cusparselt", "wgmma_24", "linear_bitmap_fragments"}
    assert {op for op in ops if not (ROOT / f"bench/ops/bench_{op}.py").exists()} == set()
