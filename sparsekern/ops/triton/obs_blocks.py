"""obs_blocks in Triton: a layer in few launches, and the host never waits (ops/obs_blocks.py has the contract).

Every program holds the same ROWS rows of each block in turn. What the block before owes to this one's columns is
subtracted by the block's own first launch, so that the product for the columns further behind runs on a stream of its
own beside it: what is left on the chain are these launches.

    N:M, or a mask    1    subtract and sweep
    a number          4    subtract, and count the saliencies' first digits; their second; their third; sweep
    beside the chain  1    cuBLAS: W[:, behind the next block] -= E U

A square's bits are a key of three digits, the exponent's 8 bits and then 12 and 11. Each count adds to the numbers of
the keys that agree with the threshold so far; the third also leaves each program's own numbers, from which the sweep
knows how many ties come before its own. So the mask costs no launch: each sweep writes its own part of it and reads it.

The time, as a model and not as a measurement: a block of 128 columns has a chain of 4 launches, or 1, of some 5 us, of
which the sweep's 128 dependent steps take 20 us more. For 4096 x 4096 that is 32 x 40 = 1.3 ms, or 32 x 25 = 0.8 ms for
N:M; beside it go rows x columns^2 = 69 GFLOP of products at some 50 TFLOP/s of float32, 1.4 ms. The longer of the two
is what a layer should take from U on. `launches` counts, and `model_us` has this sum for any shape.
"""

import functools
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops.keep_largest import refuse_nan
from sparsekern.ops.obs_blocks import Choice, check
from sparsekern.ops.triton.obs_sweep import REGISTERS, WARPS, shape, sweep_columns

# digits of a key: 8, 12 and 11 bits; what is counted for a block, and for a program of the last digit
DIGITS = 3
NUMBERS = tl.constexpr(256 + 4096 + 2048)
OWN_NUMBERS = 2048
# of a program that counts: with the sweep's four the first digit's spills on sm_120
COUNT_WARPS = 8
# columns of the block before that one product takes
INNER = tl.constexpr(16)

# of the model: a launch on the chain, a step of the sweep, and float32 products a second of an H200
LAUNCH_US, STEP_US, PRODUCTS_PER_US = 5.0, 0.16, 50e6


