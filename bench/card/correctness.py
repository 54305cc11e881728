"""correctness: what comes before any time: the modules are built, the tests pass on the card, the sanitizer is mute.

The tests, in several processes, and both of the sanitizer's tools run at once: nothing is timed meanwhile.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from card import process
from card.record import Json, answer, version, with_path

ROOT = Path(__file__).parents[2]
MODULES = """
import json
from sparsekern.ops import compiled
print(json.dumps({name: why for name in ("cpu", "cuda", "wgmma") if (why := compiled.why_not(name))}))
"""
# wgmma is one more kernel, where CUTLASS was found
NEEDED = {"cpu", "cuda"}
LINEAR, LARGE = "tests/on_card/test_linear.py", "tests/on_card/test_large.py"
# each in a process of its own, all at once
SUITES = {
    "tests/on_card, linear layers in bitmaps": [LINEAR, "-k", "bitmap"],
    "tests/on_card, linear layers else": [LINEAR, "-k", "not bitmap"],
    "tests/on_card, the rest": ["tests/on_card", f"--ignore={LINEAR}", f"--ignore={LARGE}"],
    "tests of the ops on a card": ["tests/ops", "tests/cuda_on_host", "-k", "on_a_card"],
}
# alone: it takes the card's memory
AFTER = {"tests/on_card, more than 2^31 elements": [LARGE]}
# of the time, for what runs at once; the rest is left to what comes after
SHARE_OF_TIME = 0.75
# racecheck looks at our kernels alone, by a part of their names: torch's and cuBLAS's would take all of the time
OURS = ("sparsekern", "_sweep_kernel", "_count_kernel", "_ties_kernel", "_mask_kernel")
TOOLS = {"memcheck": [], "racecheck": [flag for part in OURS for flag in ("--kernel-name", f"kns={part}")]}
# before it a licence's name in pyproject.toml is refused
SETUPTOOLS = 77
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL)\b", re.MULTILINE)


def build(seconds: float, capability: list[int] | None = None) -> Iterator[Json]:
    """One row: whether the compiled modules are there, built now where they were not.

    capability  the card's, major and minor: what is built now is for that card alone; None: for every card
    """
    start = time.monotonic()
    absent, log = not_built(), ""
    if built_now := bool(NEEDED & absent.keys()):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        with tempfile.TemporaryFile("w+", errors="replace") as to:
            building = process.start(command, cwd=ROOT, env=for_card(capability), stdout=to, stderr=subprocess.STDOUT)
            cut = process.wait(building, start + seconds)
            to.seek(0)
            log = f"the build was stopped after {seconds:.0f} s" if cut else to.read()
        absent = not_built()
    row = {"stage": "build", "built_now": built_now, "not_built": absent, "took": round(time.monotonic() - start, 1)}
    needed = [f"{name}: {absent[name]}" for name in sorted(NEEDED & absent.keys())]
    yield {**row, "error": f"{'; '.join(needed)}; {log[-1500:]}"} if needed else row


def for_card(capability: list[int] | None) -> dict[str, str]:
    """The environment of a build. With Hopper, nvcc's a says that its own instructions may be used."""
    if capability is None or "SPARSEKERN_CUDA_ARCHS" in os.environ:
        return with_path()
    major, minor = capability
    return with_path() | {"SPARSEKERN_CUDA_ARCHS": f"{major}{minor}" + "a" * (major == 9)}


def not_built() -> dict[str, str]:
    """The modules that cannot be loaded, and why."""
    status, said, why = answer([sys.executable, "-c", MODULES], cwd=ROOT, env=with_path())
    return json.loads(said.splitlines()[-1]) if status == 0 else dict.fromkeys(NEEDED, why.strip()[-500:])


