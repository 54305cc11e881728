"""keep_largest: every kernel against a stable sort, at sizes that divide nothing and values that tie."""

import pytest
import torch

from sparsekern.ops import keep_largest
from sparsekern.ops.kernel import pick

KERNELS = [k for k in keep_largest.KERNELS if k.refuses(torch.rand(2, 4)) is None]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def by_sorting(saliency, kept):
    """A stable descending sort puts the lower index first among equals."""
    mask = torch.zeros_like(saliency, dtype=torch.bool)
    order = saliency.sort(dim=1, descending=True, stable=True).indices
    for row, count in enumerate(kept.tolist()):
        mask[row, order[row, :count]] = True
    return mask


def saliencies(kind, sets, size):
    g = torch.Generator().manual_seed(sets * size)
    x = torch.randn(sets, size, generator=g)
    if kind == "squares":
        return x.square()
    if kind == "ties":
        return (3 * x).round()
    if kind == "two values":
        return (x > 0).float()
    if kind == "equal":
        return torch.full((sets, size), 0.25)
    if kind == "close":
        return 1 + (x * 100).round() * 2**-23
    if kind == "tiny":
        return x * 1e-42
    return x.exp2().where(x.abs() < 1, x.sign() * torch.inf).where(x.abs() > 0.3, x.sign() * 0.0)


@every_kernel
@pytest.mark.parametrize("kind", ["signed", "squares", "ties", "two values", "equal", "close", "tiny"])
@pytest.mark.parametrize(("sets", "size"), [(1, 1), (1, 37), (5, 4), (37, 8), (7, 37), (3, 1000), (1, 70001)], ids=str)
def test_the_mask_is_that_of_a_stable_sort(kernel, kind, sets, size):
    saliency = saliencies(kind, sets, size)
    g = torch.Generator().manual_seed(0)
    for kept in (
        *(torch.full((sets,), count) for count in {0, 1, size // 2, max(size - 1, 0), size}),
        torch.randint(0, size + 1, (sets,), generator=g),
    ):
        assert torch.equal(kernel.run(saliency, kept), by_sorting(saliency, kept))


@every_kernel
@pytest.mark.parametrize("kept", [10, 2000, 30_000, 64_000])
def test_a_sample_that_misleads_is_noticed(kernel, kept):
    """The compiled kernel brackets the threshold of a long set by one place of every 32, each another one."""
    saliency = torch.rand(1, 65_536, generator=torch.Generator().manual_seed(kept))
    sampled = torch.arange(2048) * 32 + (torch.arange(2048) * 2654435761 % 2**32 >> 27)
    for moved in (5.0, -5.0, torch.inf):
        misleading = saliency.clone()
        misleading[0, sampled] += moved
        count = torch.tensor([kept])
        assert torch.equal(kernel.run(misleading, count), by_sorting(misleading, count))


@every_kernel
def test_one_count_may_serve_all_sets(kernel):
    saliency = torch.randn(9, 40)
    kept = torch.tensor(13)
    assert torch.equal(kernel.run(saliency, kept.expand(9)), by_sorting(saliency, kept.repeat(9)))


@every_kernel
def test_zeros_of_either_sign_tie(kernel):
    for size in (4, 40):
        saliency = torch.full((1, size), -1.0)
        saliency[0, :4] = torch.tensor([-0.0, 0.0, -0.0, 0.0])
        assert kernel.run(saliency, torch.tensor([2]))[0, :4].tolist() == [True, True, False, False]


@every_kernel
def test_a_slice_is_read_as_it_stands(kernel):
    wide = torch.randn(7, 90)
    kept = torch.full((7,), 11)
    assert torch.equal(kernel.run(wide[:, 3:73], kept), by_sorting(wide[:, 3:73], kept))


@every_kernel
@pytest.mark.parametrize("size", [4, 40, 100_000])
@pytest.mark.parametrize("kept", [0, 2, 4])
def test_nan_is_refused(kernel, size, kept):
    saliency = torch.rand(2, size)
    saliency[1, [1, 3]] = torch.nan
    with pytest.raises(ValueError, match="saliency holds 2 NaN values"):
        kernel.run(saliency, torch.full((2,), kept))


@every_kernel
def test_impossible_counts_are_refused(kernel):
    saliency = torch.rand(2, 5)
    with pytest.raises(ValueError, match=r"kept must lie in 0\.\.5, got 1\.\.6"):
        kernel.run(saliency, torch.tensor([1, 6]))
    with pytest.raises(ValueError, match=r"kept must lie in 0\.\.5, got -1\.\.2"):
        kernel.run(saliency, torch.tensor([2, -1]))
    with pytest.raises(ValueError, match=r"kept must be \[2\] int64, got \[1\] torch.int64"):
        kernel.run(saliency, torch.tensor([2]))


@every_kernel
def test_empty_sets_have_empty_masks(kernel):
    for shape in ((0, 5), (3, 0)):
        assert kernel.run(torch.rand(shape), torch.zeros(shape[0], dtype=torch.int64)).shape == shape


def test_the_number_of_threads_changes_nothing():
    saliency, before = (torch.randn(1, 300_000) * 50).round(), torch.get_num_threads()
    rows = saliency.view(300, 1000)
    try:
        masks = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            one = pick(KERNELS, saliency).run(saliency, torch.tensor([70_000]))
            masks.append((one, pick(KERNELS, rows).run(rows, torch.arange(300))))
    finally:
        torch.set_num_threads(before)
    for one, each in masks:
        assert torch.equal(one, by_sorting(saliency, torch.tensor([70_000])))
        assert torch.equal(each, by_sorting(rows, torch.arange(300)))


def test_what_the_compiled_kernel_cannot_serve_goes_to_the_reference():
    assert pick(keep_largest.KERNELS, torch.rand(1, 5).double()).name == "reference"
    kernel = next(kernel for kernel in keep_largest.KERNELS if kernel.name == "cpu")
    assert kernel.refuses(torch.rand(1, 5).double()) == "saliency must be float32, got torch.float64"
    assert kernel.refuses(torch.rand(1, 5, device="meta")) == "saliency must be on the CPU, got meta"
