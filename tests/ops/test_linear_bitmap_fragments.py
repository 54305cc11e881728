"""linear_bitmap_fragments: the reference against float64, what is refused, the shape that is promised."""

import pytest
import torch

from sparsekern.formats import Bitmap
from sparsekern.ops import bitmap_fragments, linear_bitmap, linear_bitmap_fragments
from tests.ops.test_bitmap_fragments import problem

KERNELS = {kernel.name: kernel for kernel in linear_bitmap_fragments.KERNELS}
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("leading", [(0,), (1,), (3, 5), ()], ids=str)
def test_the_reference_matches_float64(leading, dtype):
    weight, x = problem(37, 70, 0.5, dtype), torch.randn(*leading, 70).to(dtype)
    bias = torch.randn(37).to(dtype)
    operands = bitmap_fragments.reference(Bitmap.pack(weight))
    y = KERNELS["reference"].run(x, operands, bias, 37, 70)
    expected = x.double() @ weight.double().T + bias.double()
    assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_the_kernel_of_a_card_is_one_of_linear_bitmap_and_says_why_it_cannot_serve():
    assert KERNELS["cuda"] in linear_bitmap.KERNELS
    packed = Bitmap.pack(problem(3, 5, 0.5))
    assert KERNELS["cuda"].refuses(packed) == "the weight must be on a CUDA device, got cpu"


@pytest.mark.parametrize("leading", [(0,), (1,), (3, 5)], ids=str)
def test_the_expansion_is_the_dense_product_and_refuses_what_does_not_fit(on_no_card, leading):
    weight, x = problem(37, 70, 0.5), torch.randn(*leading, 70).bfloat16()
    operands = bitmap_fragments.reference(Bitmap.pack(weight))
    y = linear_bitmap_fragments.run_expanded(x, operands, None, 37, 70)
    assert torch.equal(y, torch.nn.functional.linear(x, weight))
    with pytest.raises(ValueError, match=r"x must end with in_features = 70, got shape \[2, 69\]"):
        linear_bitmap_fragments.run_expanded(x.new_zeros(2, 69), operands, None, 37, 70)
