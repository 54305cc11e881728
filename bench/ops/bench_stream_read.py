"""stream_read: as much memory as fits no cache, read once."""

import pytest
import torch

from sparsekern.ops import stream_read


@pytest.mark.parametrize("kernel", stream_read.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("size", [1 << 12, 1 << 25], ids=["tiny", "large"])
def test_stream_read(benchmark, serves, kernel, size):
    buffer = torch.ones(size, dtype=torch.float64)
    serves(kernel, buffer)
    benchmark(kernel.run, buffer, torch.get_num_threads())
