"""How long each op takes, for watching one machine over time with pytest-benchmark: a file an op, a test a kernel.

    pytest bench --benchmark-only                                   everything; on a card too, where there is one
    pytest bench -k "large and linear" --benchmark-json=ops.json    then: pytest-benchmark compare
    pytest bench -k tiny --benchmark-disable                        a check that everything here still runs

These are times of one implementation, in one buffer, in whatever cache holds it. They compare commits, and say nothing
of sparse against dense: that is for linear.py, model.py and gpu.py to say.
"""

import pytest
import torch

from sparsekern.pattern import NM
from sparsekern.stats import Gram


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(params=[(24, 32), (1024, 1024)], ids=["tiny", "large"])
def shape(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def weight(shape, device, dtype):
    """[out_features, in_features], 2:4, so that every format holds it."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return weight.where(NM(2, 4).mask(weight.abs()), 0.0).to(device, dtype)


@pytest.fixture
def stats(shape, device):
    """Statistics of random inputs."""
    stats = Gram(shape[1], device)
    stats.add(torch.randn(4 * shape[1], shape[1], generator=torch.Generator().manual_seed(1)).to(device))
    return stats


@pytest.fixture
def timed(benchmark, device):
    """benchmark, that waits for the card."""

    def run(call, *arguments):
        if device == "cpu":
            return benchmark(call, *arguments)

        def and_wait(*arguments):
            result = call(*arguments)
            torch.cuda.synchronize()
            return result

        return benchmark(and_wait, *arguments)

    return run


def unless_refused(kernel, *arguments):
    """Skips with the kernel's reason."""
    if reason := kernel.refuses(*arguments):
        pytest.skip(f"{kernel.name}: {reason}")


@pytest.fixture
def serves():
    return unless_refused
