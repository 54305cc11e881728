"""pack_24: a 2:4 weight packed as it is saved, and back."""

import pytest
import torch

from sparsekern.ops import pack_24


@pytest.mark.parametrize("kernel", pack_24.KERNELS, ids=lambda kernel: kernel.name)
def test_pack(timed, serves, kernel, weight):
    serves(kernel, weight)
    assert torch.equal(timed(kernel.run, weight).to_dense(), weight)


def test_to_dense(timed, weight):
    assert torch.equal(timed(pack_24.to_dense, pack_24.pack(weight)), weight)
