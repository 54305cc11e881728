"""Long use: 15,000 calls of sparse layers between torch's own, from two threads at once, and memory stays."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.pattern import NM

THREADS = 2
# one output of 32 tokens that is kept at each call would be 12 KB, and 15,000 of them 180 MB
MOST_GROWTH_BYTES = 8 << 20


def resident_bytes():
    """What the process has in memory (Linux)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc here to read the resident memory from")
    return int(statm.read_text().split()[1]) * 4096


def layers():
    """Sparse layers of both formats and two dtypes, one after the other."""
    torch.manual_seed(0)
    made = []
    for format, dtype in ((Bitmap, torch.bfloat16), (Bitmap, torch.float32), (SemiStructured, torch.float32)):
        linear = nn.Linear(200, 192, dtype=dtype).requires_grad_(False)
        linear.weight.mul_(NM(2, 4).mask(linear.weight.abs().float()))
        made.append(sk.SparseLinear.from_linear(linear, format))
    return made


def call(calls):
    """Make so many calls from two threads; returns by how many bytes the process grew over the last three quarters.

    Every output must have the bits of the first one for the same layer and tokens.
    """
    sparse, dense = layers(), nn.Linear(192, 200)
    inputs = [torch.randn(tokens, 200) for tokens in (1, 3, 8, 32)]
    expected = {(at, len(x)): layer(x.to(layer.weight.dtype)) for at, layer in enumerate(sparse) for x in inputs}
    wrong, sizes = [], []
    barrier = threading.Barrier(THREADS, action=lambda: sizes.append(resident_bytes()), timeout=300)

    def work(thread):
        with torch.inference_mode():
            for number in range(calls // THREADS):
                at, x = (number + thread) % len(sparse), inputs[number // 3 % len(inputs)]
                y = sparse[at](x.to(expected[at, len(x)].dtype))
                if not torch.equal(y, expected[at, len(x)]):
                    wrong.append((thread, number))
                # torch's own threads, oneDNN and MKL among them, between ours
                torch.softmax(dense(y.float()) @ x.T, dim=-1).sum()
                if number in (calls // THREADS // 4, calls // THREADS - 1):
                    barrier.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    return sizes[1] - sizes[0]


def test_15_000_calls_change_no_bit_and_keep_no_memory():
    assert call(15_000) < MOST_GROWTH_BYTES
