"""obs_blocks: a layer pruned block by block, all but the factor of its Hessian."""

import pytest
import torch

from sparsekern.ops import obs_blocks
from sparsekern.ops.obs_blocks import Choice


@pytest.mark.parametrize("nm", [None, (2, 4)], ids=["50%", "2:4"])
@pytest.mark.parametrize("kernel", obs_blocks.KERNELS, ids=lambda kernel: kernel.name)
def test_obs_blocks(timed, serves, kernel, nm, stats, shape, device):
    u, _ = stats.inverse_cholesky(0.01)
    weight, w = torch.randn(shape, device=device), torch.empty(shape, device=device)
    sizes = [block.stop - block.start for block in obs_blocks.blocks(shape[1], 128)]
    choice = Choice(nm=nm) if nm else Choice(kept=[shape[0] * size // 2 for size in sizes])
    serves(kernel, w, u, 128, choice)
    timed(lambda: kernel.run(w.copy_(weight), u, 128, choice))
    assert int((w == 0).sum()) == weight.numel() // 2
