"""bitmap_rows: a weight packed as it is saved, back, and checked."""

import pytest
import torch

from sparsekern.ops import bitmap_rows


@pytest.mark.parametrize("kernel", bitmap_rows.KERNELS, ids=lambda kernel: kernel.name)
def test_pack(timed, serves, kernel, weight):
    serves(kernel, weight)
    assert torch.equal(timed(kernel.run, weight).to_dense(), weight)


def test_to_dense(timed, weight):
    assert torch.equal(timed(bitmap_rows.to_dense, bitmap_rows.pack(weight)), weight)


def test_validate(timed, weight):
    timed(bitmap_rows.validate, bitmap_rows.pack(weight))
