"""Wanda against a case worked out by hand."""

import torch

from sparsekern import Wanda
from sparsekern.pattern import NM, Unstructured
from sparsekern.stats import Gram, InputNorm


def norms(*values):
    """Statistics of two tokens whose columns have these l2 norms."""
    stats = InputNorm(len(values))
    stats.add(torch.diag(torch.tensor(values)))
    return stats


def test_the_norm_ranks_and_not_its_square():
    # |W| * norm = 4 * 1 > 1.5 * 2, but |W| * norm^2 = 4 < 1.5 * 4: only the plain norm keeps the first weight
    pruned = Wanda().prune(torch.tensor([[4.0, -1.5]]), norms(1.0, 2.0), Unstructured(0.5))
    assert pruned.tolist() == [[4.0, 0.0]]


def test_the_input_ranks_and_not_the_weight_alone():
    pruned = Wanda().prune(torch.tensor([[4.0, -1.5]]), norms(1.0, 3.0), Unstructured(0.5))
    assert pruned.tolist() == [[0.0, -1.5]]


def test_each_row_is_ranked_by_itself():
    weight = torch.tensor([[1.0, 2.0], [30.0, 40.0]])
    assert Wanda().prune(weight, norms(1.0, 1.0), Unstructured(0.5)).tolist() == [[0, 2], [0, 40]]


def test_two_of_four_keeps_the_best_two_of_each_group():
    weight = torch.tensor([[1.0, -2, 3, -4, 4, 3, 2, 1]])
    pruned = Wanda().prune(weight, norms(9.0, 1, 1, 1, 1, 1, 1, 1), NM(2, 4))
    assert pruned.tolist() == [[1, 0, 0, -4, 4, 3, 0, 0]]


def test_a_gram_serves_as_well_as_the_norm():
    x, weight = torch.randn(7, 12), torch.randn(5, 12)
    norm, gram = InputNorm(12), Gram(12)
    norm.add(x)
    gram.add(x)  # seven tokens: none is held out
    assert torch.equal(Wanda().prune(weight, norm, NM(2, 4)), Wanda().prune(weight, gram, NM(2, 4)))


def test_pruning_twice_changes_nothing():
    stats = norms(*torch.rand(16).tolist())
    for pattern in (NM(2, 4), Unstructured(0.5)):
        once = Wanda().prune(torch.randn(9, 16), stats, pattern)
        assert torch.equal(Wanda().prune(once, stats, pattern), once)


def test_what_is_pruned_ranks_below_what_is_worth_nothing():
    assert Wanda().saliency(torch.tensor([[0.0, 2.0, 3.0]]), norms(1.0, 0.0, 2.0)).tolist() == [[-1, 0, 6]]
