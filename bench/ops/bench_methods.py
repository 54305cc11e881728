"""A layer pruned: everything that a method does, in one time."""

import pytest
import torch

from sparsekern import SparseGPT, Wanda
from sparsekern.pattern import NM


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=lambda method: type(method).__name__)
def test_prune(timed, method, stats, shape, device):
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device)
    pruned = timed(method.prune, dense, stats, NM(2, 4))
    assert int((pruned == 0).sum()) == dense.numel() // 2
