"""linear_bitmap_int8: a product with a bitmap weight of 8-bit values, by each kernel."""

import pytest
import torch

from sparsekern.formats import BitmapInt8
from sparsekern.ops import linear_bitmap_int8


@pytest.mark.parametrize("kernel", linear_bitmap_int8.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_linear_bitmap_int8(timed, serves, kernel, tokens, weight):
    packed = BitmapInt8.pack(weight)
    serves(kernel, packed)
    x, operands = torch.randn(tokens, weight.shape[1]).to(weight), kernel.prepare(packed)
    y = timed(kernel.run, x, operands, None, *weight.shape)
    expected = x @ packed.to_dense().T
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2 * weight.shape[1] ** 0.5)
