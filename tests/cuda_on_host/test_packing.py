"""csrc/cuda/pack_24.cu and bitmap_rows.cu without a card: every line runs on the CPU.

The ops above them run too, as they would on a card (conftest.py). tests/ops has what holds for every kernel.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import bitmap_fragments, bitmap_rows, compiled, fragments_24, pack_24
from tests.cuda_on_host.emulator import ORDERS
from tests.cuda_on_host.weights import assert_same, says, told, weight_24, weight_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# less and more than eight weights, a stretch of a warp, a block's; with and without a multiple of eight and of sixteen
SHAPES_24 = [(1, 4), (3, 40), (2, 1012), (9, 64), (2, 2064), (1, 4232), (0, 8), (3, 0)]
SHAPES = [(1, 1), (7, 37), (3, 64), (2, 1025), (2, 4112), (1, 9001), (0, 5), (3, 0)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("shape", SHAPES_24, ids=str)
def test_a_2_4_weight_is_packed_as_the_format_does_and_comes_back(emulated, shape, dtype):
    weight = weight_24(shape, dtype)
    expected = SemiStructured.pack(weight)
    emulated.order = ORDERS[sum(shape) % 3]
    packed = pack_24._pack_cuda(weight)
    assert_same(packed, expected, ["values", "metadata"])
    assert torch.equal(pack_24.to_dense(packed), expected.to_dense())


def test_every_way_to_keep_up_to_two_of_four_is_packed_and_every_other_one_is_refused(emulated):
    bits = torch.arange(16)[:, None] >> torch.arange(4) & 1
    groups = (bits * torch.tensor([1.0, -2.0, 3.0, -4.0])).bfloat16()
    for group in groups:
        weight = torch.zeros(2, 16, dtype=torch.bfloat16)
        weight[1, 8:12] = group
        if (group != 0).sum() <= 2:
            assert_same(pack_24._pack_cuda(weight), SemiStructured.pack(weight), ["values", "metadata"])
        else:
            assert says(pack_24._pack_cuda, weight) == says(SemiStructured.pack, weight)


@pytest.mark.parametrize("order", ORDERS)
def test_a_weight_that_is_not_2_4_is_refused_by_its_first_group_in_the_formats_words(emulated, order):
    emulated.order = order
    for dtype in DTYPES:
        weight = weight_24((12, 1100), dtype)
        weight[11, 1096:] = weight[7, 1040:1043] = weight[7, 1048:1052] = 1.0
        assert says(pack_24._pack_cuda, weight) == says(SemiStructured.pack, weight)
    assert "row 7, columns 1040..1043 hold" in says(pack_24._pack_cuda, weight)


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_in_the_formats_words(emulated, bad, dtype):
    """Of a bitmap also where the first one is."""
    weight = weight_24((3, 1100), dtype)
    weight[2, 5] = weight[1, 1058] = weight[1, 1062] = bad
    assert (
        says(pack_24._pack_cuda, weight) == says(SemiStructured.pack, weight) == "weight holds 3 NaN or infinite values"
    )
    assert says(bitmap_rows._pack_cuda, weight) == says(Bitmap.pack, weight)
    assert "the first in row 1, column 1058" in says(bitmap_rows._pack_cuda, weight)


def test_weights_that_lie_on_odd_addresses_and_rows_that_are_apart_are_packed(emulated):
    for dtype in DTYPES:
        dense = weight_24((5, 72), dtype)
        shifted = dense.new_empty(dense.numel() + 1)[1:].view_as(dense).copy_(dense)
        assert shifted.data_ptr() % 16
        assert_same(pack_24._pack_cuda(shifted), SemiStructured.pack(dense), ["values", "metadata"])
        packed = SemiStructured.pack(dense)
        values = dense.new_empty(packed.values.numel() + 1)[1:].view_as(packed.values).copy_(packed.values)
        assert torch.equal(pack_24.to_dense(replace(packed, values=values)), packed.to_dense())
        for view in (shifted, dense.T, dense[1::2, 3:66], dense[1::2, 8:64], dense[:1].expand(5, 72)):
            found, expected = bitmap_rows._pack_cuda(view), Bitmap.pack(view)
            assert_same(found, expected, ["values", "bitmap", "row_offsets"])
            values = torch.cat([found.values[:1], found.values])[1:]
            assert torch.equal(bitmap_rows._to_dense_cuda(replace(found, values=values)), expected.to_dense())


def test_positions_that_cannot_be_are_refused_in_the_formats_words(emulated):
    for shape in ((3, 1100), (3, 4), (3, 1024)):
        packed = SemiStructured.pack(weight_24(shape, torch.bfloat16))
        for byte in (0, packed.metadata.shape[1] * 2 - 1):
            for wrong in (0x41, 0x14, 0xFF, 0x88, 0x4E, 0xE4):
                lying = replace(packed, metadata=packed.metadata.clone())
                lying.metadata.view(torch.uint8)[1, byte] = wrong
                said = told(SemiStructured.validate, lying)
                assert told(pack_24.to_dense, lying) == said
                if said is None:
                    assert torch.equal(pack_24.to_dense(lying), lying.to_dense())


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_is_packed_to_a_bitmap_as_the_format_does_and_comes_back(emulated, shape, dtype):
    for density in (0.5, 0.02) if min(shape) else (0.5,):
        weight = weight_of(shape, dtype, density)
        expected = Bitmap.pack(weight)
        emulated.order = ORDERS[(sum(shape) + (density < 0.5)) % 3]
        packed = bitmap_rows._pack_cuda(weight)
        assert_same(packed, expected, ["values", "bitmap", "row_offsets"])
        assert torch.equal(bitmap_rows._to_dense_cuda(packed).view(torch.uint8), expected.to_dense().view(torch.uint8))


def test_bits_alone_are_those_of_the_packed_weight_and_none_where_it_is_not_finite(emulated, monkeypatch):
    monkeypatch.setattr(bitmap_rows, "_pack_refuses", lambda weight: "the weight is on a card")
    monkeypatch.setattr(bitmap_rows, "_pack_cuda_refuses", lambda weight: None)
    weight = weight_of((7, 37), torch.bfloat16)
    bitmap, row_offsets = bitmap_rows.bits(weight)
    expected = Bitmap.pack(weight)
    assert torch.equal(bitmap, expected.bitmap)
    assert torch.equal(row_offsets, expected.row_offsets)
    weight[3, 3] = float("nan")
    assert bitmap_rows.bits(weight) is None


def test_bitmaps_that_lie_are_refused_in_the_formats_words_and_lead_nowhere(emulated):
    from tests.ops.test_bitmap_rows import lies

    for dtype, shape in ((torch.bfloat16, (7, 37)), (torch.float32, (5, 1096))):
        for lying in lies(Bitmap.pack(weight_of(shape, dtype))):
            assert says(bitmap_rows._to_dense_cuda, lying) == says(Bitmap.validate, lying)


def test_offsets_that_lie_lead_the_values_nowhere(emulated):
    weight = weight_of((5, 300), torch.bfloat16)
    packed = Bitmap.pack(weight)
    far = torch.tensor([1 << 62, -(1 << 62), -1, len(packed.values), 5, 9])
    full = torch.full_like(packed.bitmap, 255)
    for bitmap, row_offsets in ((packed.bitmap, far), (full, packed.row_offsets), (full, far)):
        torch.ops.sparsekern.bitmap_values(weight, bitmap, row_offsets, len(packed.values))


@pytest.mark.parametrize("kind", ["of_24", "of_bitmap"])
def test_what_the_bench_times_on_a_card_is_what_the_kernels_make(emulated, kind, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    from card import packing

    variants = getattr(packing, kind)(torch.randn(37, 136).bfloat16(), False)
    assert len(variants) > 5
    for variant in variants.values():
        variant.check()
        assert variant.nbytes > 0


def test_the_binding_refuses_what_contradicts_itself():
    if compiled.cuda() is None:
        pytest.skip(f"sparsekern._cuda: {compiled.why_not('cuda')}")
    module = compiled.cuda()
    of_24 = {"dense": 0, "dense_size": 84, "dtype": "bfloat16", "values": 0, "values_size": 42, "metadata": 0}
    of_24 |= {"metadata_size": 7, "status": 0, "status_size": 3, "out_features": 7, "in_features": 12, "stream": 0}
    rows = {"dense": 0, "stride": 12, "dtype": "float32", "bitmap": 0, "bitmap_size": 14, "counts": 0, "counts_size": 7}
    rows |= {"status": 0, "status_size": 2, "out_features": 7, "in_features": 12, "stream": 0}
    sets = {"saliency": 0, "kept": 0, "kept_stride": 0, "mask": 0, "mask_size": 28, "status": 0, "status_size": 2}
    sets |= {"sets": 7, "size": 4, "stream": 0}
    ordered = {"fragments": 0, "fragments_size": 2048, "ordered": 0, "ordered_size": 128, "dense": 0, "dense_size": 84}
    ordered |= {"out_features": 7, "in_features": 12, "stream": 0}
    for name, arguments, changed, said in (
        ("fragments_24_to_dense", ordered, {"fragments_size": 2047}, "fragments must hold 1 \\* 2048 elements"),
        ("fragments_24_to_dense", ordered, {"ordered": 8}, "ordered must lie on 16 bytes"),
        ("fragments_24_to_dense", ordered, {"dense": 4}, "dense must lie on 8 bytes"),
        ("pack_24", of_24, {"dense_size": 83}, "dense must hold 7 \\* 12 elements, got 83"),
        ("pack_24", of_24, {"in_features": 10}, "in_features must be a multiple of 4, got 10"),
        ("pack_24", of_24, {"dtype": "float64"}, "dtype must be bfloat16, float16 or float32, got float64"),
        ("pack_24", of_24, {"values": 4}, "values must lie on 8 bytes"),
        ("pack_24", of_24, {"metadata_size": 8}, "metadata must hold 7 \\* 1 elements, got 8"),
        ("unpack_24", of_24, {"status_size": 3}, "status must hold 1 \\* 1 elements, got 3"),
        ("unpack_24", of_24, {"out_features": 1 << 62}, "sizes are impossible"),
        ("bitmap_bits", rows, {"bitmap_size": 13}, "bitmap must hold 7 \\* 2 elements, got 13"),
        ("bitmap_bits", rows, {"stride": -1}, "stride must not be negative, got -1"),
        ("bitmap_bits", rows, {"dense": 2}, "dense must lie on 4 bytes"),
        ("keep_largest", sets, {"size": 5}, "a set must have 2, 4, 8 or 16 saliencies, got 5"),
        ("keep_largest", sets, {"mask_size": 27}, "mask must hold 7 \\* 4 elements, got 27"),
        ("keep_largest", sets, {"saliency": 8}, "saliency and mask must lie on 16 bytes"),
    ):
        with pytest.raises(ValueError, match=said):
            getattr(module, name)(**{**arguments, **changed})


needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_card
@dtypes
@pytest.mark.parametrize("shape", [*SHAPES_24, (515, 4096)], ids=str)
def test_on_a_card_2_4_is_packed_as_on_the_cpu(shape, dtype):
    weight = weight_24(shape, dtype)
    expected = SemiStructured.pack(weight)
    packed = pack_24.pack(weight.cuda())
    assert pack_24._pack_refuses(weight.cuda()) is None
    assert_same(SemiStructured(packed.values.cpu(), packed.metadata.cpu(), shape[1]), expected, ["values", "metadata"])
    assert torch.equal(pack_24.to_dense(packed).cpu(), expected.to_dense())
    torch.library.opcheck(torch.ops.sparsekern.pack_24.default, (weight.cuda(),))
    if dtype != torch.float32:
        operands = fragments_24.prepare(packed)
        for found, wanted in zip(operands, fragments_24.reference(expected), strict=True):
            assert torch.equal(found.cpu(), wanted)
        assert torch.equal(fragments_24.to_dense(operands, *shape).cpu(), expected.to_dense())


@needs_card
@dtypes
@pytest.mark.parametrize("shape", [*SHAPES, (515, 4096)], ids=str)
def test_on_a_card_bitmaps_are_packed_as_on_the_cpu(shape, dtype):
    weight = weight_of(shape, dtype)
    expected = Bitmap.pack(weight)
    packed = bitmap_rows.pack(weight.cuda())
    for name in ("values", "bitmap", "row_offsets"):
        assert torch.equal(getattr(packed, name).cpu(), getattr(expected, name)), name
    assert torch.equal(bitmap_rows.to_dense(packed).cpu(), expected.to_dense())
    torch.library.opcheck(torch.ops.sparsekern.bitmap_bits.default, (weight.cuda(),))
    if dtype != torch.float32:
        for found, wanted in zip(bitmap_fragments.prepare(packed), bitmap_fragments.reference(expected), strict=True):
            assert torch.equal(found.cpu(), wanted)
