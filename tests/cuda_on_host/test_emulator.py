"""The emulator of a card: mma.sp multiplies as the dense product does, and each mistake of a kernel is seen."""

import pytest
import torch

from sparsekern.formats import SemiStructured
from sparsekern.ops import fragments_24
from sparsekern.pattern import NM
from tests.cuda_on_host.emulator import ORDERS, build

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulator"), "emulator.cpp")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", TYPES)
def test_mma_sp_of_the_shuffled_weight_is_the_dense_product(program, name, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 256, generator=g)
    weight = weight.where(NM(2, 4).mask(torch.rand(16, 256, generator=g)), 0.0).to(TYPES[name])
    # groups that keep one weight or none
    weight[torch.rand(16, 256, generator=g) < 0.2] = 0
    x = torch.randn(8, 256, generator=g).to(TYPES[name])
    values, metadata = fragments_24.reference(SemiStructured.pack(weight))
    for tile in range(8):
        inputs = slice(32 * tile, 32 * tile + 32)
        operands = [values[0, 0, tile].view(torch.int32), metadata[0, 0, :, tile // 2].contiguous(), x[:, inputs]]
        (c,) = program.run(f"mma_sp_{name}", operands, [tile % 2], [((16, 8), torch.float32)], ORDERS[tile % 3])
        expected = weight[:, inputs].double() @ x[:, inputs].double().T
        torch.testing.assert_close(c.double(), expected, rtol=1e-6, atol=1e-6)


def test_mma_sp_does_not_multiply_what_is_pruned(program):
    weight = torch.zeros(16, 256, dtype=torch.bfloat16)
    weight[:, 2:4] = 1.0
    values, metadata = fragments_24.reference(SemiStructured.pack(weight))
    x = torch.ones(8, 32, dtype=torch.bfloat16)
    x[3, 1], x[4, 2] = float("nan"), float("inf")
    operands = [values[0, 0, 0].view(torch.int32), metadata[0, 0, :, 0].contiguous(), x]
    (c,) = program.run("mma_sp_bf16", operands, [0], [((16, 8), torch.float32)])
    assert c[0].tolist() == [2, 2, 2, 2, float("inf"), 2, 2, 2]


def test_metadata_whose_positions_do_not_rise_is_refused(program):
    values = torch.zeros(32, 4, dtype=torch.int32)
    x = torch.zeros(8, 32, dtype=torch.bfloat16)
    done = program.call("mma_sp_bf16", [values, torch.zeros(32, dtype=torch.int32), x], [0])
    assert b"the two positions must rise" in done.stderr


@pytest.mark.parametrize("name", TYPES)
def test_mma_of_ldmatrix_and_its_transposing_form_is_the_product(program, name):
    a, b = torch.randn(16, 16).to(TYPES[name]), torch.randn(16, 8).to(TYPES[name])
    (c,) = program.run(f"mma_{name}", [a, b], [], [((16, 8), torch.float32)])
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_shows_in_every_order(program, order):
    x = torch.arange(256.0)
    expected = x.view(2, 128).sum(1).repeat_interleave(128)
    result = [((256,), torch.float32)]
    assert torch.equal(program.run("sum", [x], [1], result, order)[0], expected)
    assert program.run("sum", [x], [0], result, order)[0].isnan().any()


def test_a_block_that_is_counted_before_all_of_it_has_written_shows_among_blocks_that_run_at_once(program):
    result, seeds = [((128,), torch.float32)], [str(seed) for seed in range(1, 21)]
    for order in ("forward", "reverse", *seeds):
        assert program.run("last block", [], [1], result, order)[0].eq(3).all()
    seen = [program.run("last block", [], [0], result, order)[0].isnan().any() for order in seeds]
    assert sum(seen) >= 10
    # one after the other they hide it
    assert program.run("last block", [], [0], result, "forward")[0].eq(3).all()


def test_a_copy_is_not_there_before_its_wait_and_fills_up_with_zeros(program):
    x = torch.arange(64, dtype=torch.uint8)
    result = [((4, 16), torch.uint8)]
    assert torch.equal(program.run("copy", [x], [0, 1], result)[0], x.view(4, 16))
    short = x.view(4, 16).clone()
    short[:, 13:] = 0
    assert torch.equal(program.run("copy", [x], [3, 1], result)[0], short)
    assert program.run("copy", [x], [0, 0], result)[0].eq(255).all()


def test_a_copy_from_an_address_off_16_bytes_is_refused(program):
    done = program.call("copy", [torch.zeros(64, dtype=torch.uint8)], [0, 1], shifts={0: 4})
    assert b"cp.async: global memory must lie on 16 bytes" in done.stderr


def test_a_read_past_a_tensor_and_a_write_past_shared_memory_are_seen(program):
    for op, tensors in (("copy", [torch.zeros(63, dtype=torch.uint8)]), ("overrun", [])):
        done = program.call(op, tensors, [0, 1])
        if b"AddressSanitizer" not in done.stderr and done.returncode == 0:
            pytest.skip("g++ has no sanitizers")
        assert b"heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize(
    ("op", "said"),
    [
        ("diverged", b"some lanes of the warp are at __syncwarp, others at __shfl_sync"),
        ("deserted", b"nobody can go on"),
    ],
)
def test_a_warp_that_does_not_come_together_is_told(program, op, said):
    done = program.call(op, [], [])
    assert done.returncode == 70
    assert said in done.stderr


def test_intrinsics_move_the_bits_that_the_manual_names(program):
    x = torch.tensor([0x44332211, 0x0BADF00D, 0x01010101], dtype=torch.int32)
    (y,) = program.run("bits", [x], [], [((9,), torch.int32)])
    a, b, c = x.tolist()
    expected = [0xAD330D11, (a & b) | c, 0x21, a.bit_count(), 0x00D44332, int(f"{a:032b}"[::-1], 2)]
    assert [v & 0xFFFFFFFF for v in y.tolist()[:6]] == expected
    assert [v & 0xFFFFFFFF for v in y.tolist()[6:]] == [sum(1 << i for i in range(0, 32, 3)), 30, 31]


def test_a_launch_that_no_card_takes_is_refused(program):
    done = program.call("too many threads", [], [])
    assert b"invalid configuration" in done.stderr
