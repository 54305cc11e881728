"""bitmap_panels: a bitmap weight to what the CPU's kernels read, and back."""

import pytest
import torch

from sparsekern.formats import Bitmap
from sparsekern.ops import bitmap_panels


@pytest.mark.parametrize("kernel", bitmap_panels.KERNELS, ids=lambda kernel: kernel.name)
def test_to_panels_and_back(timed, serves, kernel, weight):
    packed = Bitmap.pack(weight)
    serves(kernel, packed.values)
    restored = timed(lambda: kernel.restore(kernel.run(packed), *weight.shape))
    assert torch.equal(restored.to_dense(), weight)
