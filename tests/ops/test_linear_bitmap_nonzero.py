"""linear_bitmap of many tokens and few kept weights, where the kernels leave the zeros out.

tests/sanitized/ calls these whatever is kept.
"""

import pytest
import torch
from torch.nn.functional import linear

from sparsekern.formats.bitmap import Bitmap
from sparsekern.ops import compiled, linear_bitmap

WHY_NOT = compiled.why_not("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"sparsekern._cpu: {WHY_NOT}")
SETS = compiled.cpu().instruction_sets() if WHY_NOT is None else ()
# relative errors of the whole output against float64
BOUND = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}

dtypes = pytest.mark.parametrize("dtype", BOUND, ids=str)
every_set = pytest.mark.parametrize("isa", SETS)


def weight(out_features, in_features, density, dtype):
    """A weight of which two rows are empty and one is full."""
    torch.manual_seed(out_features * 1000 + in_features)
    kept = torch.rand(out_features, in_features) < density
    kept[:2], kept[-1] = False, True
    return (torch.randn(out_features, in_features) * kept).to(dtype)


def product(x, dense, bias, isa):
    y = torch.full((len(x), len(dense)), float("nan"), dtype=x.dtype)
    linear_bitmap.sparse(x, linear_bitmap.to_panels(Bitmap.pack(dense)), bias, y, dense.shape[1], isa)
    return y


@every_set
@dtypes
@pytest.mark.parametrize("density", [0.02, 0.3])
@pytest.mark.parametrize("shape", [(37, 131), (300, 129), (50, 1030)], ids=str)
def test_every_instruction_set_gives_the_product(shape, density, isa, dtype):
    dense, bias = weight(*shape, density, dtype), torch.randn(shape[0]).to(dtype)
    for tokens in (15, 16, 17, 33, 64, 127, 128, 129, 400, 1000):
        x = torch.randn(tokens, shape[1]).to(dtype)
        for b in (bias, None):
            y = product(x, dense, b, isa)
            exact = linear(x.double(), dense.double(), None if b is None else b.double())
            assert (y.double() - exact).norm() <= BOUND[dtype] * exact.norm(), tokens


@every_set
@dtypes
def test_a_weight_without_any_gives_the_bias(isa, dtype):
    bias = torch.randn(37).to(dtype)
    y = product(torch.randn(200, 70).to(dtype), torch.zeros(37, 70, dtype=dtype), bias, isa)
    assert torch.equal(y, bias.expand(200, 37))


@every_set
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_in_x_reach_the_outputs_whose_weight_is_zero(value, isa, dtype):
    dense = weight(37, 300, 0.05, dtype)
    x = torch.randn(200, 300).to(dtype)
    finite = product(x, dense, None, isa)
    x[150, 299] = value
    y = product(x, dense, None, isa)
    assert dense[:2].count_nonzero() == 0
    assert y[150, :2].isnan().all()
    assert torch.equal(y.isnan(), linear(x.float(), dense.float()).isnan())
    others = torch.arange(200) != 150
    assert (y[others].double() - finite[others].double()).norm() <= BOUND[dtype] * finite.double().norm()


@every_set
@dtypes
def test_neither_threads_nor_another_run_change_a_bit(isa, dtype):
    dense, x = weight(700, 800, 0.1, dtype), torch.randn(300, 800).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3, 40):
            torch.set_num_threads(threads)
            results.append(product(x, dense, None, isa))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
