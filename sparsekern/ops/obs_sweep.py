"""obs_sweep: prune one block of columns, left to right, with the OBS update.

For each column j of the block, with U the upper Cholesky factor of H^-1:

    e_j       = (1 - mask_j) * w_j / U_jj
    W[:, j:] -= e_j U[j, j:]

Source: SparseGPT, https://arxiv.org/abs/2301.00774, algorithm 1, inner loop.
"""

import torch
from torch import Tensor

from sparsekern.ops.kernel import Kernel, never_refuses


def reference(weight: Tensor, u: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Prune `weight` where `mask` is False and repair the columns to the right.

    weight  [rows, block] float32, not modified
    u       [block, block] float32, upper triangular
    mask    [rows, block] bool, True = kept

    Returns the pruned block [rows, block] and the scaled errors e [rows, block],
    which the caller owes to the columns after the block: W -= e @ U_right.
    """
    w, e = weight.clone(), torch.zeros_like(weight)
    for j in range(w.shape[1]):
        e[:, j] = torch.where(mask[:, j], 0.0, w[:, j] / u[j, j])
        w[:, j:] -= e[:, j, None] * u[j, j:]
    return w.where(mask, 0.0), e


KERNELS = (Kernel("reference", reference, never_refuses),)
