"""The int8 bitmap format: its layout by hand, what rounding loses, what lies on a grid, and corruptions refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern import grid
from sparsekern.formats.bitmap import DTYPES
from sparsekern.formats.bitmap_int8 import BitmapInt8


def weight(rows, columns, density=0.5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    return (torch.randn(rows, columns, generator=generator) * kept).to(dtype)


def test_the_layout_is_rows_of_bits_the_kept_integers_and_a_scale_a_row():
    dense = torch.tensor([[254.0, 0, 0, -2, 0, 0, 0, 6, 0, 0.4], [0.0] * 10, [0, 63.5, 0, 0, 0, 0, 0, 0, -0.5, -0.0]])
    packed = BitmapInt8.pack(dense)
    # 0.4 is nearer to 0 than to a step of 2
    assert packed.values.tolist() == [127, -1, 3, 127, -1]
    assert packed.scales.tolist() == [[2.0], [0.0], [0.5]]
    # low bit first: inputs 0, 3 and 7 are 1 + 8 + 128
    assert packed.bitmap.tolist() == [[137, 0], [0, 0], [2, 1]]
    assert packed.row_offsets.tolist() == [0, 3, 3, 5]
    assert packed.shape == (3, 10)
    assert packed.nbytes == 5 + 3 * 4 + 3 * 2 + 4 * 8
    dense[0, 9] = 0
    assert torch.equal(packed.to_dense(), dense + 0.0)
    assert not (packed.to_dense() == 0).logical_and(packed.to_dense().signbit()).any()


def test_a_group_of_inputs_has_its_own_scale_and_the_last_may_be_shorter():
    dense = torch.tensor([[127.0, 1, 12.7, 0.1, 254], [0, 0, 0, 127, 0]])
    packed = BitmapInt8.pack(dense, group_size=2)
    # a weight that is alone in its group is one step
    assert packed.values.tolist() == [127, 1, 127, 1, 1, 1]
    torch.testing.assert_close(packed.scales, torch.tensor([[1, 0.1, 254], [0, 127, 0]]))
    torch.testing.assert_close(packed.to_dense(), dense)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 20),
    columns=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    group_size=st.sampled_from([None, 1, 7, 64, 100]),
    seed=st.integers(0, 1000),
)
def test_what_was_packed_comes_back_to_half_a_step(rows, columns, density, dtype, group_size, seed):
    dense = weight(rows, columns, density, dtype, seed)
    packed = BitmapInt8.pack(dense, group_size)
    packed.validate()
    again = packed.to_dense()
    assert (again.dtype, again.shape, packed.dtype, packed.shape) == (dtype, dense.shape, dtype, dense.shape)
    assert torch.equal(packed.kept(), packed.dequantised() != 0)
    assert not ((again != 0) & (dense == 0)).any()
    scales = packed.scales.repeat_interleave(group_size or max(columns, 1), dim=1)[:, :columns]
    # half a step, and the rounding of the division
    assert ((packed.dequantised() - dense.float()).abs() <= scales * 0.50001).all()
    # rounding what was rounded changes nothing more
    twice = BitmapInt8.pack(packed.dequantised(), group_size)
    assert torch.equal(twice.dequantised(), packed.dequantised())


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_on_a_grid_keeps_its_integers(dtype, bits, group_size):
    """As GPTQ and SparseGPT leave it; bfloat16 has 8 bits itself, in which a grid of 8 bits is lost."""
    pruned = weight(100, 96, seed=3)
    size = group_size or 96
    largest = grid.levels(bits)
    groups = pruned.view(-1, size)
    scale = grid.best_scale(groups, torch.ones(size), largest)
    quantised = grid.nearest(groups, scale[:, None], largest).view(pruned.shape)
    integers = (quantised.view(-1, size) / scale[:, None]).where(scale[:, None] > 0, 0.0).round().view(pruned.shape)
    packed = BitmapInt8.pack(quantised.to(dtype), group_size)
    if dtype == torch.bfloat16 and bits == 8:
        assert (packed.dequantised() - quantised).norm() < 5e-3 * quantised.norm()
        return
    assert torch.equal(packed.to_dense(), quantised.to(dtype))
    # the integers themselves, or where all of a group have a divisor, those without it
    factor = integers[quantised != 0] / packed.values
    groups_of = torch.arange(len(groups)).repeat_interleave(size).view(pruned.shape)[quantised != 0]
    for group in groups_of.unique():
        assert len(factor[groups_of == group].unique()) == 1
    assert (factor == factor.round()).all()
    assert (factor == 1).float().mean() > 0.9


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-45, 0.0], [3e38, -3e38], [1e-38, 1e-40]], ids=str)
def test_the_smallest_and_the_largest_weights_are_packed(values):
    packed = BitmapInt8.pack(torch.tensor([values]))
    packed.validate()
    assert packed.dequantised().isfinite().all()
    assert (packed.dequantised() - torch.tensor([values])).abs().max() <= max(abs(v) for v in values) / 254 + 1e-44


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    dense = torch.ones(3, 4)
    dense[2, 1] = bad
    with pytest.raises(ValueError, match="weight holds 1 NaN or infinite values, the first in row 2, column 1"):
        BitmapInt8.pack(dense)


@pytest.mark.parametrize(
    ("dense", "group_size", "message"),
    [
        (torch.ones(3), None, r"weight must have 2 dimensions, got shape \[3\]"),
        (torch.ones(3, 3, dtype=torch.int32), None, "weight must be bfloat16, float16 or float32, got torch.int32"),
        (torch.ones(3, 3), 0, "group_size must be at least 1 or None, got 0"),
    ],
    ids=["dimensions", "dtype", "group_size"],
)
def test_what_is_no_weight_is_refused(dense, group_size, message):
    with pytest.raises(ValueError, match=message):
        BitmapInt8.pack(dense, group_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"values": p.values.short()}, r"values must be \[kept\] of int8"),
        (lambda p: {"values": p.values[1:]}, "row_offsets must run from 0 to the"),
        (lambda p: {"values": torch.full_like(p.values, -128)}, "values must be -127 to 127, got -128"),
        (lambda p: {"scales": p.scales.double()}, r"scales must be \[7, 2\] of float32, got \[7, 2\] of torch.float64"),
        (lambda p: {"scales": p.scales[:, :1]}, r"scales must be \[7, 2\] of float32, got \[7, 1\]"),
        (lambda p: {"scales": p.scales * float("nan")}, "scales must be finite and not negative, got nan in row 0"),
        (lambda p: {"scales": -1 - p.scales}, "scales must be finite and not negative"),
        (lambda p: {"group_size": None}, r"scales must be \[7, 1\] of float32"),
        (lambda p: {"group_size": -1}, "group_size must be at least 1 or None, got -1"),
        (lambda p: {"dtype": torch.int8}, "dtype must be bfloat16, float16 or float32, got torch.int8"),
        (lambda p: {"bitmap": p.bitmap[:, 1:]}, r"bitmap must be \[7, 5\] of uint8"),
        (lambda p: {"bitmap": p.bitmap ^ 1}, "bitmap keeps .* weights in row"),
        (lambda p: {"row_offsets": p.row_offsets.int()}, r"row_offsets must be \[out_features \+ 1\] of int64"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(change, message):
    packed = BitmapInt8.pack(weight(7, 37), 20)
    with pytest.raises(ValueError, match=message):
        replace(packed, **change(packed)).validate()


def test_another_dtype_keeps_integers_and_scales():
    packed = BitmapInt8.pack(weight(7, 37))
    moved = packed.to("cpu", torch.bfloat16)
    assert moved.to_dense().dtype == torch.bfloat16
    assert torch.equal(moved.values, packed.values)
    assert torch.equal(moved.scales, packed.scales)
