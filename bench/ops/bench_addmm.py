"""addmm: a trailing update, a block of 128 errors times what lies right of the block."""

import pytest
import torch

from sparsekern.ops import addmm


@pytest.mark.parametrize("kernel", addmm.KERNELS, ids=lambda kernel: kernel.name)
def test_addmm(timed, serves, kernel, shape, device):
    a, b = torch.randn(shape[0], 128, device=device), torch.randn(128, shape[1], device=device)
    total = torch.zeros(shape, device=device)
    serves(kernel, total, a, b)
    timed(kernel.run, total, a, b, -1e-3)
    assert total.isfinite().all()
