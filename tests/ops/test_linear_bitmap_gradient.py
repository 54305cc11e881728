"""linear_bitmap backwards: the dense weight that it needs, and the gradients of x and of the bias."""

import pytest
import torch
from torch.nn.functional import linear

from sparsekern.formats.bitmap import Bitmap
from sparsekern.ops import compiled, linear_bitmap

WHY_NOT = compiled.why_not("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"sparsekern._cpu: {WHY_NOT}")


def pruned(out_features, in_features, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(out_features, in_features) * (torch.rand(out_features, in_features) < 0.5)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (37, 7), (100, 257), (0, 5), (5, 0)], ids=str)
def test_the_dense_weight_of_the_operands_is_the_one_that_was_packed(shape, dtype):
    dense = pruned(*shape, dtype)
    operands = linear_bitmap.to_panels(Bitmap.pack(dense))
    assert torch.equal(linear_bitmap.dense_cpu(operands, *shape), dense)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
def test_x_and_the_bias_have_the_gradients_of_the_dense_product(leading):
    dense = pruned(37, 70)
    operands = linear_bitmap.to_panels(Bitmap.pack(dense))
    x, bias, g = torch.randn(*leading, 70), torch.randn(37), torch.randn(*leading, 37)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    got = torch.autograd.grad(linear_bitmap.run_cpu(x, operands, bias, 37, 70), (x, bias), g)
    want = torch.autograd.grad(linear(x, dense, bias), (x, bias), g)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_only_what_asks_for_a_gradient_gets_one():
    operands = linear_bitmap.to_panels(Bitmap.pack(pruned(37, 70)))
    bias = torch.randn(37, requires_grad=True)
    linear_bitmap.run_cpu(torch.randn(5, 70), operands, bias, 37, 70).sum().backward()
    assert bias.grad.eq(5).all()
