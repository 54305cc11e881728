"""inverse_cholesky: every kernel against float64, on Hessians as bad as layers have them."""

import pytest
import torch

from sparsekern.ops import inverse_cholesky
from sparsekern.ops.kernel import pick

KERNELS = pytest.mark.parametrize("kernel", inverse_cholesky.KERNELS, ids=lambda kernel: kernel.name)
# just past the corner that the library factors, and sizes that divide nothing
SIZES = [1, 5, 128, 129, 300, 777]


def hessian(size, damping=0.01, seed=0):
    """Correlated inputs of very unequal strength, a few of them outliers; symmetric float32."""
    generator = torch.Generator().manual_seed(seed)
    rank = size // 8 + 1
    mixed = torch.randn(4 * size, rank, generator=generator) @ torch.randn(rank, size, generator=generator)
    x = (mixed + 0.3 * torch.randn(4 * size, size, generator=generator)) * torch.randn(size, generator=generator).exp()
    x[:, : size // 100] *= 20
    h = x.T @ x / len(x)
    h.diagonal().add_(damping * h.diagonal().mean())
    return h


def factor(kernel, h):
    if reason := kernel.refuses(h):
        pytest.skip(f"{kernel.name}: {reason}")
    u, failed = kernel.run(h.clone())
    assert not failed
    return u


@KERNELS
@pytest.mark.parametrize("size", SIZES)
def test_u_is_row_major_upper_triangular_and_rebuilds_the_inverse(kernel, size):
    h = hessian(size, damping=0.1)
    u = factor(kernel, h)
    assert u.is_contiguous()
    assert torch.equal(u, u.triu())
    assert u.diagonal().gt(0).all()
    identity = u.double().T @ (u.double() @ h.double())
    torch.testing.assert_close(identity, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-3)


@KERNELS
@pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-4, 1e-6])
def test_ill_conditioned_hessians_are_factored_about_as_well_as_by_the_library(kernel, damping):
    h = hessian(700, damping)
    exact, _ = inverse_cholesky.reference(h.double())
    by_library, _ = inverse_cholesky.reference(h.clone())
    u = factor(kernel, h)

    def errors(u):
        residual = u.double().T @ (u.double() @ h.double()) - torch.eye(len(h))
        return (u - exact).norm() / exact.norm(), residual.norm()

    for own, library in zip(errors(u), errors(by_library), strict=True):
        assert own < 2 * library


@KERNELS
@pytest.mark.parametrize("size", [6, 600])
@pytest.mark.parametrize("where", ["first", "last"])
def test_an_indefinite_matrix_fails(kernel, size, where):
    h = torch.eye(size)
    h[0 if where == "first" else -1, 0 if where == "first" else -1] = -1
    if reason := kernel.refuses(h):
        pytest.skip(f"{kernel.name}: {reason}")
    assert kernel.run(h)[1]


@KERNELS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [(3, 3), (2, 590), (0, 599), (598, 599)], ids=str)
def test_what_is_not_finite_fails(kernel, bad, at):
    h = torch.eye(600)
    h[at] = h[at[::-1]] = bad
    if reason := kernel.refuses(h):
        pytest.skip(f"{kernel.name}: {reason}")
    assert kernel.run(h)[1]


@KERNELS
def test_the_factor_in_float64_is_that_of_the_definition(kernel):
    h = hessian(500).double()
    u = factor(kernel, h)
    torch.testing.assert_close(u, torch.linalg.cholesky(h.inverse(), upper=True), rtol=1e-8, atol=1e-10)


def test_large_matrices_go_by_halves_and_small_ones_to_the_library():
    assert pick(inverse_cholesky.KERNELS, torch.eye(129)).name == "by_halves"
    assert pick(inverse_cholesky.KERNELS, torch.eye(128)).name == "reference"
