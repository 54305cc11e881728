"""linear_bitmap_int8_index: a product with an int8 weight of which a tenth is kept, by the places of its values."""

import pytest
import torch

from sparsekern.formats import BitmapInt8
from sparsekern.ops import linear_bitmap_int8_index


@pytest.mark.parametrize("kernel", linear_bitmap_int8_index.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_linear_bitmap_int8_index(timed, serves, kernel, tokens, weight):
    few = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.2
    weight = weight.where(few.to(weight.device), 0.0)
    packed = BitmapInt8.pack(weight)
    serves(kernel, packed)
    x, operands = torch.randn(tokens, weight.shape[1]).to(weight), kernel.prepare(packed)
    y = timed(kernel.run, x, operands, None, *weight.shape)
    torch.testing.assert_close(y, x @ packed.to_dense().T, rtol=2e-2, atol=2e-2 * weight.shape[1] ** 0.5)
