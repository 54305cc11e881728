"""bitmap_panels: the layout by hand, every instruction set against the reference in both directions, lies refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.formats.bitmap import DTYPES, Bitmap
from sparsekern.ops import bitmap_panels, compiled

WHY_NOT = compiled.why_not("cpu")
needs_cpu = pytest.mark.skipif(WHY_NOT is not None, reason=f"sparsekern._cpu: {WHY_NOT}")
SETS = compiled.cpu().bitmap_panels_sets() if WHY_NOT is None else ()
SHAPES = [(1, 1), (7, 37), (37, 7), (16, 32), (17, 33), (100, 257), (33, 513), (50, 1100), (0, 5), (5, 0), (0, 0)]
NAMES = ("values", "bitmap", "row_offsets")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_set = pytest.mark.parametrize("isa", SETS)


def weight(out_features, in_features, density=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    dense = torch.randn(out_features, in_features, generator=generator)
    return (dense * (torch.rand(dense.shape, generator=generator) < density)).to(dtype)


def assert_converts(packed, to_panels, from_panels):
    """Both directions must give the reference's bits."""
    operands, expected = to_panels(packed), bitmap_panels.reference(packed)
    for got, wanted in zip(operands, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    restored = from_panels(operands, *packed.shape)
    restored.validate()
    for name in NAMES:
        assert torch.equal(getattr(restored, name), getattr(packed, name)), name
    assert restored.in_features == packed.in_features


def test_the_layout_is_as_written_in_ops_h():
    dense = torch.zeros(18, 35)
    dense[0, 0], dense[1, 0], dense[0, 1], dense[15, 1] = 1, 2, 3, 4  # panel 0, block 0, mask 0
    dense[2, 31], dense[0, 34], dense[17, 3] = 5, 6, 7
    masks, values, panel_offsets = bitmap_panels.reference(Bitmap.pack(dense))
    assert masks.shape == (2, 2, 16)
    expected = torch.zeros(2, 2, 16, dtype=torch.int64)
    expected[0, 0, 0] = 0b0111 + (1 << 31)  # row 0 inputs 0 and 1, row 1 input 0, row 15 input 1
    expected[0, 0, 15] = 1 << (2 * 2 + 1)
    expected[0, 1, 1] = 1
    expected[1, 0, 1] = 1 << (2 * 1 + 1)
    assert torch.equal(masks.to(torch.int64) & 0xFFFFFFFF, expected)
    assert values.tolist() == [1, 3, 2, 4, 5, 6, 7, *[0] * (bitmap_panels.TAIL_BYTES // 4)]
    assert panel_offsets.tolist() == [0, 6, 7]


@pytest.mark.parametrize("kernel", bitmap_panels.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@dtypes
def test_every_kernel_converts_both_ways(kernel, shape, dtype):
    packed = Bitmap.pack(weight(*shape, dtype=dtype))
    if reason := kernel.refuses(packed.values):
        pytest.skip(reason)
    assert_converts(packed, kernel.run, kernel.restore)


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_converts_both_ways(shape, isa, dtype):
    for density in (0.0, 0.1, 0.5, 1.0):
        assert_converts(
            Bitmap.pack(weight(*shape, density, dtype)),
            lambda packed: bitmap_panels._to_panels_cpu(packed, isa),
            lambda operands, *shape: bitmap_panels._from_panels_cpu(operands, *shape, isa),
        )


@needs_cpu
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 600),
    density=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(SETS or ("",)),
)
def test_any_size_is_converted_both_ways(rows, columns, density, dtype, isa):
    assert_converts(
        Bitmap.pack(weight(rows, columns, density, dtype)),
        lambda packed: bitmap_panels._to_panels_cpu(packed, isa),
        lambda operands, *shape: bitmap_panels._from_panels_cpu(operands, *shape, isa),
    )


@needs_cpu
def test_the_number_of_threads_changes_no_bit():
    packed = Bitmap.pack(weight(700, 300))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert_converts(packed, bitmap_panels.to_panels, bitmap_panels.from_panels)
    finally:
        torch.set_num_threads(before)


def to_panels_of(isa):
    return bitmap_panels.reference if isa is None else lambda packed: bitmap_panels._to_panels_cpu(packed, isa)


def from_panels_of(isa):
    if isa is None:
        return bitmap_panels.reference_inverse
    return lambda operands, *shape: bitmap_panels._from_panels_cpu(operands, *shape, isa)


@pytest.mark.parametrize("isa", [None, *SETS])
@dtypes
def test_a_weight_that_lies_is_refused_in_the_words_of_the_format(isa, dtype):
    packed = Bitmap.pack(weight(100, 257, dtype=dtype))
    offsets, bitmap = packed.row_offsets, packed.bitmap
    lies = [replace(packed, bitmap=torch.full_like(bitmap, 255)), replace(packed, values=packed.values[1:])]
    for row in (1, 15, 16, 50, 99):
        for value in (-1, int(offsets[-1]) + 1, 1 << 62, -(1 << 62), int(offsets[row]) + 1):
            changed = offsets.clone()
            changed[row] = value
            lies.append(replace(packed, row_offsets=changed))
        for byte, bit in ((0, 0), (31, 7), (32, 0), (32, 1), (32, 7)):
            changed = bitmap.clone()
            changed[row, byte] ^= 1 << bit
            lies.append(replace(packed, bitmap=changed))
    for lying in lies:
        with pytest.raises(ValueError, match=".") as expected:
            lying.validate()
        with pytest.raises(ValueError, match=".") as refused:
            to_panels_of(isa)(lying)
        assert str(refused.value) == str(expected.value)


@pytest.mark.parametrize("isa", [None, *SETS])
@dtypes
def test_panels_that_lie_are_refused_by_their_number(isa, dtype):
    restore = from_panels_of(isa)
    masks, values, offsets = bitmap_panels.reference(Bitmap.pack(weight(37, 70, dtype=dtype)))

    def with_mask(place, change):
        changed = masks.clone()
        changed[place] = change(changed[place])
        return changed, values, offsets

    counted = "masks of panel {} must keep as many weights as panel_offsets say, and none after the last row or input"
    for panel in (0, 2):
        with pytest.raises(ValueError, match=counted.format(panel)):
            restore(with_mask((panel, 1, 2), lambda mask: mask ^ 1), 37, 70)
        with pytest.raises(ValueError, match=counted.format(panel)):
            restore(with_mask((panel,), lambda mask: torch.full_like(mask, -1)), 37, 70)

    # a bit of row 5 = output 37, which is not there, in exchange for one that is
    changed = masks.clone()
    for block, q in [(b, q) for b in range(3) for q in range(16)]:
        word = int(changed[2, block, q])
        if word & 1:
            changed[2, block, q] = word ^ 1 ^ (1 << 10)
            break
    with pytest.raises(ValueError, match=counted.format(2)):
        restore((changed, values, offsets), 37, 70)
    # and one of input 70
    changed = masks.clone()
    changed[0, 2, 3] = 1
    taken = int(changed[0, 0, 0])
    changed[0, 0, 0] = taken & (taken - 1) if taken else 0
    with pytest.raises(ValueError, match=counted.format(0)):
        restore((changed, values, offsets), 37, 70)

    falling = offsets.clone()
    falling[1] = falling[2] + 1
    with pytest.raises(ValueError, match="panel_offsets must not fall, panel 1 does"):
        restore((masks, values, falling), 37, 70)
    swapped = offsets.clone()
    swapped[1] -= 1
    with pytest.raises(ValueError, match=counted.format(0)):
        restore((masks, values, swapped), 37, 70)
    for operands in ((masks, values[:-1], offsets), (masks, values, offsets + 1)):
        with pytest.raises(ValueError, match="panel_offsets must run from 0 to the .* kept values"):
            restore(operands, 37, 70)
    for operands, shape in (
        ((masks[:, :2], values, offsets), (37, 70)),
        ((masks.long(), values, offsets), (37, 70)),
        ((masks, values, offsets[:-1]), (37, 70)),
        ((masks, values, offsets), (37, 97)),
        ((masks, values, offsets), (53, 70)),
    ):
        with pytest.raises(ValueError, match="(masks|panel_offsets) must be .* contiguous, got"):
            restore(operands, *shape)


@needs_cpu
def test_with_nothing_compiled_the_reference_serves(monkeypatch):
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no compiler")
    assert_converts(Bitmap.pack(weight(17, 33)), bitmap_panels.to_panels, bitmap_panels.from_panels)
