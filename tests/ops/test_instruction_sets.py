"""csrc/cpu as it was compiled: what is for one instruction set stays in its files, and is what it says."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# as in setup.py
OBJECTS = ROOT / f"build/{sys.implementation.cache_tag}-{sysconfig.get_platform()}/cpu"


def output_of(tool, *arguments):
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} was found")
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module")
def objects():
    """The object files by the name of their source."""
    found = {path.stem: path for path in OBJECTS.glob("*.cpp.o") if (ROOT / "csrc/cpu" / path.stem).exists()}
    if not found:
        pytest.skip("nothing was compiled here")
    return found


def test_no_weak_symbol_of_an_instruction_set_is_another_files(objects):
    """The linker keeps one of several: the baseline could get code that its processor does not have."""
    weak = {}
    for name, path in objects.items():
        for symbol in re.findall(r" [WVu] (\S+)", output_of("nm", path)):
            weak.setdefault(symbol, set()).add(name)
    shared = {symbol: names for symbol, names in weak.items() if len(names) > 1}
    assert {symbol: names for symbol, names in shared.items() if any(re.search("avx|amx", x) for x in names)} == {}
    # nor one that only happens not to be shared today
    assert [
        s for s, names in weak.items() if re.search("avx|amx", min(names)) and not re.search("(?i)avx|amx", s)
    ] == []


def test_the_kernel_for_amx_is_made_of_its_instructions(objects):
    code = output_of("objdump", "-d", "-M", "intel", objects["linear_bitmap_amx.cpp"])
    if "tilerelease" not in code:
        pytest.skip("this objdump does not know AMX")
    for instruction in ("ldtilecfg", "tilezero", "tileloadd", "tilestored"):
        assert re.search(rf"\b{instruction}\b", code), instruction
    # the sums come first, then x, then the weights
    assert re.search(r"tdpbf16ps\s+tmm0,tmm4,tmm6", code)
