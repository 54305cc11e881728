"""Where the tests of this folder run: on the CPU, whose kernels stand in so that a test is known to be right, and on
two cards, the second of which is not the current one.
"""

import pytest
import torch

from sparsekern.ops import LINEAR_KERNELS, pack, to_dense
from tests.on_card.subjects import weight_of


@pytest.fixture(params=["cpu", "cuda:0", "cuda:1"])
def place(request):
    """A device; skips where it is not there."""
    return there(request.param)


@pytest.fixture(params=["cuda:0", "cuda:1"])
def card(request):
    """A CUDA device; skips where it is not there."""
    return there(request.param)


def there(name):
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if device.index >= torch.cuda.device_count():
            pytest.skip(f"this machine has {torch.cuda.device_count()} card")
    return device


@pytest.fixture(
    params=[(format, kernel) for format, kernels in LINEAR_KERNELS.items() for kernel in kernels[:-1]],
    ids=lambda pair: f"{pair[0].name} {pair[1].name}",
)
def subject(request):
    """A format and a kernel that serves it; the last one of each is its reference."""
    return request.param


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def prepared(subject, place, dtype):
    """A function of a shape: the dense weight, the kernel and what it reads; skips where the kernel refuses."""
    format, kernel = subject

    def make(*shape, dtype=dtype):
        packed = pack(weight_of(shape, format, dtype, place), format)
        if reason := kernel.refuses(packed):
            pytest.skip(f"{kernel.name}: {reason}")
        # what the format holds: integers are not what was packed
        return to_dense(packed), kernel, kernel.prepare(packed)

    return make
