"""bitmap_rows: every instruction set packs, unpacks and refuses as Bitmap does."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern import ops
from sparsekern.formats import SemiStructured
from sparsekern.formats.bitmap import DTYPES, Bitmap
from sparsekern.ops import bitmap_rows, compiled

WHY_NOT = compiled.why_not("cpu")
needs_cpu = pytest.mark.skipif(WHY_NOT is not None, reason=f"sparsekern._cpu: {WHY_NOT}")
SETS = compiled.cpu().bitmap_rows_sets() if WHY_NOT is None else ()
SHAPES = [(1, 1), (7, 37), (37, 7), (3, 64), (16, 31), (100, 257), (129, 1000), (0, 5), (5, 0), (0, 0)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_set = pytest.mark.parametrize("isa", SETS)


def weight(out_features, in_features, density=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    dense = torch.randn(out_features, in_features, generator=generator)
    return (dense * (torch.rand(dense.shape, generator=generator) < density)).to(dtype)


def assert_same(packed, expected):
    for name in ("values", "bitmap", "row_offsets"):
        got, wanted = getattr(packed, name), getattr(expected, name)
        assert got.dtype == wanted.dtype, name
        # the bits, so that NaN and -0.0 count
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)), name
    assert packed.in_features == expected.in_features


@pytest.mark.parametrize("kernel", bitmap_rows.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@dtypes
def test_every_kernel_packs_as_the_format_does(kernel, shape, density, dtype):
    dense = weight(*shape, density, dtype)
    if reason := kernel.refuses(dense):
        pytest.skip(reason)
    assert_same(kernel.run(dense), Bitmap.pack(dense))


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_packs_unpacks_and_validates(shape, isa, dtype):
    for density in (0.0, 0.1, 0.5, 1.0):
        dense = weight(*shape, density, dtype)
        packed = bitmap_rows._pack_cpu(dense, isa)
        assert_same(packed, Bitmap.pack(dense))
        bitmap_rows.validate(packed, isa)
        assert torch.equal(bitmap_rows.to_dense(packed, isa), packed.to_dense())


@needs_cpu
@every_set
@dtypes
def test_minus_zero_is_pruned_and_every_other_finite_number_is_kept(isa, dtype):
    info = torch.finfo(dtype)
    dense = torch.tensor([[-0.0, info.max, info.min, 0.0, info.smallest_normal, -info.smallest_normal / 2]]).to(dtype)
    packed = bitmap_rows._pack_cpu(dense, isa)
    assert packed.values.tolist() == dense[0, [1, 2, 4, 5]].tolist()
    assert not bitmap_rows.to_dense(packed, isa)[0, [0, 3]].signbit().any()


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 31, 32, 36])
def test_a_weight_that_is_not_finite_is_refused(column, bad, isa, dtype):
    dense = weight(7, 37, dtype=dtype)
    dense[5, column] = bad
    with pytest.raises(ValueError, match=f"holds 1 NaN or infinite values, the first in row 5, column {column}"):
        bitmap_rows._pack_cpu(dense, isa)


@needs_cpu
@every_set
def test_a_view_with_any_strides_is_packed(isa):
    dense = weight(40, 70)
    views = (dense.T, dense[1::2, 3:66], dense[:1].expand(5, 70), dense[:, :1].expand(40, 9), dense[3:3], dense[:, 4:4])
    for view in views:
        assert_same(bitmap_rows._pack_cpu(view, isa), Bitmap.pack(view))


def test_what_no_compiled_kernel_takes_goes_to_the_reference_and_is_refused_there():
    with pytest.raises(ValueError, match="must be bfloat16, float16 or float32, got torch.float64"):
        bitmap_rows.pack(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"must have 2 dimensions, got shape \[4\]"):
        bitmap_rows.pack(torch.zeros(4))


def test_with_nothing_compiled_the_format_serves(monkeypatch):
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no compiler")
    dense = weight(7, 37)
    packed = ops.pack(dense, Bitmap)
    ops.validate(packed)
    assert torch.equal(ops.to_dense(packed), dense)
    lying = replace(packed, bitmap=packed.bitmap ^ 1)
    for refuses in (ops.validate, ops.to_dense):
        with pytest.raises(ValueError, match="bitmap keeps .* weights in row 0"):
            refuses(lying)


def test_a_format_without_a_conversion_of_its_own_converts_itself():
    dense = torch.tensor([[1.0, 0, 0, 2], [0, 3, 0, 4]])
    packed = ops.pack(dense, SemiStructured)
    ops.validate(packed)
    assert torch.equal(ops.to_dense(packed), dense)


def lies(packed):
    """`packed` with one lie each, and what Bitmap.validate says of it."""
    row = packed.shape[0] // 2
    offsets, bitmap = packed.row_offsets, packed.bitmap
    for value in (-1, int(offsets[-1]) + 1, 1 << 62, -(1 << 62)):
        changed = offsets.clone()
        changed[row] = value
        yield replace(packed, row_offsets=changed)
    changed = offsets.clone()
    changed[row] += 1
    yield replace(packed, row_offsets=changed)
    yield replace(packed, row_offsets=offsets + 1)
    yield replace(packed, row_offsets=offsets[:-1])
    yield replace(packed, values=packed.values[:-1])
    yield replace(packed, values=torch.cat([packed.values, packed.values[:1]]))
    for bit in (0, 7):
        changed = bitmap.clone()
        changed[row, -1] ^= 1 << bit
        yield replace(packed, bitmap=changed)
    yield replace(packed, bitmap=torch.full_like(bitmap, 255))
    yield replace(packed, bitmap=torch.zeros_like(bitmap))
    yield replace(packed, bitmap=bitmap[:, :-1])
    yield replace(packed, in_features=packed.in_features + 64)
    yield replace(packed, in_features=-1)


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("shape", [(7, 37), (100, 257)], ids=str)
def test_every_lie_is_refused_in_the_words_of_the_format(shape, isa, dtype):
    for lying in lies(Bitmap.pack(weight(*shape, dtype=dtype))):
        with pytest.raises(ValueError, match=".") as expected:
            lying.validate()
        for refuses in (bitmap_rows.validate, bitmap_rows.to_dense):
            with pytest.raises(ValueError, match=".") as refused:
                refuses(lying, isa)
            assert str(refused.value) == str(expected.value)


@needs_cpu
def test_every_flipped_bit_is_found():
    packed = Bitmap.pack(weight(5, 70))
    for isa in SETS:
        for byte in range(packed.bitmap.numel()):
            for bit in range(8):
                flipped = packed.bitmap.clone()
                flipped.view(-1)[byte] ^= 1 << bit
                with pytest.raises(ValueError, match="bitmap"):
                    bitmap_rows.validate(replace(packed, bitmap=flipped), isa)


@needs_cpu
def test_the_first_wrong_row_is_told_whatever_the_number_of_threads():
    packed = Bitmap.pack(weight(3000, 900))
    flipped = packed.bitmap.clone()
    flipped[[1234, 2345], 5] ^= 1
    lying = replace(packed, bitmap=flipped)
    for isa in SETS:
        for threads in (1, 2, 5):
            assert compiled.cpu().check_bitmap(bitmap_rows.rows(lying), threads, isa) == 1234
            assert compiled.cpu().check_bitmap(bitmap_rows.rows(packed), threads, isa) == -1


@needs_cpu
def test_the_number_of_threads_changes_no_bit():
    dense = weight(1500, 900)
    before, expected = torch.get_num_threads(), Bitmap.pack(dense)
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            for isa in SETS:
                packed = bitmap_rows._pack_cpu(dense, isa)
                assert_same(packed, expected)
                assert torch.equal(bitmap_rows.to_dense(packed, isa), dense)
    finally:
        torch.set_num_threads(before)


@needs_cpu
def test_parts_that_are_not_contiguous_are_refused():
    packed = Bitmap.pack(weight(7, 37))
    with pytest.raises(ValueError, match=r"bitmap must be contiguous, got strides \[1, 7\]"):
        bitmap_rows.validate(replace(packed, bitmap=packed.bitmap.T.contiguous().T))


@needs_cpu
def test_sizes_that_do_not_fit_are_refused_by_the_binding():
    packed, cpu = Bitmap.pack(weight(7, 37)), compiled.cpu()
    rows = bitmap_rows.rows(packed)
    with pytest.raises(ValueError, match="dense must hold out_features \\* in_features elements, got 258"):
        cpu.bitmap_to_dense(rows, 0, 258, 1)
    with pytest.raises(ValueError, match="values must hold .* elements, got 0"):
        cpu.dense_to_values(rows, 0, 37, 0, 0, 1)
    with pytest.raises(ValueError, match="bitmap must hold out_features rows, got 34 bytes"):
        cpu.dense_to_bits("float32", 0, 37, 7, 37, 0, 34, 0, 8, 1)
    with pytest.raises(ValueError, match="row_offsets must hold 8 offsets, got 7"):
        cpu.dense_to_bits("float32", 0, 37, 7, 37, 0, 35, 0, 7, 1)
    with pytest.raises(ValueError, match="in_features is impossible: "):
        cpu.dense_to_bits("float32", 0, 37, 7, 1 << 60, 0, 35, 0, 8, 1)
    with pytest.raises(ValueError, match="threads must be positive, got 0"):
        cpu.check_bitmap(rows, 0)
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16 or float32, got int8"):
        cpu.BitmapRows("int8", 0, 0, 0, 0, 0, 1, 0, 5)


@needs_cpu
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 140),
    density=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(SETS or ("",)),
)
def test_any_size_is_packed_as_the_format_does(rows, columns, density, dtype, isa):
    dense = weight(rows, columns, density, dtype)
    packed = bitmap_rows._pack_cpu(dense, isa)
    assert_same(packed, Bitmap.pack(dense))
    assert torch.equal(bitmap_rows.to_dense(packed, isa), dense + 0.0)


@needs_cpu
@given(
    field=st.sampled_from(["values", "bitmap", "row_offsets"]),
    place=st.integers(0, 10**6),
    value=st.integers(-(2**63), 2**63 - 1),
    shape=st.sampled_from([(1, 1), (7, 37), (20, 64)]),
    isa=st.sampled_from(SETS or ("",)),
)
def test_any_change_is_refused_or_is_another_weight(field, place, value, shape, isa):
    """Every kernel judges as the format does, and what passes holds as many values as bits."""
    packed = Bitmap.pack(weight(*shape))
    changed = getattr(packed, field).clone()
    raw = changed.view(-1).view(torch.uint8)
    if not len(raw):
        return
    at = place % len(raw)
    raw[at : at + 8] = torch.tensor([value]).view(torch.uint8)[: len(raw[at : at + 8])]
    changed = replace(packed, **{field: changed})

    def refusal(validate, *args):
        try:
            validate(*args)
        except ValueError as error:
            return str(error)

    refused = refusal(changed.validate)
    assert refusal(bitmap_rows.validate, changed, isa) == refused
    if refused:
        return
    dense = bitmap_rows.to_dense(changed, isa)
    # the bits, so that NaN among the values counts
    assert torch.equal(dense[changed.kept()].view(torch.int32), changed.values.view(torch.int32))
    assert not dense[~changed.kept()].any()
