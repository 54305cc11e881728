"""GPTQ on a pruned weight: the grid, the mask, and how good the integers are."""

import pytest
import torch

import sparsekern as sk
from sparsekern import grid, hf
from sparsekern.methods import ADMM, GPTQ, OBD, Magnitude, SparseGPT, Wanda
from sparsekern.pattern import NM, Unstructured
from sparsekern.stats import Gram
from tests import tiny_models

PATTERNS = [Unstructured(0.5), Unstructured(0.7, "row"), NM(2, 4)]


def problem(rows=24, columns=96, tokens=2048, seed=0):
    """A layer with correlated inputs of different strength, and their Gram matrix."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=g) @ torch.randn(8, columns, generator=g)
    x = (x + 0.5 * torch.randn(tokens, columns, generator=g)) * torch.rand(columns, generator=g).exp()
    gram = Gram(columns)
    gram.add(x)
    return torch.randn(rows, columns, generator=g), gram


def damped(gram, damping=0.01):
    h = gram.hessian.double()
    h.diagonal().mul_(1 + damping)
    return h


def loss(weight, quantised, h):
    """What is minimised, row by row [out_features]."""
    difference = quantised.double() - weight.double()
    return ((difference @ h) * difference).sum(dim=1)


def on_its_own_support(start, h, scale, largest):
    """GPTQ with the exact inverse of every row's support, in float64: the oracle, a row at a time."""
    quantised = torch.zeros_like(start, dtype=torch.float64)
    for row, step in enumerate(scale.double()):
        kept = start[row].nonzero().flatten()
        u = torch.linalg.cholesky(torch.linalg.inv(h[kept][:, kept]), upper=True)
        w = start[row, kept].double()
        for j in range(len(kept)):
            q = grid.nearest(w[j], step, largest)
            w[j:] -= (w[j] - q) / u[j, j] * u[j, j:]
            w[j] = q
        quantised[row, kept] = w
    return quantised


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (4, 32), (4, 48)])
def test_the_weight_lies_on_a_grid_and_what_was_pruned_stays_zero(pattern, bits, group_size):
    weight, gram = problem()
    first = SparseGPT().prune(weight, gram, pattern)
    quantised = GPTQ(bits, group_size, SparseGPT()).prune(weight, gram, pattern)
    assert (quantised[first == 0] == 0).all()
    assert not torch.signbit(quantised[quantised == 0]).any()
    integers, scales = grid.recover(quantised, bits, group_size)
    dense = integers.view(24, scales.shape[1], -1) * scales[:, :, None]
    torch.testing.assert_close(dense.view_as(quantised), quantised, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_it_loses_less_than_the_joint_sweep_and_than_gptq_with_exact_inverses(pattern):
    weight, gram = problem(rows=32, columns=128, tokens=4096)
    h = damped(gram)
    start = SparseGPT().prune(weight, gram, pattern)
    u, _ = gram.inverse_cholesky(0.01, per_input=True)
    scale = grid.best_scale(start, u.diagonal() ** -2 * (start != 0), 7)
    exact = loss(weight, on_its_own_support(start, h, scale, 7), h).sum()
    joint = loss(weight, SparseGPT(bits=4).prune(weight, gram, pattern), h).sum()
    mine = loss(weight, GPTQ(4, first=SparseGPT()).prune(weight, gram, pattern), h).sum()
    assert mine < 0.95 * min(exact, joint)
    assert loss(weight, GPTQ(4).prune(weight, gram, pattern), h).sum() < mine


def test_every_pass_lowers_what_every_row_loses():
    weight, gram = problem()
    h = damped(gram)
    losses = [loss(weight, GPTQ(4, 32, passes=n).prune(weight, gram, NM(2, 4)), h) for n in range(5)]
    for before, after in zip(losses, losses[1:], strict=False):
        assert (after <= before * (1 + 1e-5)).all()
    assert losses[4].sum() < 0.9 * losses[0].sum()


def test_in_the_end_no_single_integer_could_be_a_better_one():
    weight, gram = problem(rows=5, columns=24)
    h = damped(gram)
    quantised = GPTQ(4, first=Magnitude(), passes=60).prune(weight, gram, Unstructured(0.5, "row"))
    mask = Magnitude().prune(weight, gram, Unstructured(0.5, "row")) != 0
    integers, scales = grid.recover(quantised, 4)
    # a row whose integers share a factor comes back with a coarser scale
    least = loss(weight, quantised, h)
    for row, column in mask.nonzero().tolist():
        for step in (-1, 1):
            if abs(int(integers[row, column]) + step) <= 7:
                other = quantised.clone()
                other[row, column] += step * scales[row, 0]
                assert loss(weight, other, h)[row] >= least[row] * (1 - 1e-4)


def test_eight_bits_lose_next_to_nothing_and_finer_scales_less():
    weight, gram = problem(rows=32, columns=128, tokens=4096)
    error = {
        settings: gram.error(weight, GPTQ(*settings).prune(weight, gram, NM(2, 4)))
        for settings in ((8, None), (4, 32), (4, None))
    }
    assert error[8, None] < error[4, 32] < error[4, None]
    assert error[8, None] < 1.01 * gram.error(weight, SparseGPT().prune(weight, gram, NM(2, 4)))


@pytest.mark.parametrize("first", [Magnitude(), Wanda(), SparseGPT(block_size=32), ADMM()], ids=repr)
def test_any_method_that_prunes_by_inputs_can_come_first(first):
    weight, gram = problem()
    quantised = GPTQ(4, 32, first).prune(weight, gram, NM(2, 4))
    assert ((quantised != 0).view(-1, 4).sum(dim=1) <= 2).all()
    assert gram.error(weight, quantised) < 1


def test_one_that_needs_gradients_cannot():
    with pytest.raises(ValueError, match="first must prune by what the layer reads.*: OBD needs GradSquare"):
        GPTQ(first=OBD())


def test_dead_inputs_and_rows_of_zeros_are_zero():
    weight, _ = problem()
    x = torch.randn(512, 96, generator=torch.Generator().manual_seed(1))
    x[:, [5, 17]] = 0
    gram = Gram(96)
    gram.add(x)
    weight[3] = 0
    for first in (SparseGPT(), Magnitude(), ADMM()):
        quantised = GPTQ(4, 32, first).prune(weight, gram, Unstructured(0.5))
        assert (quantised[:, [5, 17]] == 0).all()
        assert (quantised[3] == 0).all()
        assert quantised.isfinite().all()


def test_a_model_is_pruned_and_quantised():
    model = tiny_models.make("llama")
    report = sk.prune(model, GPTQ(4), "2:4", tiny_models.batches("llama"))
    assert report.sparsity >= 0.5
    for _, layer in hf.layers(model):
        integers, _ = grid.recover(hf.weight(layer), 4)
        assert ((integers != 0).view(-1, 4).sum(dim=1) <= 2).all()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"bits": 3}, "bits must be 4, 8 or None, got 3"),
        ({"bits": None}, "bits must be 4 or 8, got None"),
        ({"group_size": 0}, "group_size goes with bits and must be at least 1, got 0"),
        ({"passes": -1}, "passes must not be negative, got -1"),
        ({"damping": float("nan")}, "damping must not be negative, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        GPTQ(**settings)


@pytest.mark.parametrize("rows", [1, 24])
def test_how_the_weight_lies_in_memory_changes_nothing(rows):
    """A single row, and the transposed weight of a Conv1D: their columns are contiguous where they stand."""
    weight, gram = problem(rows=rows)
    quantised = GPTQ(first=SparseGPT(16)).prune(weight, gram, NM(2, 4))
    by_columns = GPTQ(first=SparseGPT(16)).prune(weight.T.contiguous().T, gram, NM(2, 4))
    torch.testing.assert_close(by_columns, quantised)
    swept = GPTQ(first=SparseGPT(16), passes=0).prune(weight, gram, NM(2, 4))
    assert (loss(weight, quantised, damped(gram)) < loss(weight, swept, damped(gram))).all()
