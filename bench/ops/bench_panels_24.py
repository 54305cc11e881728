"""panels_24: a 2:4 weight to what the CPU's kernels read, and back."""

import torch

from sparsekern import ops
from sparsekern.formats import SemiStructured
from sparsekern.ops import panels_24


def test_to_panels_and_back(timed, weight):
    packed = ops.pack(weight, SemiStructured)
    restored = timed(lambda: panels_24.reference_inverse(panels_24.reference(packed), *weight.shape))
    assert torch.equal(restored.to_dense(), weight)
