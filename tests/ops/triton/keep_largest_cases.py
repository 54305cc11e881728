"""What the Triton radix select does, on a card, or on the CPU where TRITON_INTERPRET=1: run by test_keep_largest.py."""

import os

import pytest
import torch

from sparsekern.ops import keep_largest as op
from sparsekern.ops.triton import keep_largest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# on a card the blocks of a large layer too
SIZES = [37, 5000] + ([] if INTERPRETED else [4096 * 128, 14336 * 4096 + 1])


def by_sorting(saliency, kept):
    """A stable descending sort puts the lower index first among equals."""
    mask = torch.zeros_like(saliency, dtype=torch.bool)
    mask[0, saliency.sort(dim=1, descending=True, stable=True).indices[0, :kept]] = True
    return mask


def saliencies(kind, size):
    x = torch.randn(1, size, generator=torch.Generator().manual_seed(size))
    if kind == "squares":
        x = x.square()
    elif kind == "ties":
        x = (3 * x).round()
    elif kind == "equal":
        x = torch.full_like(x, 0.25)
    elif kind == "close":
        x = 1 + (x * 100).round() * 2**-23
    elif kind == "tiny":
        x = x * 1e-42
    elif kind == "zeros and infinities":
        x = x.sign() * torch.where(x.abs() < 1, 0.0, torch.inf)
        x = x.where(~x.isnan(), -0.0)
    return x.to(DEVICE)


@pytest.mark.parametrize("kind", ["signed", "squares", "ties", "equal", "close", "tiny", "zeros and infinities"])
@pytest.mark.parametrize("size", SIZES)
def test_the_mask_is_that_of_a_stable_sort(size, kind):
    saliency = saliencies(kind, size)
    for kept in (0, size // 2, size - 1, size):
        mask = keep_largest.run(saliency, torch.tensor([kept], device=DEVICE))
        assert torch.equal(mask, by_sorting(saliency, kept))


def test_zeros_of_either_sign_tie():
    saliency = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0]], device=DEVICE)
    mask = keep_largest.run(saliency, torch.tensor([2], device=DEVICE))
    assert mask.tolist() == [[False, True, True, False, False]]


def test_what_is_not_contiguous_is_read_as_it_stands():
    saliency = saliencies("ties", 90)
    for slanted in (saliency[:, ::3], saliency.expand(1, 90)[:, 7:]):
        mask = keep_largest.run(slanted, torch.tensor([11], device=DEVICE))
        assert torch.equal(mask, by_sorting(slanted, 11))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kept", [0, 7])
def test_nan_is_refused_with_its_count(kept, sign):
    saliency = saliencies("signed", 5000)
    saliency[0, [3, 4999]] = torch.tensor(torch.nan, device=DEVICE).copysign(torch.tensor(float(sign)))
    with pytest.raises(ValueError, match="saliency holds 2 NaN values"):
        keep_largest.run(saliency, torch.tensor([kept], device=DEVICE))


def test_an_empty_set_has_an_empty_mask():
    empty = torch.zeros(1, 0, device=DEVICE)
    assert keep_largest.run(empty, torch.tensor([0], device=DEVICE)).shape == (1, 0)


def test_a_count_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"kept must lie in 0\.\.5, got 6\.\.6"):
        keep_largest.run(torch.zeros(1, 5, device=DEVICE), torch.tensor([6], device=DEVICE))


if not INTERPRETED:

    def test_the_kernel_is_picked_for_a_card():
        assert op.KERNELS[0].refuses(torch.zeros(1, 5, device=DEVICE)) is None
        assert op.KERNELS[0].refuses(torch.zeros(2, 5, device=DEVICE)) == "one set at a time, got 2"
