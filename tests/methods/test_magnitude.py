"""Magnitude pruning: the smallest go, the others do not move."""

import torch

from sparsekern import Magnitude
from sparsekern.pattern import NM, Unstructured


def test_the_smallest_weights_of_the_whole_layer_go():
    weight = torch.tensor([[1.0, -2, 3, -4], [5, -6, 7, -8]])
    pruned = Magnitude().prune(weight, None, Unstructured(0.5))
    assert pruned.tolist() == [[0, 0, 0, 0], [5, -6, 7, -8]]


def test_row_scope_prunes_each_row():
    weight = torch.tensor([[1.0, -2, 3, -4], [5, -6, 7, -8]])
    pruned = Magnitude().prune(weight, None, Unstructured(0.5, "row"))
    assert pruned.tolist() == [[0, 0, 3, -4], [0, 0, 7, -8]]


def test_pruning_twice_changes_nothing_and_negative_zero_is_gone():
    weight = torch.randn(9, 16)
    weight[0, 0] = -0.0
    for pattern in (NM(2, 4), Unstructured(0.5)):
        once = Magnitude().prune(weight, None, pattern)
        assert torch.equal(Magnitude().prune(once, None, pattern), once)
        assert not torch.signbit(once[once == 0]).any()
