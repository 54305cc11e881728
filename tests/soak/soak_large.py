"""Weights of more than 2^31 elements, and of more than 2^31 kept ones: no index in 32 bits is wide enough.

Each test says how much memory it needs and is skipped where there is less.
"""

import gc
from pathlib import Path

import pytest
import torch

from sparsekern.formats import Bitmap
from sparsekern.formats.bitmap import popcount, unpack_bits
from sparsekern.ops import LINEAR_KERNELS
from sparsekern.ops.kernel import pick
from sparsekern.pattern import NM, Unstructured

ELEMENTS = 1 << 31
COLUMNS = 1 << 15
# the row in which the 2^31st element lies is the last but 37th
ROWS = ELEMENTS // COLUMNS + 37


def needs(gigabytes):
    """Skip where less memory is free (Linux)."""
    facts = Path("/proc/meminfo")
    free = int(facts.read_text().partition("MemAvailable:")[2].split()[0]) / 1e6 if facts.exists() else 0
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of memory, {free:.0f} are free")


@pytest.fixture(autouse=True)
def _memory_is_not_filled_and_given_back():
    # tests/conftest.py fills what torch.empty gives, which takes its time here
    torch.use_deterministic_algorithms(False)
    yield
    gc.collect()


def repeated(size, seed):
    """`size` numbers that repeat after a prime number of them, so that no power of two falls on its like."""
    part = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return part.repeat(-(-size // len(part)))[:size]


def packed_weight(kept_bytes):
    """A Bitmap of ROWS x COLUMNS made without its dense weight, the bytes of its bitmap drawn by `kept_bytes`."""
    bitmap = torch.empty(ROWS, COLUMNS // 8, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    for rows in bitmap.split(4096):
        rows.copy_(kept_bytes(rows.shape, generator))
    row_offsets = torch.zeros(ROWS + 1, dtype=torch.int64)
    counts = torch.cat([popcount(rows).sum(dim=1) for rows in bitmap.split(4096)])
    torch.cumsum(counts, dim=0, out=row_offsets[1:])
    return Bitmap(repeated(int(row_offsets[-1]), seed=2), bitmap, row_offsets, COLUMNS)


def row(packed, number):
    """One row of the weight in float64, from the canonical format."""
    start, end = packed.row_offsets[number : number + 2].tolist()
    dense = torch.zeros(COLUMNS, dtype=torch.float64)
    dense[unpack_bits(packed.bitmap[number], COLUMNS)] = packed.values[start:end].double()
    return dense


def one_in_eight(shape, generator):
    drawn = (torch.randint(256, shape, dtype=torch.uint8, generator=generator) for _ in range(3))
    return next(drawn) & next(drawn) & next(drawn)


def all_of_them(shape, generator):
    return torch.full(shape, 255, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kept_bytes", "gigabytes"), [(one_in_eight, 6), (all_of_them, 13)], ids=["elements", "kept elements"]
)
def test_a_packed_weight_past_2_to_the_31_is_multiplied_and_comes_back(kept_bytes, gigabytes):
    needs(gigabytes)
    packed = packed_weight(kept_bytes)
    assert packed.shape.numel() > ELEMENTS
    assert kept_bytes is one_in_eight or len(packed.values) > ELEMENTS
    packed.validate()
    kernel = pick(LINEAR_KERNELS[Bitmap], packed)
    if kernel.name == "reference":
        pytest.skip("no compiled kernel here, and the reference rebuilds the weight")
    operands = kernel.prepare(packed)
    rows = [0, 1, 15, 16, ROWS // 2, ROWS - 38, ROWS - 37, ROWS - 36, ROWS - 1]
    weight = torch.stack([row(packed, number) for number in rows])
    for tokens in (1, 3):
        x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        y = kernel.run(x, operands, None, ROWS, COLUMNS)
        exact = x.double() @ weight.T
        assert (y[:, rows].double() - exact).norm() <= 1e-2 * exact.norm()
        assert y.isfinite().all()
    if kept_bytes is one_in_eight:
        bitmap, values = packed.bitmap, packed.values
        del packed
        back = kernel.restore(operands, ROWS, COLUMNS)
        assert torch.equal(back.bitmap, bitmap)
        assert torch.equal(back.values.view(torch.int16), values.view(torch.int16))


def test_a_weight_past_2_to_the_31_is_packed():
    """One row, seen again and again: the weight itself takes no memory."""
    needs(16)
    kept = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(3)) < 0.01
    line = repeated(COLUMNS, seed=4).where(kept, 0.0)
    packed = Bitmap.pack(line.expand(ROWS, COLUMNS))
    packed.validate()
    assert len(packed.values) == ROWS * int((line != 0).sum())
    for number in (0, ROWS // 2, ROWS - 38, ROWS - 37, ROWS - 1):
        assert torch.equal(row(packed, number), line.double())


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "row")], ids=str)
def test_more_than_2_to_the_31_weights_are_ranked(pattern):
    # the positions of the best two of four are 64 bits each
    needs(20 if isinstance(pattern, NM) else 13)
    saliency = torch.rand(1, COLUMNS, generator=torch.Generator().manual_seed(5))
    want = pattern.mask(saliency)[0]
    mask = pattern.mask(saliency.expand(ROWS, COLUMNS))
    assert mask.shape == (ROWS, COLUMNS)
    for rows in mask.split(4096):
        assert bool((rows == want).all())
