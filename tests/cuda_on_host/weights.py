"""Weights for the kernels that pack and unpack, and what is said against them."""

import pytest
import torch

from sparsekern.pattern import NM


def weight_24(shape, dtype, seed=0):
    """2:4, groups with none, one and two nonzeros at every place, zeros of both signs and numbers next to them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight = weight.where(NM(2, 4).mask(torch.rand(shape, generator=generator)), 0.0)
    weight = (weight * (torch.rand(shape, generator=generator) < 0.8)).to(dtype)
    zeros = torch.rand(shape, generator=generator) < 0.2
    weight = weight.where(~(zeros & (weight == 0)), -0.0)
    info = torch.finfo(dtype)
    odd = torch.tensor([info.smallest_normal / 2, -info.smallest_normal, info.max, info.min, 1.0]).to(dtype)
    drawn = odd[torch.randint(5, shape, generator=generator)]
    return weight.where((weight == 0) | (torch.rand(shape, generator=generator) < 0.7), drawn)


def weight_of(shape, dtype, density=0.5):
    generator = torch.Generator().manual_seed(sum(shape))
    kept = torch.rand(shape, generator=generator) < density
    weight = torch.randn(shape, generator=generator).to(dtype).where(kept, -0.0)
    if shape[0] > 2:
        # a full and an empty row
        weight[0], weight[1] = 1.5, 0.0
    return weight


def assert_same(found, expected, names):
    for name in names:
        got, wanted = getattr(found, name), getattr(expected, name)
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
        # the bits, so that NaN and -0.0 count
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)), name


def says(call, *arguments):
    with pytest.raises(ValueError, match=".") as refused:
        call(*arguments)
    return str(refused.value)


def told(call, packed):
    """What is said against `packed`, if anything."""
    try:
        call(packed)
    except ValueError as error:
        return str(error)
    return None
