"""obs_sweep: prune, and where asked quantise, one block of columns from left to right with the OBS update.

For each column j of the block, with U the upper Cholesky factor of H^-1 and q_j what becomes of w_j:

    q_j       = 0 where pruned, else w_j or its nearest grid value
    e_j       = (w_j - q_j) / U_jj
    W[:, j:] -= e_j U[j, j:]

N:M is chosen when the sweep reaches a group, by the saliency w^2 / U_jj^2 on weights that are already repaired.

Sources: SparseGPT, https://arxiv.org/abs/2301.00774, algorithm 1, inner loop; with rounding it is GPTQ's,
https://arxiv.org/abs/2210.17323.
"""

from typing import Any

import torch
from torch import Tensor

from sparsekern.ops import compiled, triton
from sparsekern.ops.kernel import Kernel, never_refuses


def reference(
    weight: Tensor,
    u: Tensor,
    mask: Tensor,
    nm: tuple[int, int] | None = None,
    scale: Tensor | None = None,
    levels: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune `weight` where `mask` is False and repair the columns to the right.

    weight  [rows, block] float32, not modified unless it is in `out`
    u       [block, block] float32, upper triangular, contiguous
    mask    [rows, block] bool, True = may be kept
    nm      (n, m): of every m columns keep the n of largest saliency among those that `mask` allows, ties to the lower
            index; None keeps all that `mask` allows
    scale   [rows] float32: a kept weight becomes clamp(round(w / scale), -levels, levels) * scale, half to even, and 0
            where the scale is 0; None rounds nothing
    levels  the largest integer of the grid, 127 for 8 bits
    out     where to write what is returned; the first may be `weight` itself. None makes new tensors

    Returns the pruned block [rows, block], exactly +0.0 where pruned, and the scaled errors e [rows, block], which the
    caller owes to the columns after the block: W -= e @ U_right. Raises ValueError for shapes that do not fit, a block
    that m does not divide, and a scale without levels.
    """
    check(weight, u, mask, nm, scale, levels, out)
    w, e, kept = weight.clone(), torch.zeros_like(weight), mask.clone()
    for j in range(w.shape[1]):
        if nm is not None and j % nm[1] == 0:
            group = slice(j, j + nm[1])
            kept[:, group] = largest_of_group(w[:, group] / u.diagonal()[group], mask[:, group], nm[0])
        q = w[:, j] if scale is None else _nearest(w[:, j], scale, levels)
        q = q.where(kept[:, j], 0.0)
        e[:, j] = (w[:, j] - q) / u[j, j]
        w[:, j + 1 :] -= e[:, j, None] * u[j, j + 1 :]
        w[:, j] = q
    return _into(out, w, e)


def check(
    weight: Tensor,
    u: Tensor,
    mask: Tensor,
    nm: tuple[int, int] | None,
    scale: Tensor | None,
    levels: int,
    out: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Raises ValueError unless the arguments are what every kernel of this op takes."""
    rows, block = weight.shape
    expected = [("u", u, (block, block)), ("mask", mask, (rows, block)), ("scale", scale, (rows,))]
    for name, tensor, shape in [*expected, *(("out", tensor, (rows, block)) for tensor in out or ())]:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for a weight {[rows, block]}, got {list(tensor.shape)}")
    # read by rows, the column-major factor that torch.linalg.cholesky(upper=True) returns is U transposed
    if not u.is_contiguous():
        raise ValueError(f"u must be contiguous, got strides {list(u.stride())}; call .contiguous()")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if nm is not None and (not 0 < nm[0] <= nm[1] or block % nm[1]):
        raise ValueError(f"N:M needs 0 < N <= M and a block that M divides, got {nm[0]}:{nm[1]} and {block} columns")
    if (scale is not None) != (levels > 0):
        raise ValueError(f"a scale goes with levels of at least 1, got {levels}")


def largest_of_group(scaled: Tensor, allowed: Tensor, n: int) -> Tensor:
    """The n largest squares of each row of `scaled` [rows, m] among the `allowed`, as a mask."""
    saliency = scaled.square().where(allowed, -1.0)
    best = saliency.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(allowed).scatter_(1, best, True) & allowed


def _nearest(w: Tensor, scale: Tensor, levels: int) -> Tensor:
    steps = (w / scale).round().clamp(-levels, levels)
    # a scale of 0 gives 0 / 0; + 0.0 makes a small negative weight +0.0
    return (steps * scale).where(scale != 0, 0.0) + 0.0


def _into(out: tuple[Tensor, Tensor] | None, pruned: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    if out is None:
        return pruned, e
    return out[0].copy_(pruned), out[1].copy_(e)


def on_cpu(
    weight: Tensor,
    u: Tensor,
    mask: Tensor,
    nm: tuple[int, int] | None = None,
    scale: Tensor | None = None,
    levels: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """The compiled kernel; `isa` names one of its instruction sets, "" the best this machine has."""
    check(weight, u, mask, nm, scale, levels, out)
    # a slice of a wider weight is read, and written, where it lies
    weight, mask = (x if _rows_are_contiguous(x) else x.contiguous() for x in (weight, mask))
    scale = None if scale is None else scale.float().contiguous()
    direct = out and all(x.dtype == torch.float32 and _rows_are_contiguous(x) for x in out)
    pruned, e = out if direct else (torch.empty(weight.shape) for _ in range(2))
    compiled.cpu().obs_sweep(
        *(weight.data_ptr(), _row_stride(weight), u.data_ptr(), mask.data_ptr(), _row_stride(mask)),
        *(nm or (0, 0)),
        *(0 if scale is None else scale.data_ptr(), levels),
        *(pruned.data_ptr(), _row_stride(pruned), e.data_ptr(), _row_stride(e)),
        *(*weight.shape, torch.get_num_threads(), isa),
    )
    return (pruned, e) if direct else _into(out, pruned, e)


def _rows_are_contiguous(x: Tensor) -> bool:
    return x.stride(1) == 1 and _row_stride(x) == x.stride(0)


def _row_stride(x: Tensor) -> int:
    """Of rows that do not overlap; the stride of a single one is torch's to choose, and .contiguous() leaves it."""
    return max(x.stride(0), x.shape[1])


def _cpu_refuses(weight: Tensor, u: Tensor) -> str | None:
    for name, tensor in (("weight", weight), ("u", u)):
        if tensor.device.type != "cpu":
            return f"{name} must be on the CPU, got {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"{name} must be float32, got {tensor.dtype}"
    return compiled.why_not("cpu")


def _triton(*arguments: Any, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    # here, because importing sparsekern must not need Triton
    from sparsekern.ops.triton import obs_sweep

    return _into(out, *obs_sweep.run(*arguments))


def _triton_refuses(weight: Tensor, u: Tensor) -> str | None:
    for name, tensor in (("weight", weight), ("u", u)):
        if tensor.device.type != "cuda":
            return f"{name} must be on a CUDA device, got {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"{name} must be float32, got {tensor.dtype}"
    return triton.why_not()


KERNELS = (
    Kernel("triton", _triton, _triton_refuses),
    Kernel("cpu", on_cpu, _cpu_refuses),
    Kernel("reference", reference, never_refuses),
)
