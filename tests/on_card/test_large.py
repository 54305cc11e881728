"""More than 2^31 elements: of the weight, of its kept values, of x and of y. On a card only, where there is memory.

The packed parts are drawn as they are, never a dense weight: what is compared are some rows in float64.
"""

import pytest
import torch

from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.formats.bitmap import popcount
from sparsekern.ops import LINEAR_KERNELS
from tests.on_card.subjects import assert_is_linear

ABOVE = (1 << 31) + (1 << 14)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def _no_poison():
    """Filling gigabytes with NaN at every step takes longer than the test."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.cuda.empty_cache() if torch.cuda.is_available() else None


def needs(device, gibibytes):
    free, _ = torch.cuda.mem_get_info(device)
    if free < gibibytes * GIB:
        pytest.skip(f"it needs {gibibytes} GiB of the card's memory, {free / GIB:.0f} are free")


def prepare(kernel, packed):
    """Some kernels go through the dense weight, and tensors of it that are larger."""
    try:
        return kernel.prepare(packed)
    except torch.OutOfMemoryError:
        pytest.skip(f"{kernel.name}: preparing it takes more memory than the card has")


def semi_structured(out_features, in_features, device):
    """Random values at random positions."""
    values = torch.empty(out_features, in_features // 2, dtype=torch.bfloat16, device=device).uniform_(0.5, 1.5)
    # a byte of the metadata is two groups: 0b0100, 0b1000, 0b1001, 0b1100, 0b1101 and 0b1110 are the six pairs
    pairs = torch.tensor([0x4, 0x8, 0x9, 0xC, 0xD, 0xE], dtype=torch.uint8, device=device)
    both = (pairs[:, None] << 4 | pairs).flatten()
    drawn = torch.randint(36, (out_features, in_features // 8), dtype=torch.uint8, device=device)
    metadata = torch.cat([both[part.int()] for part in drawn.split(8192)]).view(torch.int16)
    return SemiStructured(values, metadata, in_features)


def bitmap(out_features, in_features, device):
    """Every input kept with even chance."""
    bits = torch.randint(256, (out_features, in_features // 8), dtype=torch.uint8, device=device)
    counts = torch.cat([popcount(part).sum(dim=1) for part in bits.split(8192)])
    row_offsets = torch.zeros(out_features + 1, dtype=torch.int64, device=device)
    row_offsets[1:] = counts.cumsum(0)
    values = torch.empty(int(row_offsets[-1]), dtype=torch.bfloat16, device=device).uniform_(0.5, 1.5)
    return Bitmap(values, bits, row_offsets, in_features)


def rows_of(packed, rows):
    """Some neighbouring rows of a packed weight, dense."""
    if isinstance(packed, SemiStructured):
        return SemiStructured(packed.values[rows], packed.metadata[rows], packed.in_features).to_dense()
    offsets = packed.row_offsets[rows.start : rows.stop + 1]
    values = packed.values[offsets[0] : offsets[-1]]
    return Bitmap(values, packed.bitmap[rows], offsets - offsets[0], packed.in_features).to_dense()


def parts(size, width=40):
    return [slice(0, width), slice(size // 2, size // 2 + width), slice(size - width, size)]


KERNELS = pytest.mark.parametrize(
    ("make", "kernel"),
    [(semi_structured, kernel) for kernel in LINEAR_KERNELS[SemiStructured][:-1]]
    + [(bitmap, kernel) for kernel in LINEAR_KERNELS[Bitmap][:-1]],
    ids=lambda value: getattr(value, "__name__", None) or value.name,
)


@KERNELS
def test_a_weight_whose_kept_values_are_more_than_2_31(make, kernel, card):
    needs(card, 30)
    # every second of 2^32 is kept, give or take; the rows of a bitmap are not all as long
    in_features, out_features = 1 << 14, 2 * ABOVE // (1 << 14) + (64 if make is bitmap else 0)
    packed = make(out_features, in_features, card)
    assert packed.values.numel() > 1 << 31
    if reason := kernel.refuses(packed):
        pytest.skip(f"{kernel.name}: {reason}")
    operands = prepare(kernel, packed)
    for tokens in (1, 9):
        x = torch.randn(tokens, in_features, device=card).bfloat16()
        y = kernel.run(x, operands, None, out_features, in_features)
        assert y.isfinite().all()
        for rows in parts(out_features):
            assert_is_linear(y[:, rows], x, rows_of(packed, rows))


@KERNELS
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features"),
    [(ABOVE // 8192, 8192, 64), (ABOVE // 8192, 64, 8192)],
    ids=["outputs", "inputs"],
)
def test_inputs_and_outputs_of_more_than_2_31(make, kernel, card, tokens, out_features, in_features):
    needs(card, 30)
    packed = make(out_features, in_features, card)
    if reason := kernel.refuses(packed):
        pytest.skip(f"{kernel.name}: {reason}")
    x = torch.randn(tokens, in_features, device=card, dtype=torch.bfloat16)
    y = kernel.run(x, prepare(kernel, packed), None, out_features, in_features)
    assert max(x.numel(), y.numel()) > 1 << 31
    weight = rows_of(packed, slice(0, out_features))
    for some in parts(tokens):
        assert_is_linear(y[some], x[some], weight)


@pytest.mark.parametrize("make", [semi_structured, bitmap], ids=lambda make: make.__name__)
def test_what_is_drawn_here_is_a_weight(make):
    """On the CPU, and small: the parts are valid, and the rows that are compared are its rows."""
    packed = make(96, 64, "cpu")
    packed.validate()
    dense = packed.to_dense()
    assert 0.4 < float((dense != 0).float().mean()) < 0.6
    for rows in parts(96):
        assert torch.equal(rows_of(packed, rows), dense[rows])
