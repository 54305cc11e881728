"""obs_blocks in Triton: what the compiler makes of the kernels."""

import pytest
import torch

from tests.ops.triton.without_a_card import compiled_for

pytestmark = pytest.mark.usefixtures("where_triton_is")

TYPES = dict.fromkeys(("w_ptr", "u_ptr", "before_ptr", "e_ptr"), "*fp32") | {"counts_ptr": "*i32"}
TYPES |= {"own_counts_ptr": "*i32", "may_ptr": "*i1", "mask_ptr": "*i1"}
TYPES |= dict.fromkeys(("block", "kept", "rows", "columns", "mask_row", "mask_block"), "i32")


def test_one_layer_after_the_other_uses_the_same_second_stream(monkeypatch):
    from sparsekern.ops.triton import obs_blocks as kernels

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    card, streams = torch.device("cuda", 0), ["one", "another"]
    found = [kernels.stream_beside(card, stream) for stream in streams * 3]
    assert len(set(map(id, found))) == 2
    kernels.stream_beside.cache_clear()


# most: instructions, of which those of a count run once for 16 weights a thread, and the sweep's loop for 16 columns
@pytest.mark.parametrize("arch", [80, 90, 120], ids="sm_{}".format)
@pytest.mark.parametrize(("digit", "most"), [(0, 2300), (2, 1900)], ids=str)
def test_the_counts_compile_without_spills(arch, digit, most, tmp_path):
    from sparsekern.ops.triton import obs_blocks as kernels

    constants = {"ROWS": 32, "COLUMNS": 128, "BLOCK": 128, "PRESENT": False, "DIGIT": digit}
    options = {"num_warps": kernels.COUNT_WARPS}
    registers, spilled, instructions = compiled_for(arch, kernels._count_kernel, constants, TYPES, options, tmp_path)
    assert spilled == 0
    # two programs of 256 threads on a multiprocessor
    assert registers <= 128
    assert len(instructions) <= most


@pytest.mark.parametrize("arch", [90, 120], ids="sm_{}".format)
@pytest.mark.parametrize(("counted", "n", "m", "most"), [(True, 1, 1, 4900), (False, 2, 4, 3100)], ids=str)
def test_the_sweep_compiles_without_spills(arch, counted, n, m, most, tmp_path):
    from sparsekern.ops.triton import obs_blocks as kernels

    constants = kernels.shape(128, n, m) | {"PRESENT": False, "COUNTED": counted}
    options = {"num_warps": kernels.WARPS, "num_stages": 1, "maxnreg": kernels.REGISTERS}
    registers, spilled, instructions = compiled_for(arch, kernels._sweep_kernel, constants, TYPES, options, tmp_path)
    assert spilled == 0
    assert registers <= kernels.REGISTERS
    assert len(instructions) <= most
    # fp32 products: no tensor core rounds them to tf32
    assert not {"HMMA", "HGMMA"} & set(instructions)


def test_a_kernel_is_looked_up_once_and_its_handle_takes_every_argument_in_its_place():
    from sparsekern.ops.triton import obs_blocks

    calls = []

    class Handle:
        def __getitem__(self, grid):
            return lambda *arguments: calls.append(("handle", grid, arguments))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **named: (calls.append(("kernel", grid, arguments, named)), Handle())[1]

    launch = obs_blocks._Launch(Kernel(), 7, {"ROWS": 32, "DIGIT": 1}, num_warps=4)
    launch(1, 2)
    launch(3, 4)
    assert calls == [
        ("kernel", (7, 1, 1), (1, 2), {"ROWS": 32, "DIGIT": 1, "num_warps": 4}),
        ("handle", (7, 1, 1), (3, 4, 32, 1)),
    ]
    # the constants come last in the kernels too, in the order in which they are given
    count, sweep = obs_blocks._count_kernel.arg_names, obs_blocks._sweep_kernel.arg_names
    assert count[-5:] == ["ROWS", "COLUMNS", "BLOCK", "PRESENT", "DIGIT"]
    assert sweep[-9:] == [*obs_blocks.shape(128, 2, 4), "PRESENT", "COUNTED"]


def test_the_model_of_a_layer_is_what_its_description_says():
    from sparsekern.ops.triton.obs_blocks import launches, model_us

    assert launches(4096, 128, counted=True) == (128, 30)
    assert launches(4096, 128, counted=False) == (32, 30)
    assert model_us(4096, 4096, 128, counted=True) == pytest.approx(1400, rel=0.1)
    # a wide layer waits for its products
    assert model_us(14336, 4096, 128, counted=True) == pytest.approx(14336 * 4096**2 / 50e6)
