"""On a machine that lacks something: everything that does not need it works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekern.demo import MODEL

ROOT = Path(__file__).parents[1]
SCRIPT = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from sparsekern.cli import app
model, directory = sys.argv[1:]
calibration, output = f"{model}/calibration.txt", f"{directory}/a pruned model"
def run(*arguments):
    try:
        app([str(argument) for argument in arguments])
    except SystemExit as exit:
        assert not exit.code, exit.code
run("prune", model, "-o", output, "--calibration", calibration, "--method", "wanda", "--samples", 2, "--seqlen", 64,
    "--skip", "model.layers.[123].*")
run("inspect", output, "--json")
import sparsekern as sk
from sparsekern import hf
from sparsekern.formats import Bitmap
pruned = hf.load(output)
import torch
x = torch.arange(12)[None]
want = pruned(x).logits
report = sk.sparsify(pruned, plan=sk.Unmeasured())
assert report.swapped
assert (pruned(x).logits - want).float().norm() <= 2e-2 * want.float().norm()
plan = sk.Plan(seconds=0.0, arena=1 << 16)
weight = hf.layers(hf.load(output))[0][1].weight.detach()
plan.decide((Bitmap.pack(weight),), weight)
plan.save(f"{directory}/plan.json")
sk.Plan.load(f"{directory}/plan.json")
sk.save(pruned, f"{directory}/a packed model")
print("all of it ran")
"""


def environment(home):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HF_", "MPL", "TORCH"))}
    return kept | {"HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def no_network():
    """What runs a command without any network, where that is permitted; nothing otherwise."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode != 0:
        return []
    return [unshare, "-rn"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="nothing here that even root cannot write to")
def test_no_home_no_network_one_core_and_a_path_with_spaces(tmp_path):
    directory = tmp_path / "a path with späces"
    directory.mkdir()
    shutil.copytree(MODEL, directory / "a model")
    command = [*no_network(), sys.executable, "-c", SCRIPT, str(directory / "a model"), str(directory)]
    # nobody can make a file in /proc
    done = subprocess.run(
        command, env=environment("/proc/self"), capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all of it ran\n")
    assert sorted(path.name for path in directory.iterdir()) == [
        "a model",
        "a packed model",
        "a pruned model",
        "plan.json",
    ]
