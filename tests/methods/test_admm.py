"""ADMM: better than what it builds on, at exact counts, and at rest where nothing is to be done."""

import itertools

import pytest
import torch

from sparsekern import ADMM, OBS, Refine, SparseGPT
from sparsekern.methods.least_squares import choose_damping
from sparsekern.pattern import NM, Unstructured
from sparsekern.stats import Gram

PATTERNS = [Unstructured(0.5), Unstructured(0.7), Unstructured(0.6, "row"), NM(2, 4), NM(4, 8), NM(1, 4), NM(6, 8)]


def problem(rows=24, columns=48, tokens=1024, seed=0):
    """A layer with correlated inputs of unequal strength, and their Gram matrix."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=g) @ torch.randn(8, columns, generator=g)
    x += 0.3 * torch.randn(tokens, columns, generator=g)
    gram = Gram(columns)
    gram.add(x * torch.randn(columns, generator=g).mul(0.5).exp())
    return torch.randn(rows, columns, generator=g), gram


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_counts_are_exact_and_pruned_weights_are_exactly_zero(pattern):
    weight, gram = problem(rows=7)
    pruned = ADMM().prune(weight, gram, pattern)
    assert (pruned == 0).sum() == round(pattern.sparsity * weight.numel())
    assert not torch.signbit(pruned[pruned == 0]).any()
    if isinstance(pattern, NM):
        assert ((pruned != 0).view(-1, pattern.m).sum(dim=1) == pattern.n).all()
    if pattern == Unstructured(0.6, "row"):
        zeros = (pruned == 0).sum(dim=1)
        assert zeros.max() - zeros.min() <= 1


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_pruning_twice_changes_nothing(pattern):
    weight, gram = problem()
    once = ADMM().prune(weight, gram, pattern)
    assert torch.equal(ADMM().prune(once, gram, pattern), once)


def test_an_existing_mask_is_kept_when_more_is_pruned():
    weight, gram = problem()
    half = ADMM().prune(weight, gram, Unstructured(0.5))
    more = ADMM().prune(half, gram, Unstructured(0.75))
    assert (more[half == 0] == 0).all()
    assert (more == 0).sum() == round(0.75 * weight.numel())


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(4, 8)], ids=repr)
def test_error_is_below_sparsegpt_and_its_refinement(pattern):
    for seed in range(3):
        weight, gram = problem(rows=48, columns=96, seed=seed)
        methods = ADMM(), Refine(SparseGPT()), SparseGPT()
        errors = [gram.held_out_error(weight, method.prune(weight, gram, pattern)) for method in methods]
        assert errors[0] < 0.99 * errors[1]
        assert errors[1] < errors[2]


def test_error_is_near_the_best_of_all_masks():
    """Every 2:4 mask of a row of 12, each with its least-squares weights: no mask is missed by much."""
    weight, gram = problem(rows=6, columns=12)
    h = gram.hessian.double() + 1e-3 * gram.hessian.diagonal().double().diag()
    groups = [torch.tensor(pair) for pair in itertools.combinations(range(4), 2)]
    best = torch.full((6,), torch.inf, dtype=torch.float64)
    for choice in itertools.product(groups, repeat=3):
        kept = torch.cat([group + 4 * number for number, group in enumerate(choice)])
        solved = torch.zeros(6, 12, dtype=torch.float64)
        solved[:, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ weight.double().T).T
        away = solved - weight
        best = torch.minimum(best, ((away @ h) * away).sum(dim=1))
    away = ADMM(damping=1e-3, growth=1.1, levels=60).prune(weight, gram, NM(2, 4)).double() - weight
    found = float(((away @ h) * away).sum())
    assert float(best.sum()) * (1 - 1e-4) <= found <= 1.3 * float(best.sum())


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=repr)
def test_error_is_below_exact_greedy_removal(pattern):
    weight, gram = problem(rows=16, columns=32)
    assert gram.error(weight, ADMM().prune(weight, gram, pattern)) < gram.error(
        weight, OBS().prune(weight, gram, pattern)
    )


def test_dead_inputs_lose_their_weights_and_count_as_pruned():
    weight, _ = problem()
    x = torch.randn(256, 48)
    x[:, [5, 17]] = 0
    gram = Gram(48)
    gram.add(x)
    pruned = ADMM().prune(weight, gram, Unstructured(0.5))
    assert (pruned[:, [5, 17]] == 0).all()
    assert (pruned == 0).sum() == round(0.5 * weight.numel())


@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_fewer_tokens_than_inputs_are_enough(tokens):
    weight, _ = problem()
    gram = Gram(48)
    gram.add(torch.randn(tokens, 48))
    pruned = ADMM().prune(weight, gram, NM(2, 4))
    assert pruned.isfinite().all()
    assert (pruned == 0).sum() == weight.numel() // 2


@pytest.mark.parametrize("damping", [0.02, None])
def test_the_damping_reaches_the_report(damping):
    weight, gram = problem()
    ADMM(damping=damping).prune(weight, gram, Unstructured(0.5))
    assert gram.damping == (damping or choose_damping(weight, gram, Unstructured(0.5)))


@pytest.mark.parametrize(
    "settings", [{"damping": 0.0}, {"rho": 0.0}, {"growth": 0.9}, {"levels": 0}, {"inner": 0}, {"steps": 0}], ids=str
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must"):
        ADMM(**settings)
