"""sparsekern._cuda as it was built: every architecture, no spills, few registers, what the main loops cost."""

import functools
import json
import os
import re
from pathlib import Path

import pytest
import torch

from sparsekern.ops import compiled
from tests import sass

PACKAGE = Path(compiled.__file__).parents[1]
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
# registers a thread, by what the kernel's name contains: what its blocks need to be as many on a multiprocessor as its
# file says; a kernel that is not here has room for 512 threads
REGISTERS = {
    r"linear_24_kernel\w+Li1E": 64,
    r"linear_24_kernel\w+Li2E": 80,
    r"linear_24_kernel\w+Li4E": 104,
    r"linear_24_kernel\w+Li8E": 128,
    r"linear_24_prefill_kernel\w+TileILi4E": 254,
    r"linear_24_prefill_kernel\w+TileILi2E\w+Lb1E": 128,
    r"linear_24_prefill_kernel\w+TileILi2E\w+Lb0E": 138,
    r"linear_bitmap_kernel": 64,
    r"bitmap_fragments_kernel\w+Li1E": 88,
    r"bitmap_fragments_kernel\w+Li2E": 96,
    r"bitmap_fragments_kernel\w+Li4E": 136,
    r"bitmap_fragments_kernel\w+Li8E": 184,
}
MOST_REGISTERS = 128
# of the loop with the instruction: the dense elements that a pass of it serves, a thread, and what a thread may spend
# on each. An H200 has 7.8 instructions a dense element at the full bandwidth of its memory.
LOOPS = [
    # kernel, loop with, dense elements a thread, instructions an element, POPC an element
    (r"linear_24_kernel\w+Li[12]E", "HMMA.SP", 16 * 256 / 32, 1.3, 0),
    (r"linear_24_kernel\w+Li4E", "HMMA.SP", 16 * 256 / 32, 1.6, 0),
    (r"linear_24_kernel\w+Li8E", "HMMA.SP", 16 * 256 / 32, 2.1, 0),
    # a segment of one panel, or of two, with the copies of the next one; 8, 16, 32 and 64 tokens. The loop over 12 rows
    # of cells counts once
    (r"bitmap_fragments_kernel\w+Li1E", "HMMA", 16 * 256 / 32, 4.05, 0),
    (r"bitmap_fragments_kernel\w+Li2E", "HMMA", 16 * 256 / 32, 4.25, 0),
    (r"bitmap_fragments_kernel\w+Li4E", "HMMA", 32 * 256 / 32, 4.45, 0),
    (r"bitmap_fragments_kernel\w+Li8E", "HMMA", 32 * 256 / 32, 5.1, 0),
]
# what a thread may spend on each dense element in kernels that move 16 bytes at a time: in the loop along a row, where
# there is one, else before the last way out but one, behind which stands what is done for weights that are refused. An
# H200 has 6.9 instructions a thread for each byte that it reads or writes at the full bandwidth of its memory
STREAMS = [
    # kernel, loop with, dense elements a thread, instructions an element, bytes an element
    (r"pack_24_kernelILi2ELb1E", None, 32, 11, 3.125),
    (r"pack_24_kernelILi4ELb1E", None, 32, 17, 6.125),
    (r"unpack_24_kernelILi2ELb1E", None, 32, 8, 3.125),
    (r"unpack_24_kernelILi4ELb1E", None, 32, 11.5, 6.125),
    (r"bitmap_bits_kernelILi2ELb1E", "POPC", 32, 7.5, 2.125),
    (r"bitmap_bits_kernelILi4ELb1E", "POPC", 32, 11, 4.125),
    # at 50 %
    (r"bitmap_values_kernelILi2ELb1E", "SHFL", 32, 12, 3.125),
    (r"bitmap_values_kernelILi4ELb1E", "SHFL", 32, 12, 6.125),
    (r"bitmap_to_dense_kernelILi2ELb1E", "SHFL", 32, 16, 3.125),
    (r"bitmap_to_dense_kernelILi4ELb1E", "SHFL", 32, 17.5, 6.125),
    # a warp has 4096 elements, a lane 128
    (r"fragments_24_kernelILb1E", None, 128, 4, 2.25),
    (r"fragments_24_to_dense_kernel", None, 128, 3, 3.125),
    (r"keep_largest_kernelILi2E", None, 16, 33, 5),
    (r"keep_largest_kernelILi4E", None, 16, 33, 5),
    (r"keep_largest_kernelILi8E", None, 16, 43, 5),
    (r"keep_largest_kernelILi16E", None, 16, 38, 5),
]
INSTRUCTIONS_A_BYTE = 6.9
SHARE_OF_COPY = 0.7


