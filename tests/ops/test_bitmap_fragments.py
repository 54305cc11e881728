"""bitmap_fragments: the layout by hand, the round trip, what is refused."""

import pytest
import torch

from sparsekern.formats import Bitmap
from sparsekern.ops import bitmap_fragments
from sparsekern.ops.bitmap_fragments import reference, reference_inverse

DTYPES = [torch.bfloat16, torch.float16]


def problem(out_features, in_features, density, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=g)
    return (weight * (torch.rand(out_features, in_features, generator=g) < density) + 0.0).to(dtype)


def test_the_layout_is_the_one_written_here():
    weight = torch.zeros(16, 256, dtype=torch.float16)
    # lane 4 * 3 + 1 has rows 3 and 11, and of block 2 the inputs 16 .. 31
    first = 2 * 64 + 16
    weight[3, first + 1], weight[11, first + 2], weight[3, first + 4], weight[3, first + 15] = 1.0, 2.0, 3.0, 4.0
    weight[11, first + 15] = 5.0
    masks, cells, quad_rows, capacity = reference(Bitmap.pack(weight))
    expected = torch.zeros(4, 32, dtype=torch.int32)
    expected[2, 13] = sum(1 << bit for bit in (1, 4 + 2, 8, 24 + 3)) - (1 << 31)
    assert torch.equal(masks[0, 0, :128], expected.flatten())
    # lane 13 keeps the most of lanes 0 .. 15: it has the first column, lanes 0 .. 12 the next ones; 4 bits a lane
    columns = [*range(1, 14), 0, 14, 15, *range(16)]
    assert masks[0, 0, 128:].tolist() == [
        sum(column << 4 * i for i, column in enumerate(columns[first : first + 8])) - (columns[first + 7] // 8 << 32)
        for first in (0, 8, 16, 24)
    ]
    # five values are two cells, which quad 0 has alone
    assert quad_rows.tolist() == [0, 2, 2, 2, 2, 2, 2, 2, 2]
    assert capacity.shape == (2, 0)
    assert capacity.dtype == torch.float16
    halves = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 0.0], dtype=torch.float16).view(torch.uint8)
    assert torch.equal(cells[:, 0], torch.stack([halves[0::2].view(2, 4), halves[1::2].view(2, 4)], dim=1))
    cells[:, 0] = 0
    assert not cells.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (129, 17), (16, 256), (33, 1000), (0, 5), (5, 0)], ids=str)
def test_what_is_prepared_comes_back_bit_for_bit(shape, density, dtype):
    weight = problem(*shape, density, dtype)
    packed = Bitmap.pack(weight)
    operands = reference(packed)
    back = reference_inverse(operands, *shape)
    assert all(torch.equal(getattr(back, name), getattr(packed, name)) for name in ("values", "bitmap", "row_offsets"))
    assert torch.equal(bitmap_fragments.to_dense(operands, *shape), weight)


def test_a_weight_converted_in_parts_is_the_same(monkeypatch):
    packed = Bitmap.pack(problem(70, 600, 0.5))
    whole = reference(packed)
    monkeypatch.setattr(bitmap_fragments, "_CHUNK_WEIGHTS", 2 * 16 * 1024)
    assert all(torch.equal(part, one) for part, one in zip(reference(packed), whole, strict=True))


def test_kept_zeros_of_a_file_come_back_too():
    packed = Bitmap.pack(problem(20, 40, 0.5))
    packed.values[3], packed.values[5] = 0.0, -0.0
    back = reference_inverse(reference(packed), 20, 40)
    assert torch.equal(back.values.view(torch.int16), packed.values.view(torch.int16))
    assert torch.equal(back.bitmap, packed.bitmap)


@pytest.mark.parametrize(("density", "most"), [(0.5, 1.06), (0.3, 1.095), (0.1, 1.23), (1.0, 1.0)])
def test_few_bytes_are_filled_up(density, most):
    _, cells, *_ = reference(Bitmap.pack(problem(512, 2048, density)))
    kept = density * 512 * 2048
    assert cells.numel() <= 2 * kept * most * 1.01


def test_no_weight_takes_more_than_dense_and_its_masks():
    weight = torch.zeros(64, 1024, dtype=torch.bfloat16)
    # lanes 0 and 16 keep all that they have: each takes the three that share its rows of cells with it, and no others
    weight.view(4, 4, 4, 16, 4, 16)[:, :, 0, :, 0] = 1.0
    masks, cells, quad_rows, _ = reference(Bitmap.pack(weight))
    assert cells.numel() == weight.nbytes / 4
    assert masks.nbytes + quad_rows.nbytes < weight.nbytes / 14
    _, cells, *_ = reference(Bitmap.pack(torch.ones_like(weight)))
    assert cells.numel() == weight.nbytes


def test_operands_that_contradict_each_other_are_refused():
    masks, cells, quad_rows, capacity = reference(Bitmap.pack(problem(20, 600, 0.5)))
    full, alike = masks.clone(), masks.clone()
    full[..., :128] = -1
    alike[1, 2, 128:] = 0
    for operands, said in (
        ((masks[:1], cells, quad_rows, capacity), "masks must be"),
        ((masks, cells[:-1], quad_rows, capacity), "quad_rows must rise from 0 to the"),
        ((masks, cells, quad_rows.flip(0), capacity), "quad_rows must rise"),
        ((alike, cells, quad_rows, capacity), "lanes of panel 1, segment 2 must have columns of their own"),
        ((full, cells, quad_rows, capacity), "masks of panel 0, segment 0 keep more weights than there are cells for"),
    ):
        with pytest.raises(ValueError, match=said):
            reference_inverse(operands, 20, 600)
    # input 600 is bit 8 of lane 1, block 9: there is none
    outside = masks.clone()
    outside[0, 2, 3 * 32 + 3] = 1
    with pytest.raises(ValueError, match=r"masks keep weights after the last row or input|more weights"):
        reference_inverse((outside, cells, quad_rows, capacity), 20, 600)


def test_weights_of_other_sizes_and_bitmaps_that_lie_are_refused():
    with pytest.raises(ValueError, match="the weight must be bfloat16 or float16, got torch.float32"):
        reference(Bitmap.pack(torch.eye(3)))
    packed = Bitmap.pack(problem(7, 37, 0.5))
    packed.bitmap[2, 1] ^= 1
    with pytest.raises(ValueError, match="row 2"):
        reference(packed)
