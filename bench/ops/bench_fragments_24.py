"""fragments_24: a 2:4 weight to what the tensor cores read, and back."""

import pytest
import torch

from sparsekern import ops
from sparsekern.formats import SemiStructured
from sparsekern.ops import fragments_24


@pytest.mark.parametrize("kernel", fragments_24.KERNELS, ids=lambda kernel: kernel.name)
def test_to_fragments_and_back(timed, serves, kernel, weight):
    packed = ops.pack(weight, SemiStructured)
    serves(kernel, packed)
    restored = timed(lambda: kernel.restore(kernel.run(packed), *weight.shape))
    assert torch.equal(restored.to_dense(), weight)
