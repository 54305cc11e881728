"""stream_read: read every byte of a buffer once, for the machine's read bandwidth.

    sum = sum of the buffer as little-endian 64-bit words, modulo 2^64, zeros after its end

The bytes divided by the time are what no kernel that reads a weight from memory can exceed.
"""

import torch
from torch import Tensor

from sparsekern.ops import compiled
from sparsekern.ops.kernel import Kernel, never_refuses


def reference(buffer: Tensor, threads: int) -> int:
    """Sum the words of `buffer`, contiguous, on the CPU; `threads` are torch's own affair.

    Returns the sum, -2^63 .. 2^63 - 1. Raises ValueError for a buffer that is not contiguous or not on the CPU.
    """
    _check(buffer)
    data = buffer.reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(data, (0, -len(data) % 8)).clone().view(torch.int64)
    return int(words.sum())


def _cpu(buffer: Tensor, threads: int) -> int:
    _check(buffer)
    total = compiled.cpu().stream_read(buffer.data_ptr(), buffer.nbytes, threads)
    return total - (1 << 64) if total >> 63 else total


def _cpu_refuses(buffer: Tensor) -> str | None:
    return compiled.why_not("cpu")


def _check(buffer: Tensor) -> None:
    if buffer.device.type != "cpu" or not buffer.is_contiguous():
        raise ValueError(
            f"buffer must be contiguous and on the CPU, got strides {list(buffer.stride())} on {buffer.device}"
        )


KERNELS = (Kernel("cpu", _cpu, _cpu_refuses), Kernel("reference", reference, never_refuses))