@pytest.fixture(scope="module")
def module():
    """The file of the built module, and the tool that reads it."""
    if reason := compiled.why_not("cuda"):
        pytest.skip(f"sparsekern._cuda: {reason}")
    tool = sass.cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump was found, neither a toolkit's nor Triton's")
    return tool, Path(compiled.cuda().__file__)


@functools.cache
def kernels(module, arch):
    return sass.kernels(*module, arch)


def there(module, arch):
    if arch not in sass.architectures(*module)[0]:
        pytest.skip(f"this nvcc does not know {arch}")


def test_every_architecture_that_the_compiler_knows_is_there_and_ptx_for_those_to_come(module):
    elf, ptx = sass.architectures(*module)
    flags = " ".join(json.loads((PACKAGE / "_build.json").read_text())["cuda"]["flags"])
    assert set(re.findall(r"code=(sm_\w+)", flags)) <= elf
    if os.environ.get("SPARSEKERN_CUDA_ARCHS"):
        pytest.skip("it was built for the cards of SPARSEKERN_CUDA_ARCHS")
    assert ptx == {"sm_80"}
    # CUDA 12.8 is the first to know sm_120
    if "release 13" in json.loads((PACKAGE / "_build.json").read_text())["cuda"]["compiler"]:
        assert set(ARCHS) <= elf


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills_and_each_keeps_to_its_registers(module, arch):
    there(module, arch)
    usage = sass.usage(*module, arch)
    assert usage
    assert {name: local for name, (_, local) in usage.items() if local} == {}
    too_many = {name: used for name, (used, _) in usage.items() if used > most_registers(name)}
    assert too_many == {}


