"""obs_sweep: a block of 128 columns pruned from left to right."""

import pytest
import torch

from sparsekern.ops import obs_sweep


@pytest.mark.parametrize("nm", [None, (2, 4)], ids=["mask", "2:4"])
@pytest.mark.parametrize("kernel", obs_sweep.KERNELS, ids=lambda kernel: kernel.name)
def test_obs_sweep(timed, serves, kernel, nm, stats, shape, device):
    u, _ = stats.inverse_cholesky(0.01)
    block = slice(0, min(128, shape[1]))
    u = u[block, block].contiguous()
    weight = torch.randn(shape[0], len(u), device=device)
    serves(kernel, weight, u)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, ::2] = nm is not None
    pruned, _ = timed(kernel.run, weight, u, mask, nm)
    assert int((pruned == 0).sum()) == weight.numel() // 2
