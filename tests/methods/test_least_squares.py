"""Least squares on a support: conjugate gradients against a direct solution in float64, and which damping is chosen."""

import pytest
import torch

from sparsekern.methods.least_squares import DAMPINGS, choose_damping, solve_on_support, unit_diagonal
from sparsekern.pattern import Unstructured
from sparsekern.stats import Gram


def problem(rows=7, columns=37, tokens=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 6, generator=g) @ torch.randn(6, columns, generator=g)
    x += 0.5 * torch.randn(tokens, columns, generator=g)
    h, _ = unit_diagonal(x.T @ x / tokens)
    weight = torch.randn(rows, columns, generator=g)
    return weight, h, torch.rand(rows, columns, generator=g) > 0.5


def direct(weight, h, support, damping):
    """Row by row: the normal equations on the row's support."""
    h = h.double() + damping * torch.eye(len(h), dtype=torch.float64)
    solution = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(support):
        right = h[kept] @ weight[row].double()
        solution[row, kept] = torch.linalg.solve(h[kept][:, kept], right)
    return solution


def objective(solution, weight, h, damping):
    """Row by row, in float64."""
    away = solution.double() - weight
    return ((away @ (h.double() + damping * torch.eye(len(h)))) * away).sum(dim=1)


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_enough_steps_reach_the_solution_of_the_normal_equations(damping):
    weight, h, support = problem()
    solved = solve_on_support(weight, weight.where(support, 0.0), h, support, damping, steps=60)
    best = objective(direct(weight, h, support, damping), weight, h, damping)
    assert float(objective(solved, weight, h, damping).sum()) < 1.0005 * float(best.sum())
    torch.testing.assert_close(solved.double(), direct(weight, h, support, damping), rtol=5e-2, atol=5e-2)


def test_each_row_may_have_its_own_damping():
    weight, h, support = problem(rows=2)
    each = torch.tensor([[0.01], [0.3]])
    solved = solve_on_support(weight, weight.where(support, 0.0), h, support, each, steps=60)
    for row in range(2):
        damping = float(each[row])
        expected = direct(weight[row : row + 1], h, support[row : row + 1], damping)
        torch.testing.assert_close(solved[row : row + 1].double(), expected, rtol=5e-2, atol=5e-2)


def test_every_step_lowers_the_objective():
    weight, h, support = problem(rows=16, columns=64)
    start = weight.where(support, 0.0)

    solutions = [solve_on_support(weight, start, h, support, 0.01, steps) for steps in range(8)]
    values = [float(objective(solution, weight, h, 0.01).sum()) for solution in solutions]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]


def test_what_is_at_its_optimum_comes_back_bit_for_bit():
    weight, h, support = problem()
    start = weight.where(support, 0.0)
    assert torch.equal(solve_on_support(start, start, h, support, 0.01, steps=20), start)


def test_nothing_outside_the_support_is_touched():
    weight, h, support = problem()
    support[3] = False
    solved = solve_on_support(weight, weight.where(support, 0.0), h, support, 0.01, steps=20)
    assert (solved[~support] == 0).all()
    assert solved.isfinite().all()


def test_scaling_to_unit_diagonal_is_undone_by_the_scale():
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 9)
    x[:, 4] = 0
    hessian = x.T @ x
    h, scale = unit_diagonal(hessian)
    assert (h.diagonal() == 1).all()
    assert scale[4] == 1
    assert (h[4, torch.arange(9) != 4] == 0).all()
    alive = torch.arange(9) != 4
    back = scale[:, None] * h * scale
    torch.testing.assert_close(back[alive][:, alive], hessian[alive][:, alive], rtol=1e-5, atol=0)


def test_a_hessian_that_is_not_finite_is_refused():
    hessian = torch.eye(4)
    hessian[1, 1] = torch.nan
    with pytest.raises(ValueError, match="Hessian holds 1 NaN or infinite values"):
        unit_diagonal(hessian)


def layer_of_few_directions(tokens):
    g = torch.Generator().manual_seed(2)
    mix = torch.randn(8, 64, generator=g)
    gram = Gram(64)
    gram.add(torch.randn(tokens, 8, generator=g) @ mix + 0.5 * torch.randn(tokens, 64, generator=g))
    return torch.randn(32, 64, generator=g), gram


def test_few_tokens_are_damped_more_than_many():
    few, many = (choose_damping(*layer_of_few_directions(tokens), Unstructured(0.5)) for tokens in (96, 16384))
    assert many < few
    assert {few, many} <= set(DAMPINGS)


def test_without_held_out_tokens_the_damping_is_that_of_few_tokens():
    weight, _ = layer_of_few_directions(64)
    gram = Gram(64)
    gram.add(torch.randn(7, 64))
    assert gram.held_out_tokens == 0
    assert choose_damping(weight, gram, Unstructured(0.5)) == 0.1
