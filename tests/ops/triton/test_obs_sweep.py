"""obs_sweep in Triton: what the compiler makes of the kernel."""

import subprocess
import sys

import pytest
import torch

from sparsekern.ops import obs_sweep
from tests.ops.triton.without_a_card import ROOT, compiled_for

pytestmark = pytest.mark.usefixtures("where_triton_is")


def version():
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


@pytest.mark.parametrize(
    ("block", "n", "m", "quantise", "most"),
    # most: instructions, of which the loop runs nearly all once for 16 columns
    [(128, 1, 1, False, 1500), (128, 2, 4, False, 2000), (128, 4, 8, True, 2600)],
    ids=str,
)
@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
def test_it_compiles_without_spills_to_few_registers(arch, block, n, m, quantise, most, tmp_path):
    from sparsekern.ops.triton.obs_sweep import REGISTERS, WARPS, _obs_sweep_kernel, shape

    constants = shape(block, n, m) | {"QUANTISE": quantise, "w_col": 1, "mask_col": 1}
    types = dict.fromkeys(("w_ptr", "u_ptr", "scale_ptr", "pruned_ptr", "e_ptr"), "*fp32")
    types |= {"mask_ptr": "*i1", "levels": "fp32", "rows": "i32", "w_row": "i32", "mask_row": "i32"}
    options = {"num_warps": WARPS, "num_stages": 1, "maxnreg": REGISTERS}
    registers, spilled, instructions = compiled_for(arch, _obs_sweep_kernel, constants, types, options, tmp_path)
    assert spilled == 0
    assert not {"LDL", "STL"} & set(instructions)
    # three programs of 128 threads on a multiprocessor; from Triton 3.9 on two
    assert registers <= (168 if version() < (3, 9) else REGISTERS)
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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == 'triton is not installed; pip install "sparsekern[triton]"', done.stderr
