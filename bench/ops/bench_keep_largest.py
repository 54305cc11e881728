"""keep_largest: the mask of the largest half of a layer, of each row, of each group."""

import pytest
import torch

from sparsekern.ops import keep_largest


@pytest.mark.parametrize("scope", ["layer", "row", "2:4"])
@pytest.mark.parametrize("kernel", keep_largest.KERNELS, ids=lambda kernel: kernel.name)
def test_keep_largest(timed, serves, kernel, scope, shape, device):
    saliency = torch.randn(shape, generator=torch.Generator().manual_seed(3)).square().to(device)
    saliency = saliency.view({"layer": (1, -1), "row": shape, "2:4": (-1, 4)}[scope])
    serves(kernel, saliency)
    sets, size = saliency.shape
    mask = timed(kernel.run, saliency, torch.tensor(size // 2, device=device).expand(sets))
    assert (mask.sum(dim=1) == size // 2).all()
