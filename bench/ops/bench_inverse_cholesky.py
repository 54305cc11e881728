"""inverse_cholesky: the factor that the sweeps read."""

import pytest
import torch

from sparsekern.ops import inverse_cholesky


@pytest.mark.parametrize("kernel", inverse_cholesky.KERNELS, ids=lambda kernel: kernel.name)
def test_inverse_cholesky(timed, serves, kernel, stats):
    h = stats.hessian + 0.01 * torch.eye(len(stats.hessian), device=stats.hessian.device)
    serves(kernel, h)
    # the op may overwrite what it is given
    _, failed = timed(lambda: kernel.run(h.clone()))
    assert not failed
