"""OBD and its layer-wise variant against cases worked out by hand."""

import pytest
import torch

from sparsekern import OBD, LayerOBD, Magnitude
from sparsekern.pattern import NM, Unstructured
from sparsekern.stats import GradSquare, Gram, InputNorm


def squares(*gradients):
    gradients = torch.tensor(gradients)
    stats = GradSquare(*gradients.shape[1:])
    for gradient in gradients:
        stats.add(gradient)
    return stats


def norms(*values):
    """Statistics of as many tokens as inputs, whose columns have these l2 norms."""
    stats = InputNorm(len(values))
    for row in torch.diag(torch.tensor(values)):
        stats.add(row[None])
    return stats


def test_the_loss_ranks_and_not_the_weight():
    stats = squares([[1.0, 4.0], [2.0, 0.0]], [[1.0, 2.0], [-2.0, 0.0]])
    weight = torch.tensor([[3.0, 1.0], [2.0, 9.0]])
    # h = [[1, 10], [4, 0]]: half of 1 * 9, 10 * 1, 4 * 4, 0 * 81
    assert OBD().saliency(weight, stats).tolist() == [[4.5, 5.0], [8.0, 0.0]]
    assert OBD().prune(weight, stats, Unstructured(0.5)).tolist() == [[0, 1], [2, 0]]
    assert Magnitude().prune(weight, stats, Unstructured(0.5)).tolist() == [[3, 0], [0, 9]]


def test_squares_are_averaged_and_not_gradients():
    # gradients that cancel are felt all the same
    stats = squares([[5.0, 1.0]], [[-5.0, 1.0]])
    assert OBD().prune(torch.ones(1, 2), stats, Unstructured(0.5)).tolist() == [[1, 0]]


def test_the_layers_own_error_is_half_the_mean_square_of_the_input_times_the_weights():
    weight = torch.tensor([[4.0, -1.5], [1.0, 3.0]])
    # norms 1 and 2 over two tokens: mean squares 1/2 and 2
    assert LayerOBD().saliency(weight, norms(1.0, 2.0)).tolist() == [[4.0, 2.25], [0.25, 9.0]]
    assert LayerOBD().prune(weight, norms(1.0, 2.0), Unstructured(0.5)).tolist() == [[4, 0], [0, 3]]


def test_a_gram_serves_as_well_as_the_norm():
    x, weight = torch.randn(7, 12), torch.randn(5, 12)
    norm, gram = InputNorm(12), Gram(12)
    norm.add(x)
    gram.add(x)  # seven tokens: none is held out
    torch.testing.assert_close(LayerOBD().saliency(weight, norm), LayerOBD().saliency(weight, gram))


@pytest.mark.parametrize("method", [OBD(), LayerOBD()], ids=repr)
def test_weights_compete_over_the_layer_unless_the_pattern_says_otherwise(method):
    stats = squares([[1.0] * 4] * 2) if method.needs is GradSquare else norms(1.0, 1.0, 1.0, 1.0)
    weight = torch.tensor([[1.0, -2, 3, -4], [5, -6, 7, -8]])
    assert method.prune(weight, stats, Unstructured(0.5)).tolist() == [[0] * 4, [5, -6, 7, -8]]
    assert method.prune(weight, stats, Unstructured(0.5, "row")).tolist() == [[0, 0, 3, -4], [0, 0, 7, -8]]
    assert method.prune(weight, stats, NM(2, 4)).tolist() == [[0, 0, 3, -4], [0, 0, 7, -8]]


def test_what_is_pruned_goes_before_what_is_worth_nothing():
    stats = squares([[0.0, 0.0, 0.0, 1.0]])
    weight = torch.tensor([[0.0, 2.0, 3.0, 0.0]])
    assert OBD().prune(weight, stats, Unstructured(0.5)).tolist() == [[0, 2, 3, 0]]
