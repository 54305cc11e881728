"""The bitmap format: its layout by hand, the round trip over everything, and corruptions refused in words."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.formats.bitmap import DTYPES, Bitmap


def weight(rows: int, columns: int, density: float = 0.5, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator)
    # a value that rounds to zero is pruned too: keep away from it
    dense += dense.sign()
    return (dense * (torch.rand(rows, columns, generator=generator) < density)).to(dtype)


def test_the_layout_is_rows_of_bits_and_the_kept_values():
    dense = torch.tensor(
        [
            [1.0, 0, 0, 2, 0, 0, 0, 3, 0, 4],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 5, 0, 0, 0, 0, 0, 0, 6, 0],
        ]
    )
    packed = Bitmap.pack(dense)
    assert packed.values.tolist() == [1, 2, 3, 4, 5, 6]
    # low bit first: inputs 0, 3 and 7 are 1 + 8 + 128
    assert packed.bitmap.tolist() == [[137, 2], [0, 0], [2, 1]]
    assert packed.row_offsets.tolist() == [0, 4, 4, 6]
    assert packed.shape == (3, 10)
    assert packed.nbytes == 6 * 4 + 3 * 2 + 4 * 8
    assert torch.equal(packed.to_dense(), dense)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_what_was_packed_comes_back(rows, columns, density, dtype, seed):
    dense = weight(rows, columns, density, dtype, seed)
    packed = Bitmap.pack(dense)
    packed.validate()
    again = packed.to_dense()
    assert again.dtype == packed.dtype == dtype
    assert again.shape == packed.shape == dense.shape
    assert torch.equal(again, dense)
    assert torch.equal(packed.kept(), dense != 0)
    assert packed.values.numel() == int((dense != 0).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_zero_becomes_plus_zero(dtype):
    dense = torch.tensor([[-0.0, 1.0, 0.0, -2.0]], dtype=dtype)
    packed = Bitmap.pack(dense)
    assert packed.values.tolist() == [1.0, -2.0]
    assert not packed.to_dense()[0, [0, 2]].signbit().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_and_the_largest_numbers_are_kept(dtype):
    info = torch.finfo(dtype)
    dense = torch.tensor([[info.max, info.min, info.smallest_normal, info.smallest_normal / 2]], dtype=dtype)
    assert (dense != 0).all()
    assert torch.equal(Bitmap.pack(dense).to_dense(), dense)


def test_a_view_with_any_strides_is_packed():
    dense = weight(12, 20)
    for view in (dense.T, dense[1::2, 3:17], dense[:1].expand(5, 20)):
        assert torch.equal(Bitmap.pack(view).to_dense(), view)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    dense = weight(3, 9)
    dense[2, 5] = bad
    with pytest.raises(ValueError, match="weight holds 1 NaN or infinite values, the first in row 2, column 5"):
        Bitmap.pack(dense)


def test_another_dtype_or_dimension_is_refused():
    with pytest.raises(ValueError, match="must be bfloat16, float16 or float32, got torch.float64"):
        Bitmap.pack(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"must have 2 dimensions, got shape \[4\]"):
        Bitmap.pack(torch.zeros(4))


def corrupt(**changes):
    packed = Bitmap.pack(weight(6, 21))
    return replace(packed, **{name: change(getattr(packed, name).clone()) for name, change in changes.items()})


def set_at(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("corrupted", "message"),
    [
        (corrupt(values=lambda v: v[:-1]), "row_offsets must run from 0 to the"),
        (corrupt(values=lambda v: v.double()), "values must be .* of bfloat16, float16 or float32, got .*float64"),
        (corrupt(values=lambda v: v[None]), r"values must be \[kept\]"),
        (corrupt(row_offsets=lambda r: r + 1), "row_offsets must run from 0 to the"),
        (corrupt(row_offsets=lambda r: r.int()), "row_offsets must be .* of int64, got .*int32"),
        (corrupt(row_offsets=lambda r: r[:0]), "row_offsets must be"),
        (corrupt(row_offsets=set_at(3, -1)), r"row_offsets must not fall, got \[.*, -1\] at row 2"),
        (corrupt(row_offsets=lambda r: r[1:] - r[1]), "bitmap must be .5, 3. of uint8"),
        (corrupt(bitmap=lambda b: b[:, :2]), r"bitmap must be \[6, 3\] of uint8, got \[6, 2\]"),
        (corrupt(bitmap=lambda b: b.char()), "bitmap must be .* of uint8, got .*int8"),
        (corrupt(bitmap=set_at((4, 2), 0b0010_0000)), "bitmap must be 0 after input 20, got ones in row 4"),
        (corrupt(bitmap=lambda b: b ^ torch.tensor([1, 0, 0], dtype=torch.uint8)), "bitmap keeps .* weights in row 0"),
        (corrupt(values=lambda v: v.to("meta")), "must be on one device, got meta, cpu and cpu"),
        (replace(corrupt(), in_features=-1), "in_features must not be negative, got -1"),
        (replace(corrupt(), in_features=30), r"bitmap must be \[6, 4\] of uint8"),
    ],
)
def test_a_corruption_is_refused_in_words(corrupted, message):
    with pytest.raises(ValueError, match=message):
        corrupted.validate()


def test_any_flipped_bit_is_refused():
    packed = Bitmap.pack(weight(5, 13))
    for byte in range(packed.bitmap.numel()):
        for bit in range(8):
            flipped = packed.bitmap.clone()
            flipped.view(-1)[byte] ^= 1 << bit
            with pytest.raises(ValueError, match="bitmap"):
                replace(packed, bitmap=flipped).validate()
