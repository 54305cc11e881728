"""fragments_24: a 2:4 weight packed, to what the tensor cores read, and back."""

import pytest
import torch

from sparsekern import ops
from sparsekern.formats import SemiStructured
from sparsekern.ops import fragments_24


def test_pack(timed, weight):
    assert torch.equal(timed(ops.pack, weight, SemiStructured).to_dense(), weight)


def test_to_dense(timed, weight):
    assert torch.equal(timed(ops.to_dense, ops.pack(weight, SemiStructured)), weight)


@pytest.mark.parametrize("kernel", fragments_24.KERNELS, ids=lambda kernel: kernel.name)
def test_to_fragments_and_back(timed, serves, kernel, weight):
    packed = ops.pack(weight, SemiStructured)
    serves(kernel, packed)
    restored = timed(lambda: kernel.restore(kernel.run(packed), *weight.shape))
    assert torch.equal(restored.to_dense(), weight)
