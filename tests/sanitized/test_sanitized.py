"""csrc/cpu under the address and undefined-behaviour sanitizers: no op reads or writes but its operands.

drive*.cpp calls every op on every instruction set of this machine, at sizes that divide nothing, and with weights that
lie as far as the binding lets them. What is written for AMX is compiled with tiles in plain C++ (tiles_in_cxx.h): it
runs, and is compared with float64, where there is no AMX. How fast it is, nothing here says.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fopenmp", "-DSPARSEKERN_TILES_IN_CXX"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """The program, compiled once, as many files at a time as there are cores."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ was found")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cpp").write_text("int main() { return 0; }\n")
    tried = run(compiler, "-fopenmp", *SANITIZERS, folder / "empty.cpp", "-o", folder / "empty")
    if tried.returncode:
        pytest.skip(f"g++ has no sanitizers: {tried.stderr.strip().splitlines()[-1]}")
    # the longest first
    sources = sorted([*CSRC.glob("cpu/*.cpp"), *HERE.glob("*.cpp")], key=lambda path: -path.stat().st_size)

    def build(source):
        target = folder / f"{source.name}.o"
        done = run(compiler, *FLAGS, *SANITIZERS, "-I", CSRC, "-I", HERE, "-c", source, "-o", target)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, sources))
    done = run(compiler, "-fopenmp", *SANITIZERS, *objects, "-o", folder / "drive")
    assert done.returncode == 0, done.stderr
    return folder / "drive"


def test_every_op_stays_within_its_operands(drive):
    done = run(drive)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.fullmatch(r"clean:( \w+)* portable\n", done.stdout)


def test_the_sanitizer_sees_a_read_behind_the_end(drive):
    done = run(drive, "0")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize(
    ("which", "words"),
    [
        (0, "would refuse: tiles that are not configured"),
        (1, "would refuse: a tile too large"),
        (2, "would refuse: a tile that there is not"),
        (3, "would refuse: rows without bytes"),
        (4, "would refuse: sums that have not the rows of a"),
        (5, "would refuse: tiles that are not configured"),
        (6, "that were not released"),
    ],
)
def test_the_tiles_refuse_what_a_processor_refuses_and_a_release_that_is_missing(drive, which, words):
    done = run(drive, "tiles", which)
    assert done.returncode != 0
    assert words in done.stderr


def test_every_op_of_ops_h_is_driven():
    declared = re.findall(r"^(?:bool|void|int64_t|uint64_t) (\w+)\(", (CSRC / "ops.h").read_text(), re.MULTILINE)
    source = "".join(path.read_text() for path in HERE.glob("*.cpp"))
    assert len(declared) >= 13
    assert [name for name in declared if f"{name}(" not in source] == []
