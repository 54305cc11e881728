"""keep_largest in Triton: what the compiler makes of the kernels."""

import pytest
import torch

from sparsekern.ops import keep_largest
from tests.ops.triton.without_a_card import compiled_for

pytestmark = pytest.mark.usefixtures("where_triton_is")


@pytest.mark.parametrize(
    ("name", "constants", "most"),
    # most: instructions, run once for 16 saliencies a thread
    [("_count_kernel", {"DIGIT": 3}, 1800), ("_ties_kernel", {}, 900), ("_mask_kernel", {}, 1200)],
    ids=["count", "ties", "mask"],
)
@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
def test_it_compiles_without_spills_to_few_registers(arch, name, constants, most, tmp_path):
    from sparsekern.ops.triton import keep_largest as kernels

    pointers = {"saliency_ptr": "*fp32", "kept_ptr": "*i64", "mask_ptr": "*i1"}
    types = dict.fromkeys(("counts_ptr", "ties_ptr", "before_ptr"), "*i32") | pointers | {"size": "i32"}
    constants = constants | {"CHUNK": kernels.CHUNK}
    options = {"num_warps": kernels.WARPS}
    registers, spilled, instructions = compiled_for(arch, getattr(kernels, name), constants, types, options, tmp_path)
    assert spilled == 0
    # three programs of 256 threads on a multiprocessor
    assert registers <= 80
    assert len(instructions) <= most


def test_the_kernel_refuses_in_words_what_is_not_on_a_card():
    (kernel,) = (kernel for kernel in keep_largest.KERNELS if kernel.name == "triton")
    assert kernel.refuses(torch.zeros(1, 8)) == "saliency must be on a CUDA device, got cpu"
