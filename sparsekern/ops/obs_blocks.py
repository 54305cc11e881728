"""obs_blocks: prune a layer block by block from left to right, and repair all that lies behind each block.

With W[:, b] a block of columns and U the upper Cholesky factor of H^-1, for each b:

    mask           of the block what has the largest W_ij^2 / U_jj^2 over all rows; or N of every M; or it is given
    W[:, b], E     = sweep(W[:, b], U[b, b], mask)      obs_sweep.py
    W[:, behind]  -= E U[b, behind]

Source: SparseGPT, https://arxiv.org/abs/2301.00774, algorithm 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.ops import keep_largest, obs_sweep, triton
from sparsekern.ops.addmm import addmm
from sparsekern.ops.kernel import Kernel, never_refuses, pick


@dataclass(frozen=True, eq=False)
class Choice:
    """Which weights of a block stay; exactly one of `nm`, `kept` and `mask` says so.

    nm       (n, m): n of every m columns, chosen when the sweep reaches them; m divides the block's columns
    kept     how many of each block, by their saliency when the block is reached, ties to the lower index
    mask     [rows, in_features] bool, True = stays
    present  [rows, in_features] bool: where False a weight goes first, and never stays; None: all may
    """

    nm: tuple[int, int] | None = None
    kept: Sequence[int] | None = None
    mask: Tensor | None = None
    present: Tensor | None = None


# mask, scale and levels of a block, as obs_sweep takes them
OfBlock = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None, int]]


def reference(w: Tensor, u: Tensor, block_size: int, choice: Choice) -> None:
    """Prune and repair `w` in place.

    w           [rows, in_features] float32
    u           [in_features, in_features] float32, upper triangular, contiguous
    block_size  columns whose mask is chosen together; the last block may be narrower

    Raises ValueError for shapes that do not fit and for NaN among the saliencies; `w` is then half done.
    """
    check(w, u, block_size, choice)
    for number, block in enumerate(blocks(w.shape[1], block_size)):
        here, u_here = w[:, block], u[block, block].contiguous()
        allowed = torch.ones_like(here, dtype=torch.bool) if choice.present is None else choice.present[:, block]
        mask = allowed
        if choice.mask is not None:
            mask = mask & choice.mask[:, block]
        elif choice.kept is not None:
            scores = saliency(here, u_here, allowed).view(1, -1)
            mask = mask & keep_largest.reference(scores, torch.tensor([choice.kept[number]])).view_as(here)
        pruned, e = obs_sweep.reference(here, u_here, mask, choice.nm)
        w[:, block] = pruned
        w[:, block.stop :] -= e @ u[block, block.stop :]


def run(w: Tensor, u: Tensor, block_size: int, choice: Choice) -> None:
    """What `reference` does, by the best kernel for these arguments."""
    pick(KERNELS, w, u, block_size, choice).run(w, u, block_size, choice)


def blocks(columns: int, block_size: int) -> list[slice]:
    """The blocks from left to right."""
    return [slice(start, min(start + block_size, columns)) for start in range(0, columns, block_size)]


def saliency(w: Tensor, u: Tensor, present: Tensor | None, out: Tensor | None = None) -> Tensor:
    """W_ij^2 / U_jj^2, and -1 where nothing is present, in `out` or new memory.

    w  [rows, block] float32   u  [block, block]   present  [rows, block] bool or None
    """
    out = torch.empty(w.shape, device=w.device) if out is None else out
    # torch divides a slice by a row five times slower than it copies the slice first
    scores = out.copy_(w).div_(u.diagonal()).square_()
    # a repair may have reached a weight that was pruned before: it still goes first
    return scores if present is None else scores.masked_fill_(~present, -1.0)


def check(w: Tensor, u: Tensor, block_size: int, choice: Choice) -> None:
    """Raises ValueError unless the arguments are what every kernel of this op takes."""
    rows, columns = w.shape
    count = -(-columns // block_size)
    if u.shape != (columns, columns):
        raise ValueError(f"u must be {[columns, columns]} for a weight {[rows, columns]}, got {list(u.shape)}")
    # read by rows, the column-major factor that torch.linalg.cholesky(upper=True) returns is U transposed
    if not u.is_contiguous():
        raise ValueError(f"u must be contiguous, got strides {list(u.stride())}; call .contiguous()")
    if sum(each is not None for each in (choice.nm, choice.kept, choice.mask)) != 1:
        raise ValueError("exactly one of nm, kept and mask says what stays")
    if choice.nm is not None and (block_size % choice.nm[1] or columns % choice.nm[1]):
        n, m = choice.nm
        raise ValueError(f"M must divide block_size and in_features, got {n}:{m}, {block_size} and {columns}")
    if choice.kept is not None and len(choice.kept) != count:
        raise ValueError(f"kept must have a number for each of {count} blocks, got {len(choice.kept)}")
    for name, tensor in (("mask", choice.mask), ("present", choice.present)):
        if tensor is not None and (tensor.shape != w.shape or tensor.dtype != torch.bool):
            raise ValueError(f"{name} must be {list(w.shape)} bool, got {list(tensor.shape)} {tensor.dtype}")


def in_turn(w: Tensor, u: Tensor, block_size: int, nm: tuple[int, int] | None, of_block: OfBlock) -> None:
    """The blocks one after the other, by the best kernels of obs_sweep and addmm, whatever chooses what stays.

    of_block  takes the block's columns, W[:, b] and U[b, b]; called when all that lies before is repaired
    """
    sweep = pick(obs_sweep.KERNELS, w, u).run
    # the same for every block: fresh memory costs more than what is written to it
    errors = w.new_empty(w[:, :block_size].numel())
    for block in blocks(w.shape[1], block_size):
        here, u_here = w[:, block], u[block, block].contiguous()
        mask, scale, levels = of_block(block, here, u_here)
        e = errors[: here.numel()].view(here.shape)
        sweep(here, u_here, mask, nm, scale, levels, out=(here, e))
        if block.stop < w.shape[1]:
            addmm(w[:, block.stop :], e, u[block, block.stop :], -1.0)


def chosen(w: Tensor, block_size: int, choice: Choice) -> Callable[[slice, Tensor, Tensor], Tensor]:
    """What stays of a block, as `in_turn` asks for it: a bool tensor [rows, block]."""
    everything = torch.ones_like(w[:, :block_size], dtype=torch.bool)
    scores = w.new_empty(everything.numel())

    def mask_of(block: slice, here: Tensor, u_here: Tensor) -> Tensor:
        allowed = None if choice.present is None else choice.present[:, block]
        if choice.mask is not None:
            mask = choice.mask[:, block]
        elif choice.nm:
            mask = everything[:, : here.shape[1]]
        else:
            found = saliency(here, u_here, allowed, scores[: here.numel()].view(here.shape)).view(1, -1)
            kept = torch.tensor([choice.kept[block.start // block_size]])
            mask = pick(keep_largest.KERNELS, found).run(found, kept).view_as(here)
        return mask if allowed is None else mask & allowed

    return mask_of


def _by_ops(w: Tensor, u: Tensor, block_size: int, choice: Choice) -> None:
    check(w, u, block_size, choice)
    mask_of = chosen(w, block_size, choice)
    in_turn(w, u, block_size, choice.nm, lambda *of_block: (mask_of(*of_block), None, 0))


def _triton(*arguments: Any) -> None:
    # here, because importing sparsekern must not need Triton
    from sparsekern.ops.triton import obs_blocks

    obs_blocks.run(*arguments)


def _triton_refuses(w: Tensor, u: Tensor, block_size: int, choice: Choice) -> str | None:
    for name, tensor in (("w", w), ("u", u)):
        if tensor.device.type != "cuda":
            return f"{name} must be on a CUDA device, got {tensor.device}"
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return f"{name} must be float32 and contiguous, got {tensor.dtype} with strides {list(tensor.stride())}"
    if block_size > 128:
        return f"a block must have at most 128 columns, got {block_size}"
    if choice.nm is not None and choice.nm[1] > 16:
        return f"M must be at most 16, got {choice.nm[1]}"
    if w.shape[0] * block_size >= 1 << 31:
        return f"a block must have fewer than 2^31 weights, got {w.shape[0] * block_size}"
    return triton.why_not()


KERNELS = (
    Kernel("triton", _triton, _triton_refuses),
    Kernel("by_ops", _by_ops, never_refuses),
    Kernel("reference", reference, never_refuses),
)
