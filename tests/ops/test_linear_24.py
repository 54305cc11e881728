"""linear_24: every kernel against float64, at sizes that divide nothing."""

import pytest
import torch

from sparsekern.formats import SemiStructured
from sparsekern.ops import linear_24
from sparsekern.pattern import NM

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(out_features, in_features, dtype):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=g)
    weight = weight.where(NM(2, 4).mask(weight.abs()), 0.0).to(dtype)
    return weight, torch.randn(out_features, generator=g).to(dtype)


@pytest.mark.parametrize("kernel", linear_24.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 4), (7, 20), (37, 100), (33, 64)])
@pytest.mark.parametrize("leading", [(0,), (1,), (3, 5), (2, 1, 3)], ids=str)
def test_every_kernel_matches_float64(kernel, dtype, out_features, in_features, leading):
    weight, bias = problem(out_features, in_features, dtype)
    packed = SemiStructured.pack(weight)
    if reason := kernel.refuses(packed):
        pytest.skip(f"{kernel.name}: {reason}")
    x = torch.randn(*leading, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    for b in (bias, None):
        y = kernel.run(x, kernel.prepare(packed), b, out_features, in_features)
        expected = x.double() @ weight.double().T + (0 if b is None else b.double())
        assert y.shape == (*leading, out_features)
        assert y.dtype == dtype
        assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("kernel", linear_24.KERNELS, ids=lambda kernel: kernel.name)
def test_restore_gives_back_the_packed_weight_bit_for_bit(kernel):
    if kernel.name == "cusparselt":
        pytest.skip("test_cusparselt.py has a stand-in for the library")
    packed = SemiStructured.pack(problem(37, 100, torch.float32)[0])
    restored = kernel.restore(kernel.prepare(packed), 37, 100)
    assert torch.equal(restored.values, packed.values)
    assert torch.equal(restored.metadata, packed.metadata)
