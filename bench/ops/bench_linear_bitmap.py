"""linear_bitmap: a product with a bitmap weight, by each kernel."""

import pytest
import torch

from sparsekern import ops
from sparsekern.formats import Bitmap
from sparsekern.ops import linear_bitmap


@pytest.mark.parametrize("kernel", linear_bitmap.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_linear_bitmap(timed, serves, kernel, tokens, weight):
    packed = ops.pack(weight, Bitmap)
    serves(kernel, packed)
    x, operands = torch.randn(tokens, weight.shape[1]).to(weight), kernel.prepare(packed)
    y = timed(kernel.run, x, operands, None, *weight.shape)
    torch.testing.assert_close(y, x @ weight.T, rtol=2e-2, atol=2e-2 * weight.shape[1] ** 0.5)
