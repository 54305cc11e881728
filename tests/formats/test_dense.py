"""Dense: the weight as it is, and what is refused."""

import pytest
import torch

from sparsekern.formats import Dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (5, 0), (0, 5)], ids=str)
def test_what_is_packed_comes_back_bit_for_bit(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    if weight.numel():
        weight[0, 0] = -0.0
        weight[-1, -1] = float("nan")
    packed = Dense.pack(weight)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(packed.to_dense().view(bits), weight.view(bits))
    assert (packed.shape, packed.dtype, packed.nbytes) == (weight.shape, dtype, weight.nbytes)
    assert packed.device == weight.device


def test_a_contiguous_weight_is_not_copied_and_another_is():
    weight = torch.randn(3, 5)
    assert Dense.pack(weight).weight.data_ptr() == weight.data_ptr()
    assert Dense.pack(weight.T).weight.is_contiguous()
    assert not Dense.pack(torch.nn.Parameter(weight)).weight.requires_grad


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), "weight must have 2 dimensions, got shape \\[3\\]"),
        (torch.zeros(3, 4).double(), "weight must be bfloat16, float16 or float32, got torch.float64"),
        (torch.zeros(3, 4).T, "weight must be contiguous, got strides \\[1, 4\\]"),
    ],
    ids=["dimensions", "dtype", "strides"],
)
def test_another_tensor_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        Dense(weight).validate()
