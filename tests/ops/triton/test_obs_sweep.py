"""obs_sweep in Triton: obs_sweep_cases.py, interpreted and on a card, and what the compiler makes of the kernel."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekern.ops import obs_sweep, triton

CASES = Path(__file__).parent / "obs_sweep_cases.py"


@pytest.fixture(autouse=True)
def _where_triton_is(monkeypatch, tmp_path):
    if reason := triton.why_not():
        pytest.skip(reason)
    # a kernel that an earlier version compiled is not asked for, and a home that cannot be written is not needed
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def passes(interpret):
    # its own process: the variable must be set before triton is imported
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASES]
    done = subprocess.run(command, cwd=CASES.parents[3], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_every_case_holds_in_the_interpreter():
    passes("1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_case_holds_on_a_card():
    passes("0")


def compiled_for(arch, block, n, m, quantise):
    """The registers, the bytes of the stack, and the instructions of the kernel, read from its cubin."""
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparsekern.ops.triton.obs_sweep import REGISTERS, WARPS, _obs_sweep_kernel, shape

    constants = shape(block, n, m) | {"QUANTISE": quantise, "w_col": 1, "mask_col": 1}
    types = {"mask_ptr": "*i1", "levels": "fp32", "rows": "i32", "w_row": "i32", "mask_row": "i32"}
    names = _obs_sweep_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    # as at a launch: addresses and strides are multiples of 16
    whole = [i for i, name in enumerate(names) if name not in constants and name != "levels"]
    source = ASTSource(_obs_sweep_kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in whole})
    options = {"num_warps": WARPS, "num_stages": 1, "maxnreg": REGISTERS}
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "obs_sweep.cubin"
    cubin.write_bytes(compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"])

    def read(tool, *options):
        return subprocess.run([tool.path, *options, cubin], capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", read(knobs.nvidia.cuobjdump, "-res-usage"))
    sass = read(knobs.nvidia.nvdisasm, "-c")
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)", sass)
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local, instructions


@pytest.mark.parametrize(
    ("block", "n", "m", "quantise", "most"),
    # most: instructions, of which the loop runs nearly all once for 16 columns
    [(128, 1, 1, False, 1500), (128, 2, 4, False, 2000), (128, 4, 8, True, 2600)],
    ids=str,
)
@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
def test_it_compiles_without_spills_to_few_registers(arch, block, n, m, quantise, most):
    registers, spilled, instructions = compiled_for(arch, block, n, m, quantise)
    assert spilled == 0
    assert not {"LDL", "STL"} & set(instructions)
    # three programs of 128 threads on a multiprocessor
    assert registers <= 168
    assert len(instructions) <= most
    # fp32 products: no tensor core rounds them to tf32
    assert not {"HMMA", "HGMMA"} & set(instructions)


def test_the_kernel_refuses_in_words_what_is_not_on_a_card():
    weight, u = torch.zeros(2, 8), torch.eye(8)
    assert obs_sweep.KERNELS[0].name == "triton"
    assert obs_sweep.KERNELS[0].refuses(weight, u) == "weight must be on a CUDA device, got cpu"


def test_without_triton_sparsekern_imports_and_the_kernel_says_what_to_install():
    program = """
import sys
sys.modules["triton"] = None
import sparsekern
from sparsekern.ops import triton
print(triton.why_not())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CASES.parents[3])
    assert done.stdout.strip() == 'triton is not installed; pip install "sparsekern[triton]"', done.stderr
