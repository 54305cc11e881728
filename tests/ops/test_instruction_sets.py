"""Instruction sets: what is compiled for one stays in its files, and which one is used can be chosen."""

import math
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch

from sparsekern.formats import Bitmap
from sparsekern.ops import compiled, linear_bitmap
from sparsekern.plan import Plan

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


needs_cpu = pytest.mark.skipif(compiled.cpu() is None, reason=f"sparsekern._cpu: {compiled.why_not('cpu')}")


@needs_cpu
@pytest.mark.parametrize("isa", compiled.cpu().instruction_sets() if compiled.cpu() else ())
def test_a_chosen_set_multiplies(isa):
    torch.manual_seed(0)
    dense = (torch.randn(50, 70) * (torch.rand(50, 70) < 0.5)).bfloat16()
    x, y = torch.randn(3, 70).bfloat16(), torch.zeros(3, 50).bfloat16()
    operands = linear_bitmap.to_panels(Bitmap.pack(dense))
    linear_bitmap.sparse(x, operands, None, y, 70, isa)
    with compiled.using(isa):
        assert compiled.cpu().isa() == isa
        # what was packed by another set is packed alike by this one
        for ours, theirs in zip(linear_bitmap.to_panels(Bitmap.pack(dense)), operands, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(linear_bitmap.run_cpu(x, operands, None, 50, 70), y)


@needs_cpu
def test_nothing_better_than_the_chosen_set_is_used_and_only_within_the_block():
    best = compiled.cpu().isa()
    with compiled.using("portable"):
        assert compiled.cpu().gram_sets() == ()
        assert not compiled.cpu().has_addmm()
        with compiled.using(best), compiled.using(None):
            assert compiled.cpu().isa() == best
        assert compiled.cpu().isa() == "portable"
        plan = Plan().to_json()
    assert compiled.cpu().isa() == best
    if best != "portable":
        with pytest.raises(ValueError, match=f"measured with instruction_set 'portable', here it is '{best}'"):
            Plan.from_json(plan)


@needs_cpu
def test_a_set_that_this_machine_lacks_is_refused_in_words():
    with pytest.raises(ValueError, match=r"does not have the instruction set avx1024, only .*portable"):
        with compiled.using("avx1024"):
            pass


def test_no_set_is_chosen_where_nothing_was_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_load", lambda name: (None, "not built: no compiler"))
    with pytest.raises(RuntimeError, match="without sparsekern._cpu: not built: no compiler"):
        with compiled.using("avx2"):
            pass


def test_many_tokens_are_left_to_torch_only_where_its_product_is_faster(monkeypatch):
    tokens = linear_bitmap._dense_tokens.__wrapped__
    here = types.SimpleNamespace(instruction_sets=lambda: ("avx512_bf16", "avx512", "avx2", "portable"))
    monkeypatch.setattr(compiled, "cpu", lambda: here)
    assert tokens(torch.bfloat16, "avx512_bf16", False) == math.inf
    assert tokens(torch.bfloat16, "avx2", False) == 192
    # on AVX-512 few kept weights are multiplied without the zeros
    assert tokens(torch.bfloat16, "avx512", False) == 192
    assert tokens(torch.bfloat16, "avx512", True) == math.inf
    assert tokens(torch.bfloat16, "avx2", True) == 192
    # torch multiplies bfloat16 slowly on a processor that has no instruction for it
    here.instruction_sets = lambda: ("avx2", "portable")
    assert tokens(torch.bfloat16, "avx2", False) == math.inf
    assert tokens(torch.bfloat16, "portable", False) == 192
    assert tokens(torch.float32, "avx2", False) == math.inf
    assert tokens(torch.float32, "portable", False) == 2048
