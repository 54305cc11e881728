"""obs_sweep: the reference against a least-squares refit, then every kernel against the reference."""

import pytest
import torch

from sparsekern.ops import obs_sweep


def problem(rows, block, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * block, block, generator=g)
    hessian = x.T @ x / len(x)
    u = torch.linalg.cholesky(hessian.inverse(), upper=True).contiguous()
    weight = torch.randn(rows, block, generator=g)
    mask = torch.rand(rows, block, generator=g) > 0.5
    return weight, hessian, u, mask


def test_pruning_one_column_gives_the_least_squares_refit():
    """Pruning only column 0 must leave the other weights at their optimum."""
    weight, hessian, u, mask = problem(rows=8, block=16)
    mask[:] = True
    mask[:, 0] = False
    pruned, _ = obs_sweep.reference(weight, u, mask)
    # minimise (w - w0)^T H (w - w0) with w_0 = 0: the rest moves by H_rr^-1 H_r0 w0
    best = weight[:, 1:] + weight[:, :1] * torch.linalg.solve(hessian[1:, 1:], hessian[1:, 0])
    torch.testing.assert_close(pruned[:, 1:], best, rtol=1e-3, atol=1e-3)


def test_the_errors_carry_the_repair_to_the_columns_behind_the_block():
    weight, _, u, mask = problem(rows=5, block=24)
    whole, _ = obs_sweep.reference(weight, u, mask)
    left, right = slice(0, 8), slice(8, 24)
    first, e = obs_sweep.reference(weight[:, left], u[left, left], mask[:, left])
    second, _ = obs_sweep.reference(weight[:, right] - e @ u[left, right], u[right, right], mask[:, right])
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", obs_sweep.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("rows", [1, 16, 37], ids="rows{}".format)
def test_every_kernel_matches_the_reference_in_float64_and_leaves_its_input_alone(kernel, rows):
    weight, _, u, mask = problem(rows, block=32)
    before = weight.clone()
    pruned, e = kernel.run(weight, u, mask)
    expected, expected_e = obs_sweep.reference(weight.double(), u.double(), mask)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(e.double(), expected_e, rtol=1e-4, atol=1e-4)
    assert (pruned[~mask] == 0).all()
    assert torch.equal(weight, before)