def launches(columns: int, block_size: int, counted: bool) -> tuple[int, int]:
    """Of a layer: on the chain, and products beside it. `counted`: a number of weights a block is kept."""
    blocks = -(-columns // block_size)
    return blocks * (1 + DIGITS * counted), max(blocks - 2, 0)


def model_us(rows: int, columns: int, block_size: int, counted: bool) -> float:
    """What a layer should take on an H200: the longer of the chain and of the products. Counted, not measured."""
    chain, _ = launches(columns, block_size, counted)
    return max(chain * LAUNCH_US + columns * STEP_US, rows * columns**2 / PRODUCTS_PER_US)


class _Launch:
    """A kernel that is started again and again with other numbers.

    Triton looks for a kernel's machine code at every start, which takes longer than some of these kernels; here it does
    so at the first one only.
    """

    def __init__(self, kernel, grid: int, constants: dict[str, object], **options: int):
        self.kernel, self.grid = kernel, (grid, 1, 1)
        self.constants, self.options = constants, options
        self.found = None

    def __call__(self, *arguments: object) -> None:
        if self.found is None:
            # nothing is found by the interpreter
            self.found = self.kernel[self.grid](*arguments, **self.constants, **self.options)
        else:
            self.found[self.grid](*arguments, *self.constants.values())


def run(w: Tensor, u: Tensor, block_size: int, choice: Choice) -> None:
    """As `reference`, for blocks of at most 128 columns and M of at most 16."""
    missing = enqueue(w, u, block_size, choice)
    if missing is not None:
        refuse_nan(int(missing))


def enqueue(w: Tensor, u: Tensor, block_size: int, choice: Choice) -> Tensor | None:
    """What `run` does, without waiting for it: a CUDA graph can capture it.

    Returns how many saliencies were NaN, [] int32, where a number of weights is kept: with any, `w` says nothing.
    """
    check(w, u, block_size, choice)
    (rows, columns), present = w.shape, choice.present
    if w.numel() == 0:
        return None
    blocks, counted = -(-columns // block_size), choice.kept is not None
    mask, strides = _mask_of(w, block_size, choice)
    constants = shape(block_size, *(choice.nm or (1, 1)))
    programs = triton.cdiv(rows, constants["ROWS"])
    # of each block and digit how often each value; last, how many NaN
    counts = torch.zeros(blocks * NUMBERS.value + 1 if counted else 1, dtype=torch.int32, device=w.device)
    own_counts = w.new_empty(programs, OWN_NUMBERS, dtype=torch.int32) if counted else counts
    errors = [w.new_empty(rows, block_size) for _ in range(2)]
    may = w if present is None else present.contiguous()

    has_present = {"PRESENT": present is not None}
    sizes = {name: constants[name] for name in ("ROWS", "COLUMNS", "BLOCK")} | has_present
    count = [
        _Launch(_count_kernel, programs, sizes | {"DIGIT": digit}, num_warps=COUNT_WARPS)
        for digit in range(DIGITS * counted)
    ]
    sweep = _Launch(
        _sweep_kernel,
        programs,
        constants | has_present | {"COUNTED": counted},
        num_warps=WARPS,
        num_stages=1,
        maxnreg=REGISTERS,
    )
    # no card is meant for tensors of the CPU, which Triton's interpreter takes
    with torch.cuda.device_of(w):
        products = _Products(w, u, block_size)
        for block in range(blocks):
            products.wait()
            kept, before, e = choice.kept[block] if counted else 0, errors[(block - 1) % 2], errors[block % 2]
            for launch in count:
                launch(w, u, before, may, counts, own_counts, block, kept, rows, columns)
            sweep(w, u, before, may, counts, own_counts, block, kept, rows, columns, mask, *strides, e)
            products.add(block, e)
    return counts[-1] if counted else None


def _mask_of(w: Tensor, block_size: int, choice: Choice) -> tuple[Tensor, tuple[int, int]]:
    """What the sweep reads as its mask, and how far apart its rows and its blocks are."""
    if choice.kept is not None:
        # each program's own part, written and read by nobody else
        return w.new_empty(w.shape[0], block_size, dtype=torch.bool), (block_size, 0)
    masks = [mask for mask in (choice.mask, choice.present) if mask is not None]
    if not masks:
        # every row's
        return w.new_ones(block_size, dtype=torch.bool), (0, 0)
    return (masks[0] if len(masks) == 1 else masks[0] & masks[1]).contiguous(), (w.shape[1], block_size)


@functools.cache
def stream_beside(device: torch.device, stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """Where the products run beside `stream`: always the same, for cuBLAS keeps a workspace, 32 MB on Hopper, of each
    stream that it has seen, and torch has 32 of them.
    """
    return torch.cuda.Stream(device)


class _Products:
    """W[:, behind the next block] -= E U for one block after the other, beside what is launched meanwhile."""

    def __init__(self, w: Tensor, u: Tensor, block_size: int):
        self.w, self.u, self.block_size = w, u, block_size
        self.stream = stream_beside(w.device, torch.cuda.current_stream(w.device)) if w.is_cuda else None
        # of the product before the last one, and of the last one
        self.ends: list[torch.cuda.Event | None] = [None, None]

    def wait(self) -> None:
        """The block that comes now is behind the next one of the product before the last."""
        if self.ends[0] is not None:
            self.ends[0].wait()

    def add(self, block: int, e: Tensor) -> None:
        """Subtract what a block owes, once all that was launched so far is done."""
        here, behind = block * self.block_size, (block + 2) * self.block_size
        end = None
        if behind < self.w.shape[1]:
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.current_stream())
            with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
                self.w[:, behind:].addmm_(e, self.u[here : here + self.block_size, behind:], alpha=-1.0)
                end = None if self.stream is None else self.stream.record_event()
        self.ends = [self.ends[1], end]


@triton.jit
def _weights(
    w_ptr,
    u_ptr,
    before_ptr,
    block,
    row,
    inside,
    columns,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OWED: tl.constexpr,
):
    """A program's rows of a block [ROWS, BLOCK]; OWED: less what the block before owes to them."""
    col = tl.arange(0, BLOCK)
    at = block * COLUMNS + col
    there = ((col < COLUMNS) & (at < columns))[None, :]
    w = tl.load(w_ptr + row[:, None] * columns + at[None, :], mask=inside & there, other=0.0)
    if OWED:
        if block > 0:
            for first in range(0, COLUMNS, INNER):
                inner = first + tl.arange(0, INNER)
                known = inner < COLUMNS
                e_at = before_ptr + row[:, None] * COLUMNS + inner[None, :]
                u_row = ((block - 1) * COLUMNS + inner).to(tl.int64)
                e = tl.load(e_at, mask=inside & known[None, :], other=0.0)  # [ROWS, INNER]
                u = tl.load(u_ptr + u_row[:, None] * columns + at[None, :], mask=known[:, None] & there, other=0.0)
                w -= tl.dot(e, u, input_precision="ieee")
    return w


@triton.jit
def _keys(
    w, u_ptr, may_ptr, block, row, inside, columns, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PRESENT: tl.constexpr
):
    """Integers that order as the saliencies do, and which of them stand for a weight."""
    col = tl.arange(0, BLOCK)
    at = block * COLUMNS + col
    there = (col < COLUMNS) & (at < columns)
    valid = inside & there[None, :]
    u_jj = tl.load(u_ptr + at.to(tl.int64) * (columns + 1), mask=there, other=1.0)[None, :]
    scaled = tl.div_rn(w, tl.broadcast_to(u_jj, w.shape))
    if PRESENT:
        # what is not present is not counted, and so never stays
        valid &= tl.load(may_ptr + row[:, None] * columns + at[None, :], mask=valid, other=0) != 0
    # a square's bits order as it does
    return (scaled * scaled).to(tl.int32, bitcast=True), valid


@triton.jit
def _threshold(counts_ptr, kept, FOUND: tl.constexpr):
    """The first FOUND digits of the kept'th largest key, and how many of those that agree with them are to be kept."""
    prefix, room = _next_digit(counts_ptr, 0, kept, 8)
    if FOUND > 1:
        prefix, room = _next_digit(counts_ptr + 256, prefix, room, 12)
    if FOUND > 2:
        prefix, room = _next_digit(counts_ptr + (256 + 4096), prefix, room, 11)
    return prefix, room


@triton.jit
def _next_digit(counts_ptr, prefix, room, BITS: tl.constexpr):
    value = tl.arange(0, 1 << BITS)
    count = tl.load(counts_ptr + value)
    above = tl.cumsum(count, axis=0, reverse=True) - count
    # the digit stays 0 with none to keep, and where there are fewer than are to be kept
    here = (above < room) & (room <= above + count)
    return (prefix << BITS) + tl.sum(tl.where(here, value, 0)), room - tl.sum(tl.where(here, above, 0))


@triton.jit(do_not_specialize=["block", "kept"])
def _count_kernel(
    w_ptr,  # [rows, columns] float32, in and out
    u_ptr,  # [columns, columns] float32
    before_ptr,  # [rows, COLUMNS] float32, the errors of the block before
    may_ptr,  # [rows, columns] bool, where PRESENT
    counts_ptr,  # [blocks, NUMBERS] int32 and the number of NaN, in and out
    own_counts_ptr,  # [programs, 2048] int32, cleared at the first digit, out at the last
    block,
    kept,
    rows,
    columns,
    ROWS: tl.constexpr,  # rows per program
    COLUMNS: tl.constexpr,  # columns of a block
    BLOCK: tl.constexpr,  # the same, padded to a power of two
    PRESENT: tl.constexpr,
    DIGIT: tl.constexpr,  # 0 is the highest
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    w = _weights(w_ptr, u_ptr, before_ptr, block, row, inside, columns, COLUMNS, BLOCK, DIGIT == 0)
    key, counted = _keys(w, u_ptr, may_ptr, block, row, inside, columns, COLUMNS, BLOCK, PRESENT)
    counts_at = counts_ptr + block * NUMBERS
    own_at = own_counts_ptr + tl.program_id(0) * 2048
    if DIGIT == 0:
        col = tl.arange(0, BLOCK)
        there = (col < COLUMNS) & (block * COLUMNS + col < columns)
        tl.store(w_ptr + row[:, None] * columns + (block * COLUMNS + col)[None, :], w, mask=inside & there[None, :])
        tl.store(own_at + tl.arange(0, 2048), tl.zeros([2048], tl.int32))
        # beyond the bits of an infinity, or negative
        missing = tl.sum(tl.sum((((key > 0x7F800000) | (key < 0)) & counted).to(tl.int32), axis=1))
        tl.atomic_add(counts_ptr + tl.cdiv(columns, COLUMNS) * NUMBERS, missing, mask=missing > 0)
        # nearly all lie in a few of these: first counted here
        exponents = tl.histogram(
            tl.reshape((key >> 23) & 255, [ROWS * BLOCK]), 256, mask=tl.reshape(counted, [ROWS * BLOCK])
        )
        tl.atomic_add(counts_at + tl.arange(0, 256), exponents, mask=exponents > 0)
    elif DIGIT == 1:
        prefix, _ = _threshold(counts_at, kept, 1)
        tl.atomic_add(counts_at + 256 + ((key >> 11) & 4095), 1, mask=counted & ((key >> 23) == prefix))
    else:
        prefix, _ = _threshold(counts_at, kept, 2)
        agree = counted & ((key >> 11) == prefix)
        tl.atomic_add(counts_at + (256 + 4096) + (key & 2047), 1, mask=agree)
        tl.atomic_add(own_at + (key & 2047), 1, mask=agree)


@triton.jit(do_not_specialize=["block", "kept"])
def _sweep_kernel(
    w_ptr,  # [rows, columns] float32, in and out
    u_ptr,  # [columns, columns] float32
    before_ptr,  # [rows, COLUMNS] float32, the errors of the block before
    may_ptr,  # [rows, columns] bool, where PRESENT
    counts_ptr,  # [blocks, NUMBERS] int32, where COUNTED
    own_counts_ptr,  # [programs, 2048] int32, where COUNTED
    block,
    kept,
    rows,
    columns,
    mask_ptr,  # bool, True = may be kept; where COUNTED [rows, COLUMNS] to write and to read
    mask_row,  # strides
    mask_block,
    e_ptr,  # [rows, COLUMNS] float32, out
    ROWS: tl.constexpr,  # rows per program
    COLUMNS: tl.constexpr,  # columns of a block
    BLOCK: tl.constexpr,  # the same, padded to a power of two
    SUB: tl.constexpr,  # columns of a sub-block, padded
    STEP: tl.constexpr,  # columns of a sub-block: whole groups of M
    N: tl.constexpr,  # kept of every M
    M: tl.constexpr,  # 1: the mask says it all
    PRESENT: tl.constexpr,
    COUNTED: tl.constexpr,  # the mask is what the counts say
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    # the count of the first digit has subtracted it already
    w = _weights(w_ptr, u_ptr, before_ptr, block, row, inside, columns, COLUMNS, BLOCK, not COUNTED)
    mask_at = mask_ptr + row[:, None] * mask_row + block * mask_block
    if COUNTED:
        key, valid = _keys(w, u_ptr, may_ptr, block, row, inside, columns, COLUMNS, BLOCK, PRESENT)
        threshold, room = _threshold(counts_ptr + block * NUMBERS, kept, 3)
        # ties of the programs before this one
        own_at = own_counts_ptr + (threshold & 2047)
        ties = tl.zeros([128], tl.int32)
        for first in range(0, tl.program_id(0), 128):
            program = first + tl.arange(0, 128)
            ties += tl.load(own_at + program * 2048, mask=program < tl.program_id(0), other=0)
        tied = ((key == threshold) & valid).to(tl.int32)
        of_row = tl.sum(tied, axis=1)
        order = tl.cumsum(tied, axis=1) + (tl.sum(ties) + tl.cumsum(of_row, axis=0) - of_row)[:, None]
        # with none to keep there is no threshold
        stays = valid & (((key > threshold) & (kept > 0)) | ((key == threshold) & (order <= room)))
        there = (tl.arange(0, BLOCK) < COLUMNS)[None, :]
        tl.store(mask_at + tl.arange(0, BLOCK)[None, :], stays, mask=inside & there)
        # other threads of this program read it
        tl.debug_barrier()
    left = tl.minimum(columns - block * COLUMNS, COLUMNS)
    corner = u_ptr + (block * COLUMNS).to(tl.int64) * (columns + 1)
    w_at = w_ptr + row[:, None] * columns + block * COLUMNS
    # fmt: off
    sweep_columns(
        w, inside, left, corner, columns, mask_at, 1, w_at, e_ptr + row[:, None] * COLUMNS, 1.0, 0.0,
        ROWS, BLOCK, SUB, STEP, N, M, False,
    )
    # fmt: on
