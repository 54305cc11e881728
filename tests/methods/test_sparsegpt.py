"""SparseGPT against least squares, against its own unblocked form, and against bugs that others had."""

import pytest
import torch

from sparsekern import SparseGPT, grid
from sparsekern.methods import Magnitude, Wanda
from sparsekern.pattern import NM, Unstructured
from sparsekern.stats import Gram

PATTERNS = [
    Unstructured(0.5),
    Unstructured(0.7),
    Unstructured(0.6, "row"),
    Unstructured(0.6, "layer"),
    NM(2, 4),
    NM(4, 8),
]


def problem(rows=12, columns=48, tokens=512, seed=0):
    """A layer with correlated inputs, and their Gram matrix."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=g) @ torch.randn(8, columns, generator=g) + 0.3 * torch.randn(
        tokens, columns, generator=g
    )
    gram = Gram(columns)
    gram.add(x)
    return torch.randn(rows, columns, generator=g), gram


def test_pruning_one_column_is_the_least_squares_refit():
    """With one column gone, the columns to its right must be the best there are, in float64."""
    weight, gram = problem(rows=3, columns=8)
    damping, column = 0.01, 2
    weight[:, column] = 1e-4 * weight[:, column].sign()
    # saliency is lowest in that column, so at one weight a row it is the one that goes
    pruned = SparseGPT(block_size=3, damping=damping).prune(weight, gram, Unstructured(1 / 8, "row"))
    assert (pruned[:, column] == 0).all()

    h = gram.hessian.double()
    h.diagonal().mul_(1 + damping)
    w, free = weight.double(), slice(column + 1, None)
    # minimise (v - w) H (v - w)^T over v[free] with v[column] = 0 and the columns to the left as they were
    best = w[:, free] + w[:, column : column + 1] * torch.linalg.solve(h[free, free], h[free, column])
    torch.testing.assert_close(pruned[:, free].double(), best, rtol=1e-5, atol=1e-5)
    assert torch.equal(pruned[:, :column], weight[:, :column])


def column_by_column(weight, gram, damping, mask):
    """The OBS update with the inverse Hessian of the remaining columns formed anew for each column, in float64."""
    h = gram.hessian.double()
    h.diagonal().mul_(1 + damping)
    w = weight.double().clone()
    for j in range(w.shape[1]):
        inverse = h[j:, j:].inverse()
        error = w[:, j].where(~mask[:, j], 0.0) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return w.where(mask, 0.0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("block_size", [8, 16, 40, 64], ids="block{}".format)
def test_the_repair_is_that_of_the_unblocked_definition(pattern, block_size):
    weight, gram = problem()
    pruned = SparseGPT(block_size).prune(weight, gram, pattern)
    expected = column_by_column(weight, gram, 0.01, pruned != 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_counts_are_exact_and_pruned_weights_are_exactly_zero(pattern):
    weight, gram = problem(rows=7)
    pruned = SparseGPT(block_size=32).prune(weight, gram, pattern)
    assert (pruned == 0).sum() == round(pattern.sparsity * weight.numel())
    assert not torch.signbit(pruned[pruned == 0]).any()
    if isinstance(pattern, NM):
        assert ((pruned != 0).view(-1, pattern.m).sum(dim=1) == pattern.n).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_pruning_twice_changes_nothing(pattern):
    weight, gram = problem()
    once = SparseGPT(block_size=16).prune(weight, gram, pattern)
    assert torch.equal(SparseGPT(block_size=16).prune(once, gram, pattern), once)


def test_an_existing_mask_is_kept_when_more_is_pruned():
    weight, gram = problem()
    half = SparseGPT(block_size=16).prune(weight, gram, Unstructured(0.5))
    more = SparseGPT(block_size=16).prune(half, gram, Unstructured(0.75))
    assert (more[half == 0] == 0).all()


def test_nm_chooses_on_weights_that_are_already_repaired():
    weight, gram = problem(seed=3)
    u, _ = gram.inverse_cholesky(0.01, per_input=True)
    pruned = SparseGPT(block_size=48).prune(weight, gram, NM(2, 4))
    at_the_start = NM(2, 4).mask((weight / u.diagonal()).square())
    assert not torch.equal(pruned != 0, at_the_start)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)], ids=repr)
def test_error_is_below_wanda_and_wanda_below_magnitude(pattern):
    g = torch.Generator().manual_seed(1)
    weight, _ = problem(rows=32, columns=64)
    x = (torch.randn(2048, 8, generator=g) @ torch.randn(8, 64, generator=g)) * torch.rand(64, generator=g).mul(3).exp()
    gram = Gram(64)
    gram.add(x + 0.3 * torch.randn(2048, 64, generator=g))
    error = [gram.held_out_error(weight, m.prune(weight, gram, pattern)) for m in (SparseGPT(32), Wanda(), Magnitude())]
    assert error == sorted(error)


def test_dead_inputs_lose_their_weights_and_count_as_pruned():
    weight, _ = problem()
    x = torch.randn(256, 48)
    x[:, [5, 17]] = 0
    gram = Gram(48)
    gram.add(x)
    pruned = SparseGPT(block_size=16).prune(weight, gram, Unstructured(0.5))
    assert (pruned[:, [5, 17]] == 0).all()
    assert (pruned == 0).sum() == round(0.5 * weight.numel())


def test_a_block_that_m_does_not_divide_is_refused():
    weight, gram = problem()
    with pytest.raises(ValueError, match="block_size 30 is not a multiple of the group of pattern 2:4"):
        SparseGPT(block_size=30).prune(weight, gram, NM(2, 4))


def as_the_authors_wrote_it(weight, h, pattern, blocksize, dtype):
    """Column by column in plain torch, from the paper and the semantics of its code."""
    w, h = weight.to(dtype).clone(), h.to(dtype).clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], blocksize):
        stop = min(start + blocksize, w.shape[1])
        score = w[:, start:stop] ** 2 / inverse.diagonal()[start:stop] ** 2
        pruned = torch.zeros_like(score, dtype=torch.bool)
        if isinstance(pattern, Unstructured):
            pruned = score <= score.flatten().sort().values[int(score.numel() * pattern.sparsity)]
        for j in range(start, stop):
            if isinstance(pattern, NM) and (j - start) % pattern.m == 0:
                group = w[:, j : j + pattern.m] ** 2 / inverse.diagonal()[j : j + pattern.m] ** 2
                smallest = group.topk(pattern.m - pattern.n, dim=1, largest=False).indices
                pruned.scatter_(1, j - start + smallest, True)
            q = w[:, j].masked_fill(pruned[:, j - start], 0)
            error = (w[:, j] - q) / inverse[j, j]
            w[:, j:] -= error[:, None] * inverse[j, j:]
            w[:, j] = q
    return w


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(6, 8)], ids=str)
@pytest.mark.parametrize("columns", [128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_original_does_as_the_authors_code_does(pattern, columns, dtype):
    g = torch.Generator().manual_seed(columns)
    # milder than `problem`: float32 must tell apart what lies next to the threshold
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=g) / (2 * columns**0.5)
    weight, gram = torch.randn(29, columns, generator=g), Gram(columns)
    gram.add(torch.randn(2048, columns, generator=g) @ mix)
    pruned = SparseGPT(original=True).prune(weight, gram, pattern)
    expected = as_the_authors_wrote_it(weight, gram.hessian, pattern, 128, dtype)
    assert torch.equal(pruned != 0, expected != 0)
    torch.testing.assert_close(pruned.to(dtype), expected, rtol=1e-3, atol=1e-4)
    if isinstance(pattern, Unstructured):
        # one too many in each block
        blocks = [29 * min(128, columns - start) for start in range(0, columns, 128)]
        assert (pruned == 0).sum() == sum(int(pattern.sparsity * size) + 1 for size in blocks)


def test_original_sets_dead_inputs_to_one_and_counts_them_as_the_authors_do():
    x = torch.randn(2048, 48, generator=torch.Generator().manual_seed(2))
    x[:, [5, 17]] = 0
    gram = Gram(48)
    gram.add(x)
    weight, _ = problem()
    pruned = SparseGPT(original=True).prune(weight, gram, Unstructured(0.5))
    expected = as_the_authors_wrote_it(weight, gram.hessian, Unstructured(0.5), 128, torch.float64)
    assert torch.equal(pruned != 0, expected != 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-5)


def test_original_ranks_a_block_and_nothing_else():
    weight, gram = problem()
    with pytest.raises(ValueError, match='scope must be "block", got "row"'):
        SparseGPT(original=True).prune(weight, gram, Unstructured(0.5, "row"))


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4)], ids=repr)
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (4, 32)])
def test_with_bits_the_weight_lies_on_a_grid_and_keeps_the_pattern(pattern, bits, group_size):
    weight, gram = problem(rows=21, columns=96)
    weight[:, 7] = 0
    pruned = SparseGPT(block_size=16, bits=bits, group_size=group_size).prune(weight, gram, pattern)
    integers, scales = grid.recover(pruned, bits, group_size)
    assert integers.abs().max() <= 2 ** (bits - 1) - 1
    assert scales.shape == (21, 1 if group_size is None else 3)
    dense = integers.view(21, scales.shape[1], -1) * scales[:, :, None]
    torch.testing.assert_close(dense.view_as(pruned), pruned, rtol=1e-6, atol=0)
    # a kept weight may round to zero as well
    assert (pruned == 0).sum() >= round(pattern.sparsity * weight.numel())
    assert not torch.signbit(pruned[pruned == 0]).any()
    assert (pruned[:, 7] == 0).all()
    if isinstance(pattern, NM):
        assert ((pruned != 0).view(-1, pattern.m).sum(dim=1) <= pattern.n).all()


def test_more_bits_and_finer_scales_lose_less_and_the_joint_sweep_beats_rounding_afterwards():
    weight, gram = problem(rows=64, columns=128, tokens=4096)
    weight *= torch.randn(128, generator=torch.Generator().manual_seed(1)).exp()

    def error(**settings):
        return gram.error(weight, SparseGPT(block_size=32, **settings).prune(weight, gram, NM(2, 4)))

    pruned = SparseGPT(block_size=32).prune(weight, gram, NM(2, 4))
    scale = grid.best_scale(pruned, torch.ones(128), 7)
    rounded = gram.error(weight, grid.nearest(pruned, scale[:, None], 7))
    assert error() < error(bits=8) < error(bits=4, group_size=32) < error(bits=4) < rounded


def test_settings_that_no_grid_has_are_refused():
    for settings, why in (
        ({"bits": 3}, "bits must be 4, 8 or None, got 3"),
        ({"group_size": 128}, "group_size goes with bits"),
        ({"bits": 4, "group_size": 96}, "group_size must be a multiple of block_size 128, got 96"),
    ):
        with pytest.raises(ValueError, match=why):
            SparseGPT(**settings)


@pytest.mark.parametrize(("block_size", "damping"), [(0, 0.01), (128, -1.0), (128, float("nan"))])
def test_settings_out_of_range_are_refused(block_size, damping):
    with pytest.raises(ValueError, match="must"):
        SparseGPT(block_size, damping)
