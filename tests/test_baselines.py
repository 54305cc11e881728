"""baselines: each dense form computes what F.linear does, or says why it cannot run."""

import pytest
import torch
import torch.nn.functional as F

from sparsekern.baselines import COMPILED, LINEAR, PREPACKED


@pytest.mark.parametrize("dense", [LINEAR, PREPACKED, COMPILED], ids=lambda dense: dense.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_every_baseline_is_a_linear_layer(dense, dtype, biased):
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(37, 64, generator=g).to(dtype), torch.randn(3, 64, generator=g).to(dtype)
    if reason := dense.refuses(weight):
        pytest.skip(f"{dense.name}: {reason}")
    bias = weight[:, 0].clone() if biased else None
    y = dense.run(x, dense.prepare(weight, bias, len(x)), bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (y.double() - expected).norm() <= 1e-2 * expected.norm()
