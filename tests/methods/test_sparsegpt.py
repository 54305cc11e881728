"""SparseGPT against least squares, against its own unblocked form, and against bugs that others had."""

import pytest
import torch

from sparsekern import SparseGPT
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
    u, _ = gram.inverse_cholesky(damping)
    weight[:, column] = 1e-4 * weight[:, column].sign()
    # saliency is lowest in that column, so at one weight a row it is the one that goes
    pruned = SparseGPT(block_size=3, damping=damping).prune(weight, gram, Unstructured(1 / 8, "row"))
    assert (pruned[:, column] == 0).all()

    h = gram.hessian.double()
    h.diagonal().add_(damping * h.diagonal().mean())
    w, free = weight.double(), slice(column + 1, None)
    # minimise (v - w) H (v - w)^T over v[free] with v[column] = 0 and the columns to the left as they were
    best = w[:, free] + w[:, column : column + 1] * torch.linalg.solve(h[free, free], h[free, column])
    torch.testing.assert_close(pruned[:, free].double(), best, rtol=1e-5, atol=1e-5)
    assert torch.equal(pruned[:, :column], weight[:, :column])
    assert u.shape == (8, 8)


def column_by_column(weight, gram, damping, mask):
    """The OBS update with the inverse Hessian of the remaining columns formed anew for each column, in float64."""
    h = gram.hessian.double()
    h.diagonal().add_(damping * h.diagonal().mean())
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
    u, _ = gram.inverse_cholesky(0.01)
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


@pytest.mark.parametrize(("block_size", "damping"), [(0, 0.01), (128, -1.0), (128, float("nan"))])
def test_settings_out_of_range_are_refused(block_size, damping):
    with pytest.raises(ValueError, match="must"):
        SparseGPT(block_size, damping)
