"""keep_largest in Triton, for one large set: radix select (ops/keep_largest.py has the contract).

A float's bits, turned so that they order as its value does, are a key of four digits. Four launches count the digits
of the keys that agree with the threshold so far, from the highest digit on, and so find the threshold's next one:
the largest digit which, with those above it, covers what is still to be kept. A fifth counts each chunk's ties with
the threshold, and a sixth writes the mask: all above it, and of the ties the first ones, in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops.keep_largest import check, refuse_nan

# saliencies of a program
CHUNK = 4096
WARPS = 8
DIGITS = 4
BINS = 256


def run(saliency: Tensor, kept: Tensor) -> Tensor:
    """As `reference`, for one set."""
    check(saliency, kept)
    size = saliency.shape[1]
    saliency = saliency.contiguous()
    mask = torch.zeros(saliency.shape, dtype=torch.bool, device=saliency.device)
    if size == 0:
        return mask
    # in the order of the stream: nobody waits
    kept = kept.to(saliency.device, non_blocking=True)
    chunks = triton.cdiv(size, CHUNK)
    # of each digit how often each value, and last how many NaN
    counts = torch.zeros(DIGITS * BINS + 1, dtype=torch.int32, device=saliency.device)
    ties = torch.zeros(chunks, dtype=torch.int32, device=saliency.device)
    with torch.cuda.device_of(saliency):
        for digit in range(DIGITS):
            _count_kernel[(chunks,)](saliency, kept, counts, size, DIGIT=digit, CHUNK=CHUNK, num_warps=WARPS)
        _ties_kernel[(chunks,)](saliency, kept, counts, ties, size, CHUNK=CHUNK, num_warps=WARPS)
        before = ties.cumsum(0, dtype=torch.int32) - ties
        _mask_kernel[(chunks,)](saliency, kept, counts, before, mask, size, CHUNK=CHUNK, num_warps=WARPS)
    refuse_nan(int(counts[-1]))
    return mask


@triton.jit
def _keys(saliency_ptr, at, size):
    """Integers that order as the values do; NaN lies beyond the infinities."""
    bits = tl.load(saliency_ptr + at, mask=at < size, other=0.0).to(tl.uint32, bitcast=True)
    # zeros of either sign tie
    bits = tl.where(bits == 0x80000000, 0, bits)
    return bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000)


@triton.jit
def _threshold(counts_ptr, kept_ptr, FOUND: tl.constexpr):
    """The first FOUND digits of the kept'th largest key, and how many of those that agree with them are to be kept."""
    room = tl.load(kept_ptr).to(tl.int32)
    prefix = tl.zeros([], tl.uint32)
    value = tl.arange(0, 256)
    for digit in tl.static_range(FOUND):
        count = tl.load(counts_ptr + digit * 256 + value)
        above = tl.cumsum(count, axis=0, reverse=True) - count
        # with none to keep the digit stays 0 and the room stays none
        here = (above < room) & (room <= above + count)
        prefix = prefix * 256 + tl.sum(tl.where(here, value, 0)).to(tl.uint32)
        room -= tl.sum(tl.where(here, above, 0))
    return prefix, room


@triton.jit
def _count_kernel(
    saliency_ptr,  # [size] float32
    kept_ptr,  # [1] int64
    counts_ptr,  # [4 * 256 + 1] int32, in and out
    size,
    DIGIT: tl.constexpr,  # 0 is the highest
    CHUNK: tl.constexpr,  # saliencies per program
):
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    key = _keys(saliency_ptr, at, size)
    counted = at < size
    if DIGIT == 0:
        missing = ((key > 0xFF800000) | (key < 0x007FFFFF)) & counted
        tl.atomic_add(counts_ptr + 4 * 256, tl.sum(missing.to(tl.int32)))
    else:
        prefix, _ = _threshold(counts_ptr, kept_ptr, DIGIT)
        counted &= (key >> (32 - 8 * DIGIT)) == prefix
    digit = ((key >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
    count = tl.histogram(digit, 256, mask=counted)
    tl.atomic_add(counts_ptr + DIGIT * 256 + tl.arange(0, 256), count, mask=count > 0)


@triton.jit
def _ties_kernel(
    saliency_ptr,  # [size] float32
    kept_ptr,  # [1] int64
    counts_ptr,  # [4 * 256 + 1] int32
    ties_ptr,  # [chunks] int32, out
    size,
    CHUNK: tl.constexpr,  # saliencies per program
):
    chunk = tl.program_id(0).to(tl.int64)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    threshold, _ = _threshold(counts_ptr, kept_ptr, 4)
    tied = (_keys(saliency_ptr, at, size) == threshold) & (at < size)
    tl.store(ties_ptr + chunk, tl.sum(tied.to(tl.int32)))


@triton.jit
def _mask_kernel(
    saliency_ptr,  # [size] float32
    kept_ptr,  # [1] int64
    counts_ptr,  # [4 * 256 + 1] int32
    before_ptr,  # [chunks] int32, the ties in the chunks before
    mask_ptr,  # [size] bool, zeros, out
    size,
    CHUNK: tl.constexpr,  # saliencies per program
):
    chunk = tl.program_id(0).to(tl.int64)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    threshold, room = _threshold(counts_ptr, kept_ptr, 4)
    key = _keys(saliency_ptr, at, size)
    tied = (key == threshold) & (at < size)
    order = tl.load(before_ptr + chunk) + tl.cumsum(tied.to(tl.int32), axis=0)
    # with none to keep there is no threshold
    kept = ((key > threshold) & (tl.load(kept_ptr) > 0)) | (tied & (order <= room))
    tl.store(mask_ptr + at, kept, mask=at < size)
