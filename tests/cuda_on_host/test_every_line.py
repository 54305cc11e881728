"""Every line of the CUDA sources that the emulator can run was run by the tests of this folder: the last of them."""

import gzip
import json
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests.cuda_on_host import emulator

# ptx.cuh has another face here
SOURCES = {path.name for path in (emulator.CSRC / "cuda").glob("*.cu*")} - {"ptx.cuh"}


def executed(counts: Path) -> dict[str, dict[int, int]]:
    """How often each line ran, by file and line: what gcov says of one translation unit."""
    done = subprocess.run(["gcov", "--json-format", "--stdout", counts.name], cwd=counts.parent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    text = gzip.decompress(done.stdout) if done.stdout[:2] == b"\x1f\x8b" else done.stdout
    found = {}
    for file in json.loads(text)["files"]:
        lines = found.setdefault(Path(file["file"]).name, defaultdict(int))
        # a template has its lines once for each of its arguments
        for line in file["lines"]:
            lines[line["line_number"]] += line["count"]
    return found


def test_every_line_of_the_kernels_was_run(request):
    collected = {item.path for item in request.session.items}
    if missing := {path.name for path in Path(__file__).parent.glob("test_*.py") if path not in collected}:
        pytest.skip(f"it counts what all tests of this folder ran, {', '.join(sorted(missing))} among them")
    if request.config.option.keyword or request.session.testsfailed:
        pytest.skip("it counts what all tests of this folder ran, and some were deselected or failed")
    if shutil.which("gcov") is None:
        pytest.skip("no gcov was found")
    counts = defaultdict(lambda: defaultdict(int))
    for folder in emulator.FOLDERS:
        for path in folder.glob("*.gcda"):
            for name, lines in executed(path).items():
                for number, count in lines.items():
                    counts[name][number] += count
    assert counts.keys() >= SOURCES
    never = {name: [n for n, count in sorted(counts[name].items()) if count == 0] for name in SOURCES}
    assert {name: numbers for name, numbers in never.items() if numbers} == {}
