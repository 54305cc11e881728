"""gram: 256 tokens into the sum of a layer's second moment."""

import pytest
import torch

from sparsekern.ops import gram


@pytest.mark.parametrize("kernel", gram.KERNELS, ids=lambda kernel: kernel.name)
def test_gram(timed, serves, kernel, dtype, shape, device):
    x = torch.randn(256, shape[1], device=device).to(dtype)
    total = torch.zeros(shape[1], shape[1], device=device)
    serves(kernel, total, x)
    timed(kernel.run, total, x)
    assert total.diagonal().gt(0).all()