def why_not_buildable() -> str | None:
    """What this Python lacks to build the modules, and what to do; None where they are there or nothing is missing."""
    if not NEEDED & not_built().keys():
        return None
    found = {"setuptools": version("setuptools"), "pybind11": version("pybind11")}
    found["ninja"] = version("ninja") or shutil.which("ninja")
    if missing := [name for name, there in found.items() if not there]:
        return f"{' and '.join(missing)} not installed: {sys.executable} -m pip install {' '.join(missing)}"
    if int(found["setuptools"].partition(".")[0]) < SETUPTOOLS:
        remedy = f"{sys.executable} -m pip install 'setuptools>={SETUPTOOLS}'"
        return f"setuptools must be {SETUPTOOLS} or newer, got {found['setuptools']}: {remedy}"
    if not Path(include := sysconfig.get_path("include"), "Python.h").exists():
        return f"Python.h is not in {include}: install this Python's headers"
    return None


def run(seconds: float, tiny: bool) -> Iterator[Json]:
    """A row a suite and a row a tool. What is not done in time is stopped, and the row says how far it came."""
    begun = time.monotonic()
    sanitizer = shutil.which("compute-sanitizer")
    running: list[tuple[str, str, subprocess.Popen, Path]] = []
    with tempfile.TemporaryDirectory() as folder:

        def start(kind: str, name: str, command: list[str], **more: str) -> None:
            log = Path(folder, f"{len(running)}.log")
            with log.open("wb") as to:
                started = process.start(command, cwd=ROOT, stdout=to, stderr=subprocess.STDOUT, env=with_path() | more)
            running.append((kind, name, started, log))

        pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
        for name, suite in SUITES.items():
            if tiny:
                yield {"stage": "tests", "what": name, "left_out": "a tiny run: they are part of the test suite"}
                continue
            start("tests", name, [*pytest, *suite])
        script = [sys.executable, "bench/card/sanitized.py", *(["--device", "cpu"] if tiny else [])]
        if tiny:
            start("sanitizer", "without compute-sanitizer", script)
        elif sanitizer is None:
            yield {"stage": "sanitizer", "left_out": "compute-sanitizer is not installed"}
        else:
            for tool, filters in TOOLS.items():
                flags = ["--tool", tool, *filters, "--report-api-errors", "no", "--error-exitcode", "9"]
                # every tensor its own allocation, so that an access beyond it is seen
                start("sanitizer", tool, [sanitizer, *flags, *script], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        yield from _ended(running, begun + SHARE_OF_TIME * seconds)
        running.clear()
        for name, suite in () if tiny else AFTER.items():
            start("tests", name, [*pytest, *suite])
        yield from _ended(running, begun + seconds)


def _ended(running: list[tuple[str, str, subprocess.Popen, Path]], until: float) -> Iterator[Json]:
    """A row for each process, when it is done or its time is over."""
    try:
        for kind, name, started, log in running:
            cut = process.wait(started, until)
            text = log.read_text(errors="replace")
            yield {"stage": kind, "what": name, **(_tests if kind == "tests" else _sanitizer)(text, started, cut)}
    finally:
        for _, _, started, _ in running:
            process.stop(started)


def _tests(text: str, done: subprocess.Popen, cut: bool) -> Json:
    outcomes = OUTCOME.findall(text)
    names = {"PASSED": "passed", "FAILED": "failed", "SKIPPED": "skipped", "ERROR": "in_error"}
    row: Json = {name: sum(outcome == word for _, outcome in outcomes) for word, name in names.items()}
    bad = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    # why, from the summary
    row["failures"] = [line for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))][:40] or bad
    row["skips"] = [line for line in text.splitlines() if line.startswith("SKIPPED ")][:40]
    if cut:
        row["error"] = f"stopped when its time was over, after {len(outcomes)} tests"
    elif done.returncode not in (0, 1, 5):
        row["error"] = f"pytest ended with {done.returncode}: {text[-1500:]}"
    elif bad:
        row["error"] = f"{len(bad)} tests fail"
    return row


def _sanitizer(text: str, done: subprocess.Popen, cut: bool) -> Json:
    checked = re.findall(r"^checked (.+)$", text, re.MULTILINE)
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    row: Json = {"checked": len(checked), "summary": summary[-1] if summary else None}
    if cut:
        row["error"] = f"stopped when its time was over, behind {checked[-1] if checked else 'nothing'}"
    elif done.returncode:
        row["error"] = f"exit status {done.returncode}: {text[-1500:]}"
    return row
