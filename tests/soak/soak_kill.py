"""prune_streaming() is killed hundreds of times, at every step that changes the disk and at random times, and resumed.

Run it by `pytest -s tests/soak/soak_kill.py`, or all of these by `make soak`.
"""

import random
import shutil
import time
from contextlib import nullcontext, suppress

import pytest

from sparsekern import Finish, SparseGPT, Wanda
from sparsekern.methods import Magnitude
from tests.killed import HALVED, calls, killed
from tests.pruned_directories import contents, saved, streaming_run

pytestmark = pytest.mark.usefixtures("one_thread")

# model, settings, and every how many calls there is a kill
RUNS = {
    "llama, SparseGPT": ("llama", {"method": SparseGPT(block_size=16), "pattern": "2:4"}, 1),
    "gpt2, no calibration": ("gpt2", {"method": Magnitude(), "pattern": 0.5, "calibration": None}, 3),
    "t5, finished": ("t5", {"method": SparseGPT(block_size=16), "pattern": 0.5, "finish": Finish(epochs=1)}, 4),
    "qwen3_moe, Wanda": ("qwen3_moe", {"method": Wanda(), "pattern": 0.5}, 5),
    "gemma3n, prefix": ("gemma3n", {"method": Wanda(), "pattern": 0.5}, 6),
}
BY_THE_CLOCK, AGAIN = 12, 8


@pytest.mark.parametrize("case", RUNS)
def test_every_killed_run_goes_on_to_the_same_bytes(case, tmp_path):
    name, settings, every = RUNS[case]
    source = saved(name, tmp_path / "dense")
    wanted_run = streaming_run(name, source, tmp_path / "wanted", **settings)
    began = time.perf_counter()
    made = calls(wanted_run)
    seconds = time.perf_counter() - began
    wanted, points = contents(tmp_path / "wanted"), 0
    chance = random.Random(0)
    output = tmp_path / "killed"
    run = streaming_run(name, source, output, **settings)

    def run_unless_done() -> None:
        # killed after everything was done, there is nothing to go on with
        with suppress(FileExistsError) if output.exists() else nullcontext():
            run()

    def goes_on(struck: bool, what: str) -> None:
        nonlocal points
        if struck:
            points += 1
        run_unless_done()
        assert contents(output) == wanted, what
        assert {path.name for path in tmp_path.iterdir()} == {"dense", "wanted", "killed"}, what
        shutil.rmtree(output)

    for at, call in list(enumerate(made, 1))[::every]:
        goes_on(killed(run, at), f"before call {at}, {call}")
        if call in HALVED:
            goes_on(killed(run, at, within=True), f"within call {at}, {call}")
    for _ in range(BY_THE_CLOCK):
        after_s = chance.uniform(0, 1.2 * seconds)
        goes_on(killed(run, after_s=after_s), f"after {after_s:.3f} s")

    # one run that is killed again and again
    kills = sum(killed(run_unless_done, at=chance.randrange(1, len(made))) for _ in range(AGAIN))
    points += kills
    goes_on(False, f"after {kills} kills")
    print(f"\n{case}: {points} kills, {kills} of them of one run, all resumed to the same bytes")
