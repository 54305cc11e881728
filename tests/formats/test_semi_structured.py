"""The 2:4 format: its layout written out by hand, round trips, and refused corruptions."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.formats import SemiStructured
from sparsekern.pattern import NM


def pruned(rows, groups, dtype=torch.float32, seed=0):
    weight = torch.randn(rows, 4 * groups, generator=torch.Generator().manual_seed(seed))
    return weight.where(NM(2, 4).mask(weight.abs()), 0.0).to(dtype)


def test_the_layout_is_values_in_order_and_two_positions_a_group_low_bits_first():
    packed = SemiStructured.pack(torch.tensor([[0.0, 5, 0, 6, 7, 8, 0, 0, 0, 0, 1, 2, 3, 0, 4, 0, 0, 9, 9, 0]]))
    assert packed.values.tolist() == [[5, 6, 7, 8, 1, 2, 3, 4, 9, 9]]
    # positions (1, 3) (0, 1) (2, 3) (0, 2), then a second word with (1, 2) and three groups of padding (0, 1)
    first, second = 0b1000_1110_0100_1101, 0b0100_0100_0100_1001
    assert (packed.metadata.int() & 0xFFFF).tolist() == [[first, second]]


def test_a_group_with_fewer_nonzeros_takes_the_lowest_free_positions():
    packed = SemiStructured.pack(torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 7]]))
    assert packed.values.tolist() == [[0, 0, 0, 7]]
    assert packed.metadata.tolist() == [[0b0100_0100_1100_0100]]


@given(
    st.integers(1, 7),
    st.integers(1, 11),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.integers(0, 99),
)
def test_to_dense_gives_back_the_same_bits(rows, groups, dtype, seed):
    weight = pruned(rows, groups, dtype, seed)
    packed = SemiStructured.pack(weight)
    packed.validate()
    assert torch.equal(packed.to_dense(), weight)
    assert packed.shape == weight.shape


@pytest.mark.parametrize("shape", [(5, 0), (0, 8), (0, 0)], ids=str)
def test_a_weight_without_inputs_or_outputs_is_packed_and_comes_back(shape):
    packed = SemiStructured.pack(torch.zeros(shape))
    packed.validate()
    assert torch.equal(packed.to_dense(), torch.zeros(shape))


def test_nbytes_is_nine_sixteenths_of_dense_in_16_bit():
    assert SemiStructured.pack(pruned(8, 32, torch.bfloat16)).nbytes == 8 * 128 * 2 * 9 / 16


def test_negative_zero_becomes_zero():
    packed = SemiStructured.pack(torch.tensor([[-0.0, -0.0, 1.0, -0.0]]))
    assert packed.values.tolist() == [[0.0, 1.0]]
    assert not torch.signbit(packed.to_dense()).any()


def test_a_transposed_weight_packs_as_its_copy():
    weight = pruned(8, 4)
    assert torch.equal(SemiStructured.pack(weight.T.contiguous().T).values, SemiStructured.pack(weight).values)


def test_a_weight_that_is_not_24_is_refused_with_row_and_columns():
    weight = pruned(20, 12)
    weight[12, 40:43] = 1.0
    weight[12, 43] = 0.0
    weight[19, 0:4] = 1.0
    with pytest.raises(
        ValueError, match=r"not 2:4: row 12, columns 40\.\.43 hold 3 nonzeros; .*\(2 groups like this\)"
    ):
        SemiStructured.pack(weight)


def test_a_width_that_four_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="in_features must be a multiple of 4, got 10"):
        SemiStructured.pack(torch.zeros(2, 10))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_are_refused(bad):
    weight = pruned(3, 2)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="weight holds 1 NaN or infinite"):
        SemiStructured.pack(weight)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: {"metadata": p.metadata * 0}, r"positions must ascend: row 0, columns 0\.\.3 have 0, 0"),
        (lambda p: {"metadata": p.metadata[:, :1]}, "metadata must be int16"),
        (lambda p: {"metadata": p.metadata.int()}, "metadata must be int16"),
        (lambda p: {"values": p.values[:, :-1]}, "values must be"),
        (lambda p: {"values": p.values.int()}, "values must be floating point"),
        (lambda p: {"in_features": 22}, "multiple of 4, got 22"),
        (lambda p: {"in_features": 24}, "values must be"),
    ],
)
def test_a_corrupted_weight_is_refused(change, reason):
    packed = SemiStructured.pack(pruned(3, 5))
    with pytest.raises(ValueError, match=reason):
        replace(packed, **change(packed)).validate()


def test_of_all_words_exactly_those_are_valid_whose_positions_ascend():
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    groups = (words.int()[:, None] >> torch.tensor([0, 4, 8, 12])) & 15
    valid = ((groups & 3) < (groups >> 2)).all(dim=1)
    assert valid.sum() == 6**4
    SemiStructured(torch.zeros(6**4, 8), words[valid][:, None], 16).validate()
    for word in words[~valid][::97].tolist():
        with pytest.raises(
            ValueError, match=r"positions must ascend: row 1, columns \d+\.\.\d+ have (\d), (\d)"
        ) as error:
            SemiStructured(torch.zeros(2, 8), torch.tensor([[0x4444], [word]], dtype=torch.int16), 16).validate()
        *_, column, first, second = map(int, re.findall(r"\d+", str(error.value)))
        assert first >= second
        bits = word >> (column - 3) & 15
        assert (bits & 3, bits >> 2) == (first, second)


def test_groups_after_the_last_input_must_be_as_they_are_packed():
    packed = SemiStructured.pack(torch.zeros(2, 4))
    packed.validate()
    with pytest.raises(ValueError, match="positions after input 3 must be 0, 1, got others in row 1"):
        SemiStructured(packed.values, torch.tensor([[0x4444], [0x4484]], dtype=torch.int16), 4).validate()


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 9),
    place=st.integers(0, 10**6),
    word=st.integers(-(2**15), 2**15 - 1),
)
def test_any_metadata_is_refused_or_is_another_2_4_weight(rows, groups, place, word):
    packed = SemiStructured.pack(pruned(rows, groups))
    metadata = packed.metadata.clone()
    metadata.view(-1)[place % metadata.numel()] = word
    changed = replace(packed, metadata=metadata)
    try:
        changed.validate()
    except ValueError:
        return
    dense = changed.to_dense()
    assert ((dense.view(rows, groups, 4) != 0).sum(dim=2) <= 2).all()
    assert torch.equal(dense[dense != 0].sort().values, packed.values[packed.values != 0].sort().values)