def most_registers(name):
    return next((most for pattern, most in REGISTERS.items() if re.search(pattern, name)), MOST_REGISTERS)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_kernel_reads_or_writes_local_memory(module, arch):
    there(module, arch)
    found = {name: kernel.count(opcode) for name, kernel in kernels(module, arch).items() for opcode in ("LDL", "STL")}
    assert {name: count for name, count in found.items() if count} == {}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_barriers_are_those_of_whole_blocks(module, arch):
    """A barrier whose number is in a register takes a block's 16, of 64 that a Hopper multiprocessor has."""
    there(module, arch)
    found = {
        (name, each.operands.strip())
        for name, kernel in kernels(module, arch).items()
        for each in kernel.instructions
        if each.opcode.startswith("BAR")
    }
    assert len(found) > 10
    assert {operands for _, operands in found} == {"0x0"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_2_4_weights_meet_the_sparse_tensor_cores(module, arch):
    there(module, arch)
    found = {name: kernel for name, kernel in kernels(module, arch).items() if re.search(r"linear_24\w*kernel", name)}
    if not found:
        pytest.skip("this module has no kernel for 2:4")
    for name, kernel in found.items():
        assert kernel.count("HMMA.SP.16832.F32"), name
        # a dense tile among them would be a mistake
        assert kernel.count("HMMA") == kernel.count("HMMA.SP"), name


@pytest.mark.parametrize(("pattern", "opcode", "elements", "instructions", "popcounts"), LOOPS, ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_main_loop_costs_few_instructions_a_dense_element(
    module, arch, pattern, opcode, elements, instructions, popcounts
):
    there(module, arch)
    found = [kernel for name, kernel in kernels(module, arch).items() if re.search(pattern, name)]
    if not found:
        pytest.skip(f"this module has no kernel {pattern}")
    for kernel in found:
        loop = kernel.loop_with(opcode)
        assert len(loop.instructions) / elements <= instructions, kernel.name
        assert loop.count("POPC") / elements <= popcounts, kernel.name


@pytest.mark.parametrize(("pattern", "opcode", "elements", "instructions", "nbytes"), STREAMS, ids=str)
def test_what_packs_and_unpacks_has_instructions_to_spare_at_seven_tenths_of_the_copy(
    module, pattern, opcode, elements, instructions, nbytes
):
    there(module, "sm_90a")
    (kernel,) = [kernel for name, kernel in kernels(module, "sm_90a").items() if re.search(rf"\d{pattern}", name)]
    spent = len(kernel.loop_with(opcode).instructions if opcode else kernel.before_refusals()) / elements
    assert spent <= instructions
    assert spent <= nbytes * INSTRUCTIONS_A_BYTE / SHARE_OF_COPY
    # of a packed weight the half or less may be in 8
    wide = [each.opcode for each in kernel.instructions if re.match(r"(LDG|STG)\.E\.(NA\.)?128", each.opcode)]
    assert wide, kernel.name


LISTING = """
\t\tFunction : _Z6kernelv
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2] ;
        /*0020*/                   HMMA.SP.16832.F32 R8, R4, R12, R8, R3, 0x0 ;
        /*0030*/              @!P1 BRA 0x20 ;
        /*0040*/                   POPC R5, R4 ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/              @!P2 BRA 0x80 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
"""


def test_the_shortest_loop_with_an_instruction_is_found(monkeypatch):
    usage = " Function _Z6kernelv:\n  REG:47 STACK:8 SHARED:0 LOCAL:4 CONSTANT[0]:424\n"
    monkeypatch.setattr(sass, "_read", lambda tool, flag, *_: usage if flag == "-res-usage" else LISTING)
    (kernel,) = sass.kernels("cuobjdump", "module", "sm_90a").values()
    assert (kernel.registers, kernel.local, len(kernel.instructions)) == (47, 12, 9)
    with pytest.raises(IndexError):
        kernel.before_refusals()
    assert [each.address for each in kernel.loop_with("HMMA.SP").instructions] == [0x20, 0x30]
    assert [each.address for each in kernel.loop_with("POPC").instructions] == [0x10, 0x20, 0x30, 0x40, 0x50]
    with pytest.raises(LookupError, match="_Z6kernelv has no loop with MOV"):
        kernel.loop_with("MOV")


# what every launching function takes, for one output of one token; sizes that hold for any address
OPERANDS = {
    "linear_bitmap_": {"x_size": 8, "bitmap_size": 1, "row_offsets_size": 2, "in_features": 8},
    "linear_24_": {"x_size": 8, "values_size": 2048, "metadata_size": 128, "in_features": 8, "out_features": 1},
    "linear_bitmap_fragments_": {"x_size": 8, "masks_size": 132, "quad_rows_size": 9, "in_features": 8}
    | {"out_features": 1, "cell_rows": 0, "capacity": 0},
    "bitmap_fragments_to_": {"masks_size": 132, "quad_rows_size": 9, "in_features": 8, "out_features": 1}
    | {"dense_size": 8, "cell_rows": 0, "capacity": 0},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card launches")
def test_a_launch_that_the_runtime_refuses_is_raised_with_its_words():
    """Without a card every launch fails, before anything is read."""
    if reason := compiled.why_not("cuda"):
        pytest.skip(f"sparsekern._cuda: {reason}")
    functions = {name: getattr(compiled.cuda(), name) for name in dir(compiled.cuda()) if name[0] != "_"}
    seen = set()
    for name, function in functions.items():
        begins = max((start for start in OPERANDS if name.startswith(start)), key=len, default=None)
        if begins is None or "stream" not in function.__doc__:
            continue
        wanted = re.findall(r"(\w+): typing", function.__doc__)
        given = {"tokens": 1, "y_size": 1, **OPERANDS[begins]}
        with pytest.raises(RuntimeError, match=r"^\w+: .*(CUDA|driver|device)") as caught:
            function(**{argument: given.get(argument, 0) for argument in wanted})
        assert name.startswith(str(caught.value).partition(":")[0])
        seen.add(begins)
    assert seen == {*OPERANDS}
