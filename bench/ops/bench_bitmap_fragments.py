"""bitmap_fragments: a bitmap weight to what a card's kernel reads, and back."""

import pytest
import torch

from sparsekern import ops
from sparsekern.formats import Bitmap
from sparsekern.ops import bitmap_fragments


@pytest.mark.parametrize("kernel", bitmap_fragments.KERNELS, ids=lambda kernel: kernel.name)
def test_to_fragments_and_back(timed, serves, kernel, weight):
    packed = ops.pack(weight.bfloat16(), Bitmap)
    serves(kernel, packed)
    restored = timed(lambda: kernel.restore(kernel.run(packed), *weight.shape))
    assert torch.equal(restored.to_dense(), weight.bfloat16())
