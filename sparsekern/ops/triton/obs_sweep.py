"""obs_sweep in Triton, one launch a block (ops/obs_sweep.py has the contract).

A program holds ROWS rows of the block. It takes SUB columns out at a time, sweeps them, and then repairs all columns
behind them by one product:

    W[:, sub]      column by column, as the formula has it
    W[:, behind]  -= E[:, sub] U[sub, behind]

Rows need nothing of each other: the time is that of the chain along the columns. A step of it is a sum over SUB
columns, all but one of them masked, and a multiply-add; unrolled, which column is which is known to the compiler.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops.obs_sweep import check, largest_of_group

# rows of a program and its warps: a warp then holds eight rows of the columns that are swept, four columns a thread,
# so that the sum over a row is two shuffles
ROWS = 32
WARPS = 4
# two programs a multiprocessor at least: Triton 3.9 takes all but one of them and spills with fewer. 3.6 and 3.7 take
# 146 at most, room for three; left alone, they stop at 128 and spill one for the grid's division
REGISTERS = 232
# columns that are swept before the rest is repaired: tl.dot wants 16 at least
SUB = 16
# a launch: so that the block, as an accumulator, stays in registers
MAX_BLOCK = 128


def run(
    weight: Tensor,
    u: Tensor,
    mask: Tensor,
    nm: tuple[int, int] | None = None,
    scale: Tensor | None = None,
    levels: int = 0,
) -> tuple[Tensor, Tensor]:
    """As `reference`; a block of more than MAX_BLOCK columns, or groups of more than SUB, take several launches."""
    check(weight, u, mask, nm, scale, levels)
    block = weight.shape[1]
    pruned, e = (torch.empty(weight.shape, dtype=torch.float32, device=weight.device) for _ in range(2))
    scale = None if scale is None else scale.float().contiguous()
    m = nm[1] if nm else 1
    step = m if m > SUB else MAX_BLOCK // m * m
    if block <= step and m <= SUB:
        _launch(weight, u, mask, nm, scale, levels, pruned, e)
        return pruned, e
    w = weight.clone()
    for start in range(0, block, step):
        part = slice(start, min(start + step, block))
        here, u_here, allowed = w[:, part], u[part, part].contiguous(), mask[:, part]
        if m > SUB:
            allowed = largest_of_group(here / u_here.diagonal(), allowed, nm[0])
        pruned[:, part], e[:, part] = run(here, u_here, allowed, nm if m <= SUB else None, scale, levels)
        w[:, part.stop :] -= e[:, part] @ u[part, part.stop :]
    return pruned, e


def _launch(
    weight: Tensor,
    u: Tensor,
    mask: Tensor,
    nm: tuple[int, int] | None,
    scale: Tensor | None,
    levels: int,
    pruned: Tensor,
    e: Tensor,
) -> None:
    rows, block = weight.shape
    if weight.numel() == 0:
        return
    n, m = nm or (1, 1)
    # no card is meant for tensors of the CPU, which Triton's interpreter takes
    with torch.cuda.device_of(weight):
        _obs_sweep_kernel[(triton.cdiv(rows, ROWS),)](
            weight,
            u,
            mask,
            # not read when nothing is rounded
            u if scale is None else scale,
            pruned,
            e,
            rows,
            float(levels),
            *weight.stride(),
            *mask.stride(),
            **shape(block, n, m),
            QUANTISE=scale is not None,
            num_warps=WARPS,
            num_stages=1,
            maxnreg=REGISTERS,
        )


def shape(block: int, n: int, m: int) -> dict[str, int]:
    """The constants of the kernel for a block of columns and N:M, 1:1 where there is none."""
    return {
        "ROWS": ROWS,
        "COLUMNS": block,
        "BLOCK": max(SUB, triton.next_power_of_2(block)),
        "SUB": SUB,
        # a group lies in one sub-block: as many whole groups as fit
        "STEP": SUB // m * m,
        "N": n,
        "M": m,
    }


@triton.jit
def _nearest(w, scale, levels):
    """The grid value nearest to `w`, ties to the even one."""
    steps = tl.div_rn(w, tl.where(scale == 0.0, 1.0, scale))
    steps = tl.minimum(tl.maximum(steps, -levels), levels)
    # from 2^23 on a float32 has no fraction: the addition rounds it away, ties to even; the sum is never -0.0
    steps = (steps + 12582912.0) - 12582912.0
    return tl.where(scale == 0.0, 0.0, steps * scale)


@triton.jit
def _obs_sweep_kernel(
    w_ptr,  # [rows, COLUMNS] float32
    u_ptr,  # [COLUMNS, COLUMNS] float32, upper triangular
    mask_ptr,  # [rows, COLUMNS] bool, True = may be kept
    scale_ptr,  # [rows] float32, where QUANTISE
    pruned_ptr,  # [rows, COLUMNS] float32, out
    e_ptr,  # [rows, COLUMNS] float32, out
    rows,
    levels,  # float32, the largest integer of the grid
    w_row,  # strides
    w_col,
    mask_row,
    mask_col,
    ROWS: tl.constexpr,  # rows per program
    COLUMNS: tl.constexpr,  # columns in the block
    BLOCK: tl.constexpr,  # the same, padded to a power of two
    SUB: tl.constexpr,  # columns of a sub-block, padded
    STEP: tl.constexpr,  # columns of a sub-block: whole groups of M
    N: tl.constexpr,  # kept of every M
    M: tl.constexpr,  # 1: the mask says it all
    QUANTISE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    all_col = tl.arange(0, BLOCK)
    # [ROWS, BLOCK], repaired sub-block by sub-block
    w_block = tl.load(
        w_ptr + row[:, None] * w_row + all_col[None, :].to(tl.int64) * w_col,
        mask=inside & (all_col < COLUMNS)[None, :],
        other=0.0,
    )
    scale = 1.0
    if QUANTISE:
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
    out = row[:, None] * COLUMNS
    mask_at = mask_ptr + row[:, None] * mask_row
    # fmt: off
    sweep_columns(
        w_block, inside, COLUMNS, u_ptr, COLUMNS, mask_at, mask_col, pruned_ptr + out, e_ptr + out, scale, levels,
        ROWS, BLOCK, SUB, STEP, N, M, QUANTISE,
    )
    # fmt: on


@triton.jit
def sweep_columns(
    w_block,  # [ROWS, BLOCK] float32
    inside,  # [ROWS, 1], the rows that there are
    columns,
    u_ptr,  # [columns, columns] float32, upper triangular
    u_row,  # stride
    mask_at,  # [ROWS, 1] pointers to the first column of each row, True = may be kept
    mask_col,  # stride
    pruned_at,  # [ROWS, 1] pointers, columns side by side, out
    e_at,  # the same
    scale,  # [ROWS, 1] float32, where QUANTISE
    levels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    QUANTISE: tl.constexpr,
):
    """Sweep a program's rows of a block, sub-block by sub-block."""
    all_col = tl.arange(0, BLOCK)
    col = tl.arange(0, SUB)
    for start in range(0, columns, STEP):
        at = start + col
        here = (col < STEP) & (at < columns)
        taken = tl.broadcast_to(tl.minimum(at, BLOCK - 1)[None, :], [ROWS, SUB])
        w = tl.where(here[None, :], tl.gather(w_block, taken, axis=1), 0.0)  # [ROWS, SUB]
        valid = inside & here[None, :]
        kept = tl.load(mask_at + at[None, :].to(tl.int64) * mask_col, mask=valid, other=1) != 0  # [ROWS, SUB]
        # asked for early: the rows of U that this sub-block needs are then on their way
        behind = here[:, None] & (all_col < columns)[None, :]
        u_sub = tl.load(u_ptr + at[:, None] * u_row + all_col[None, :], mask=behind, other=0.0)  # [SUB, BLOCK]
        inverse = (1.0 / tl.load(u_ptr + at * (u_row + 1), mask=here, other=1.0))[None, :]  # [1, SUB]

        pruned = tl.zeros_like(w)
        e = tl.zeros_like(w)
        for j in tl.static_range(STEP):
            # what this does to the columns before j, and to j, is never read: they were taken out
            there = here & (start + j < columns)
            u_j = tl.load(u_ptr + (start + j) * u_row + at, mask=there, other=0.0)[None, :]  # [1, SUB]
            if M > 1 and j % M == 0:
                kept = _largest_of_group(w, inverse, kept, col[None, :], j, N, M)
            if QUANTISE:
                q = tl.where(kept, _nearest(w, scale, levels), 0.0)
            else:
                q = tl.where(kept, w, 0.0)
            error = tl.where((col == j)[None, :], (w - q) * inverse, 0.0)
            pruned = tl.where((col == j)[None, :], q, pruned)
            e += error
            w -= tl.sum(error, axis=1)[:, None] * u_j

        tl.store(pruned_at + at[None, :], pruned, mask=valid)
        tl.store(e_at + at[None, :], e, mask=valid)

        # what it does to this sub-block and those before is never read again
        w_block -= tl.dot(e, u_sub, input_precision="ieee")


@triton.jit
def _largest_of_group(w, inverse, kept, col, j: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """`kept`, with N at most in columns j..j+M: those that fewer than N of the group outrank."""
    scaled = w * inverse
    # a weight that may not be kept goes first
    saliency = tl.where(kept, scaled * scaled, -1.0)
    larger = tl.zeros_like(saliency)
    for i in tl.static_range(M):
        s_i = tl.sum(tl.where(col == j + i, saliency, 0.0), axis=1)[:, None]
        # of equals the left one outranks; col % M, and not col - j, is a constant of a thread's register
        larger += tl.where(col % M > i, s_i >= saliency, s_i > saliency).to(tl.float32)
    return kept & ((larger < N) | (col < j) | (col >= j + M))
