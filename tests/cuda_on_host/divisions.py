"""How decode is divided on an H200, without one: the launches are counted, and nothing of them is run.

Bytes under way = blocks that are on a multiprocessor at once x what each of their warps has asked for, of a bitmap
without the stage that is multiplied. Memory needs latency x bandwidth = 0.8 us x 4.3 TB/s / 132 = 26 KB of them on each
multiprocessor at any time.
"""

from tests.cuda_on_host.emulator import launches

MULTIPROCESSORS, SHARED_BYTES, REGISTERS = 132, 228 * 1024, 64 * 1024
ENOUGH_BYTES = 1.3 * 26_000
SHAPES = [(4096, 4096), (14336, 4096), (28672, 8192), (2048, 2048)]
TOKENS = (1, 16, 64)


def assert_divided_well(program, tensors, numbers, registers, warp_bytes, weight_bytes, enough=ENOUGH_BYTES):
    """Enough under way on every multiprocessor, which all have work; a small weight is all under way, or half of it.

    numbers    tokens, out_features, in_features and what else the program takes
    registers  of a thread, as tests/test_cuda_module.py has them
    """
    launch = launches(program.call("bf16", [None] * tensors, numbers, "counted", MULTIPROCESSORS))[0]
    busiest = -(-launch.blocks // MULTIPROCESSORS)
    large = numbers[1] * numbers[2] >= 1 << 24
    assert busiest * MULTIPROCESSORS <= (1.2 if large else 2.1) * launch.blocks
    room = min(SHARED_BYTES // (launch.shared_bytes + 1024), REGISTERS // (launch.threads * registers))
    under_way = min(room, busiest) * launch.threads // 32 * warp_bytes
    assert under_way >= min(enough, 0.45 * weight_bytes / MULTIPROCESSORS)
