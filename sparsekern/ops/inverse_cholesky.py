"""inverse_cholesky: the upper triangular U with H^-1 = U^T U, the factor that the OBS sweeps read.

With H = R R^T, R upper triangular, U = R^-1. Cut in halves

    H = [A   B]    R = [R_1  X  ]    U = [U_1  Y  ]
        [B^T C]        [0    R_2]        [0    U_2]

the lower right goes first: C = R_2 R_2^T, then X R_2^T = B, A - X X^T = R_1 R_1^T and R_1 Y = -X U_2. All but the small
corners is matrix products. The two systems are solved by halves too: to multiply by U_2 and U_1 instead would cost
the same and lose up to three times the accuracy.

Sources: the block form of the Cholesky factorisation, read from the last row up (Golub & Van Loan, Matrix Computations,
section 4.2); Du Croz & Higham, Stability of methods for matrix inversion, IMA J. Numer. Anal. 12, 1992.
"""

import torch
from torch import Tensor

from sparsekern.ops.addmm import addmm, matmul
from sparsekern.ops.kernel import Kernel, never_refuses, pick

# a corner this small is factored by the library, and so is a system; smaller is more accurate, and more launches, which
# cost a card some 10 us each; on a card not measured yet: bench/card/solver.py times 256 to 2048 beside the whole
_CORNER = {"cpu": 128, "cuda": 1024}
# rows or columns of a triangle that one product takes; the zeros beyond them are left out
_STRIPE = 512


def reference(h: Tensor) -> tuple[Tensor, Tensor]:
    """Factor H, which is used up.

    h  [in_features, in_features] float32, symmetric; may be overwritten

    Returns U [in_features, in_features], row-major, with exact zeros below the diagonal, and whether that failed, []
    bool: H is not positive definite, or not finite, and U says nothing then.
    """
    _, u, failed = _factor_by_library(h)
    return u, failed


def inverse_cholesky(h: Tensor) -> tuple[Tensor, Tensor]:
    """What `reference` does, by the best kernel for this matrix."""
    return pick(KERNELS, h).run(h)


def _factor_by_library(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R, U and whether that failed."""
    # H = R R^T with R upper comes from the Cholesky factor of H read backwards
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    r = lower.flip(0, 1)
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    u = torch.linalg.solve_triangular(r, identity, upper=True).contiguous()
    # what is not finite in a row of the factor reaches the row's diagonal entry
    return r, u, (failed != 0) | ~r.diagonal().isfinite().all()


def by_halves(h: Tensor, corner: int | None = None) -> tuple[Tensor, Tensor]:
    """As `reference`; `corner`, at least 16, is what the library factors at most; None: the device's own."""
    u = torch.zeros_like(h, memory_format=torch.contiguous_format)
    return u, _factor(h, u, corner or _CORNER[h.device.type])


def _factor(h: Tensor, u: Tensor, corner: int) -> Tensor:
    """Write R over `h` and U into `u`, both on and above the diagonal, all that is read. Returns whether it failed."""
    size = len(h)
    if size <= corner:
        r, inverse, failed = _factor_by_library(h.triu() + h.triu(1).T)
        h.copy_(r)
        u.copy_(inverse)
        return failed
    half = _half(size)
    r_1, x, r_2 = h[:half, :half], h[:half, half:], h[half:, half:]
    u_1, y, u_2 = u[:half, :half], u[:half, half:], u[half:, half:]
    failed = _factor(r_2, u_2, corner)
    # R_2 X^T = B^T: X takes the place of B
    _solve(r_2, u_2, x.T, corner)
    for stripe in _stripes(half):
        addmm(r_1[stripe, stripe.start :], x[stripe], x[stripe.start :].T, -1.0)
    failed = failed | _factor(r_1, u_1, corner)
    for stripe in _stripes(size - half):
        addmm(y[:, stripe], x[:, : stripe.stop], u_2[: stripe.stop, stripe], -1.0)
    _solve(r_1, u_1, y, corner)
    return failed


def _solve(r: Tensor, u: Tensor, y: Tensor, corner: int) -> None:
    """Write the solution of R Y = B over `y`, which holds B; `u` is the inverse of R, of which the corners serve."""
    size = len(r)
    if size <= corner:
        y.copy_(matmul(y.T, u.T).T if y.stride(0) == 1 else matmul(u, y))
        return
    half = _half(size)
    _solve(r[half:, half:], u[half:, half:], y[half:], corner)
    _subtract(y[:half], r[:half, half:], y[half:])
    _solve(r[:half, :half], u[:half, :half], y[:half], corner)


def _subtract(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total -= a b, by its transpose where `total` is column-major: the kernels write rows."""
    if total.stride(0) == 1:
        addmm(total.T, b.T, a.T, -1.0)
    else:
        addmm(total, a, b, -1.0)


def _half(size: int) -> int:
    # a multiple of a cache line's floats
    return (size // 2 + 15) // 16 * 16


def _stripes(size: int) -> list[slice]:
    return [slice(start, min(start + _STRIPE, size)) for start in range(0, size, _STRIPE)]


def _by_halves_refuses(h: Tensor) -> str | None:
    corner = _CORNER.get(h.device.type, 0)
    if not corner:
        return f"the matrix must be on the CPU or on a CUDA device, got {h.device}"
    return f"a matrix of at most {corner} has no halves worth it" if len(h) <= corner else None


KERNELS = (Kernel("by_halves", by_halves, _by_halves_refuses), Kernel("reference", reference, never_refuses))
