"""FixedMasks: what masks are made of, which dtypes they hold, and what is refused before anything is trained."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from sparsekern.fixed_masks import FixedMasks

MASKS = {"0.weight": torch.rand(7, 6) < 0.5, "2.weight": torch.rand(3, 7) < 0.5}


def model():
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def is_positive_zero(values):
    return bool(((values == 0) & ~values.signbit()).all())


def test_negative_zero_becomes_positive_and_is_a_pruned_weight():
    net = nn.Linear(3, 1, bias=False)
    net.weight.data = torch.tensor([[1.0, -0.0, 0.0]])
    masks = FixedMasks.of(net)
    with pytest.raises(ValueError, match="1 of 2 pruned weights are not"):
        masks.check()
    masks.apply()
    masks.check()
    assert masks.masks["weight"].tolist() == [[True, False, False]]
    assert masks.sparsity == pytest.approx(2 / 3)


def test_the_zeros_that_are_there_are_masks_of_matrices_and_of_nothing_else():
    net = nn.Sequential(nn.Embedding(4, 3, padding_idx=0), nn.Linear(3, 3), nn.LayerNorm(3), nn.Conv1d(2, 2, 3))
    net[1].bias.data.zero_()
    for weight in (net[1].weight, net[3].weight):
        weight.data.flatten()[:2] = 0
    assert list(FixedMasks.of(net).masks) == ["1.weight", "3.weight"]
    assert list(FixedMasks.of(net, lambda name, _: name == "1.bias").masks) == ["1.bias"]


def test_nothing_but_zeros_is_no_mask_unless_it_is_selected():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].weight.data[0, 0] = 0
    net[1].weight.data.zero_()
    with pytest.raises(ValueError, match=r"1\.weight: all of its weights are zero, and a mask would keep them so"):
        FixedMasks.of(net)
    assert FixedMasks.of(net, lambda name, _: name.endswith("weight")).sparsity == pytest.approx(10 / 18)


def test_what_cannot_be_masked_is_refused_in_words():
    net = model()
    with pytest.raises(ValueError, match=r"'0\.wait' is no parameter of Sequential; it has 0\.weight, 0\.bias"):
        FixedMasks(net, {"0.wait": MASKS["0.weight"]})
    with pytest.raises(ValueError, match=r"0\.weight: a mask must be bool of the parameter's shape \[7, 6\], got \[6"):
        FixedMasks(net, {"0.weight": torch.ones(6, 7, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"got \[7, 6\] of torch.float32"):
        FixedMasks(net, {"0.weight": torch.ones(7, 6)})
    with pytest.raises(ValueError, match="no selected weight of Sequential holds a zero; prune it first"):
        FixedMasks.of(net)
    with pytest.raises(ValueError, match="weight: the weight is on the meta device"):
        FixedMasks(nn.Linear(2, 2, device="meta"), {"weight": torch.eye(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="the optimizer holds none of the masked parameters"):
        FixedMasks(net, MASKS).attach(SGD(model().parameters(), 0.1))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
def test_every_dtype_is_masked_whatever_stood_there(dtype):
    weight = torch.tensor([[1, -0.0, math.nan], [-math.inf, -2, 3]], dtype=dtype)
    net = nn.Linear(3, 2, bias=False)
    # as it lies in memory after a transposition
    net.weight = nn.Parameter(weight.mT.contiguous().mT)
    kept = torch.tensor([[True, False, False], [False, True, True]])
    FixedMasks(net, {"weight": kept}).apply()
    expected = weight.clone()
    expected[~kept] = 0
    assert torch.equal(net.weight, expected)
    zeros = net.weight.detach()[~kept]
    assert is_positive_zero(torch.view_as_real(zeros) if dtype.is_complex else zeros)
