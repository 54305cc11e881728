"""Masks, packing and unpacking on the CPU and on a card: any device, streams, graphs, more than 2^31 elements."""

import pytest
import torch

from sparsekern import ops
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import bitmap_fragments, fragments_24
from sparsekern.pattern import NM
from tests.on_card.subjects import weight_of
from tests.on_card.test_large import ABOVE, needs, parts
from tests.on_card.test_linear import capture, on_streams

FORMATS = pytest.mark.parametrize("format", [SemiStructured, Bitmap], ids=lambda format: format.name)


def same(found, expected):
    names = ("values", "metadata") if isinstance(expected, SemiStructured) else ("values", "bitmap", "row_offsets")
    return all(torch.equal(getattr(found, name).cpu(), getattr(expected, name)) for name in names)


@FORMATS
def test_a_weight_is_packed_where_it_lies_and_comes_back(format, place, dtype):
    for shape in ((129, 1040), (7, 100)):
        weight = weight_of(shape, format, dtype, place)
        packed = ops.pack(weight, format)
        assert packed.values.device == weight.device
        assert same(packed, format.pack(weight.cpu()))
        assert torch.equal(ops.to_dense(packed), weight)


@pytest.mark.parametrize("pattern", [NM(1, 2), NM(2, 4), NM(4, 8), NM(4, 16), NM(3, 5)], ids=str)
def test_the_mask_of_n_to_m_is_the_cpus(pattern, place):
    saliency = torch.randn(33, 16 * 5 * 7, generator=torch.Generator().manual_seed(0)).mul(3).round()
    assert torch.equal(pattern.mask(saliency.to(place)).cpu(), pattern.mask(saliency))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_orders_are_the_cpus(place, dtype):
    for shape in ((129, 1040), (7, 100)):
        for format, order in ((SemiStructured, fragments_24), (Bitmap, bitmap_fragments)):
            weight = weight_of(shape, format, dtype, "cpu")
            expected = order.reference(format.pack(weight))
            found = order.prepare(ops.pack(weight.to(place), format))
            assert all(torch.equal(got.cpu(), wanted) for got, wanted in zip(found, expected, strict=True))
            assert torch.equal(order.to_dense(found, *shape).cpu(), weight)


@FORMATS
def test_two_streams_pack_what_is_theirs(format, place):
    weights = [weight_of((129 + 8 * number, 1040), format, torch.bfloat16, place) for number in range(2)]
    expected = [format.pack(weight.cpu()) for weight in weights]
    for number, packed in on_streams(place, lambda number: ops.pack(weights[number], format), rounds=5):
        assert same(packed, expected[number])


def test_a_captured_graph_packs_what_stands_there_at_its_replay(card):
    weight = weight_of((129, 1040), SemiStructured, torch.bfloat16, card)
    values, replay = capture(card, lambda: torch.ops.sparsekern.pack_24(weight)[0])
    weight.neg_()
    replay()
    assert torch.equal(values, SemiStructured.pack(weight).values)


@FORMATS
def test_a_weight_of_more_than_2_31_elements_is_packed_and_comes_back(format, card):
    needs(card, 30)
    in_features = 1 << 14
    few = weight_of((512, in_features), format, torch.bfloat16, card, sparsity=0.5)
    weight = few.repeat(ABOVE // few.numel() + 1, 1)
    packed = ops.pack(weight, format)
    assert weight.numel() > 1 << 31
    # the last rows are those few again
    last = format.pack(few).values
    assert torch.equal(packed.values[-len(last) :], last)
    dense = ops.to_dense(packed)
    assert all(torch.equal(dense[rows], weight[rows]) for rows in parts(len(weight)))
