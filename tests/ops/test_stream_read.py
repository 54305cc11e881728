"""stream_read: every byte counts, at every size and alignment."""

import pytest
import torch

from sparsekern.ops import compiled, stream_read
from sparsekern.ops.kernel import pick

KERNELS = [k for k in stream_read.KERNELS if k.name == "reference" or compiled.why_not(k.name) is None]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 65, 1000, 4099])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_sum_is_that_of_the_words(kernel, size, threads):
    buffer = torch.randint(0, 256, (size + 3,), dtype=torch.uint8)[3:]
    data = bytes(buffer.tolist())
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, size, 8)]
    assert kernel.run(buffer, threads) % 2**64 == sum(words) % 2**64


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_changing_any_byte_changes_the_sum(kernel):
    buffer = torch.zeros(201, dtype=torch.uint8)
    for byte in range(len(buffer)):
        buffer[byte] = 1
        assert kernel.run(buffer, 2) != 0
        buffer[byte] = 0


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_any_dtype_and_shape_is_read(kernel):
    buffer = torch.randn(37, 100).bfloat16()
    assert kernel.run(buffer, 2) == stream_read.reference(buffer.view(torch.uint8).flatten(), 1)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_a_buffer_with_holes_is_refused(kernel):
    with pytest.raises(ValueError, match="buffer must be contiguous and on the CPU, got strides"):
        kernel.run(torch.zeros(4, 4)[:, ::2], 1)


def test_without_the_compiled_module_the_reference_serves(monkeypatch):
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no compiler")
    assert pick(stream_read.KERNELS, torch.zeros(3)).name == "reference"


@pytest.mark.skipif(compiled.cpu() is None, reason=str(compiled.why_not("cpu")))
def test_impossible_sizes_are_refused():
    buffer = torch.zeros(8)
    with pytest.raises(ValueError, match="threads must be positive, got 0"):
        compiled.cpu().stream_read(buffer.data_ptr(), 32, 0)
    with pytest.raises(ValueError, match="bytes must not be negative, got -8"):
        compiled.cpu().stream_read(buffer.data_ptr(), -8, 1)
