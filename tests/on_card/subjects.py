"""What the tests of this folder multiply, and how far a result may be from float64."""

import torch

from sparsekern.formats import SemiStructured
from sparsekern.pattern import NM

# a weight whose inputs are so many, and outputs so few, that blocks share outputs and meet in a workspace
SHARED = (272, 6160)
# relative to float64, root mean square over the output
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}


def weight_of(shape, format, dtype, device, sparsity=0.6):
    """A random weight that `format` holds, with one row of zeros and, in a bitmap, one without any."""
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    weight = torch.randn(shape, generator=generator)
    if format is SemiStructured:
        weight = weight.where(NM(2, 4).mask(weight.abs()), 0.0)
    else:
        weight = weight.where(torch.rand(shape, generator=generator) >= sparsity, 0.0)
        weight[0] = 1.25
    weight[-1] = 0.0
    return weight.to(device, dtype)


def input_of(tokens, in_features, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, in_features, generator=generator).to(device, dtype)


def assert_is_linear(y, x, weight, bias=None):
    """y = x weight^T + bias, every element of it written."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    assert y.isfinite().all()
    off = (y.double() - expected).norm()
    assert off <= TOLERANCE[x.dtype] * expected.norm(), f"off by {float(off / expected.norm()):.2g}"
