"""Refine: the mask is the method's, the weights are the best there are on it."""

import pytest
import torch

from sparsekern import GPTQ, OBD, Magnitude, Refine, SparseGPT, Wanda
from sparsekern.pattern import NM, Unstructured
from tests.methods.test_sparsegpt import problem


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT(16)], ids=repr)
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=repr)
def test_the_mask_stays_and_the_error_falls(method, pattern):
    weight, gram = problem()
    pruned = method.prune(weight, gram, pattern)
    refined = Refine(method).prune(weight, gram, pattern)
    assert torch.equal(refined != 0, pruned != 0)
    assert gram.error(weight, refined) < 0.95 * gram.error(weight, pruned)
    assert gram.held_out_error(weight, refined) < gram.held_out_error(weight, pruned)


def test_the_weights_solve_the_normal_equations_on_each_rows_mask():
    weight, gram = problem(rows=5)
    damping = 0.01
    refined = Refine(Wanda(), steps=80, damping=damping).prune(weight, gram, Unstructured(0.5))
    h = gram.hessian.double()
    h.diagonal().mul_(1 + damping)
    for row, w in zip(refined.double(), weight.double(), strict=True):
        kept = row != 0
        expected = torch.linalg.solve(h[kept][:, kept], h[kept] @ w)
        torch.testing.assert_close(row[kept], expected, rtol=1e-2, atol=1e-2)


def test_refining_twice_changes_nothing():
    weight, gram = problem()
    once = Refine(SparseGPT(16)).prune(weight, gram, NM(2, 4))
    assert torch.equal(Refine(SparseGPT(16)).prune(once, gram, NM(2, 4)), once)


def test_a_method_that_quantises_is_refused():
    for method in (SparseGPT(bits=8), GPTQ(8)):
        with pytest.raises(ValueError, match=r"off the 8-bit grid; .* GPTQ\(first=Refine\(...\)\)"):
            Refine(method)


def test_a_method_that_reads_gradients_is_refused():
    with pytest.raises(ValueError, match="OBD needs GradSquare: it cannot be refined"):
        Refine(OBD())


# without damping, weights that fewer tokens than inputs say nothing about grow with every step
@pytest.mark.parametrize("settings", [{"steps": 0}, {"damping": -1.0}, {"damping": 0.0}], ids=str)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must"):
        Refine(Wanda(), **settings)
