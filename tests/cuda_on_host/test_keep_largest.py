"""csrc/cuda/keep_largest.cu without a card: every line runs on the CPU, and the op above it (conftest.py)."""

import pytest
import torch

from sparsekern.ops import keep_largest
from tests.cuda_on_host.emulator import ORDERS
from tests.cuda_on_host.weights import says


def saliencies(sets, size):
    generator = torch.Generator().manual_seed(sets * size)
    x = torch.randn(sets, size, generator=generator)
    yield x
    yield (2 * x).round()
    yield torch.zeros(sets, size).where(x < 0, -0.0)
    yield x * 1e-42
    yield x.where(x.abs() < 1, x.sign() * torch.inf)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_the_mask_of_small_sets_is_the_references(emulated, size):
    for sets in (1, 37, 3000 // size, 0):
        for number, saliency in enumerate(saliencies(sets, size)):
            emulated.order = ORDERS[number % 3]
            for kept in (
                torch.full((1,), number * size // 4).expand(sets),
                torch.randint(0, size + 1, (sets,), generator=torch.Generator().manual_seed(number)),
            )[: 1 + (number < 2)]:
                expected = keep_largest.reference(saliency, kept)
                assert torch.equal(keep_largest._cuda(saliency, kept), expected)


def test_saliencies_that_are_nan_and_counts_that_cannot_be_are_refused_in_the_references_words(emulated):
    for size in (2, 4, 8, 16):
        saliency, kept = torch.rand(50, size), torch.full((50,), 1)
        saliency[49, size - 1] = saliency[3, 0] = torch.nan
        assert says(keep_largest._cuda, saliency, kept) == says(keep_largest.reference, saliency, kept)
    for wrong in (5, -1):
        kept = torch.tensor([2, wrong])
        assert says(keep_largest._cuda, torch.rand(2, 4), kept) == says(keep_largest.reference, torch.rand(2, 4), kept)
        # counts on the card are looked at there
        _, status = torch.ops.sparsekern.keep_largest(torch.rand(2, 4), kept)
        assert status.tolist() == [0, 1]
    # and, before they are, how many there are: the kernel would read behind them
    for wrong in (torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(2, dtype=torch.int32, device="meta")):
        with pytest.raises(ValueError, match=r"kept must be \[2\] int64, got"):
            keep_largest._cuda(torch.rand(2, 4), wrong)
    shifted = torch.rand(41)[1:].view(10, 4)
    kept = torch.full((10,), 2)
    assert torch.equal(keep_largest._cuda(shifted, kept), keep_largest.reference(shifted, kept))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_on_a_card_the_mask_of_small_sets_is_the_references(size):
    for sets in (1, 37, 70_001):
        for saliency in saliencies(sets, size):
            kept = torch.full((1,), size // 2).expand(sets)
            expected = keep_largest.reference(saliency, kept)
            assert torch.equal(keep_largest._cuda(saliency.cuda(), kept).cpu(), expected)
            assert torch.equal(keep_largest._cuda(saliency.cuda(), kept.cuda()).cpu(), expected)
