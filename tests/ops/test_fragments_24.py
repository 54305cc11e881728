"""fragments_24: what each lane of a warp holds, after the PTX manual, the round trip, what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.formats import SemiStructured
from sparsekern.ops import fragments_24
from sparsekern.pattern import NM


def packed(out_features, in_features, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=g)
    return SemiStructured.pack(weight.where(NM(2, 4).mask(torch.rand(weight.shape, generator=g)), 0.0).to(dtype))


def tile_of(values, metadata, selector):
    """The dense tile [16, 32] that mma.sp.m16n8k32 multiplies, from the registers of its lanes.

    values    [32 lanes, 8]
    metadata  [32 lanes] one 32-bit register of each lane
    """
    kept = torch.zeros(16, 16, dtype=values.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(8):
            # PTX: row g for a0 a1 a4 a5, g + 8 for the others; kept column 2t + i % 2, + 8 from a4 on
            kept[g if i % 4 < 2 else g + 8, 2 * t + i % 2 + (8 if i >= 4 else 0)] = values[lane, i]
    dense = torch.zeros(16, 32, dtype=values.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        # the selector says which two of each four lanes contribute: 0 the first two, 1 the last two
        if t // 2 != selector:
            continue
        bits = int(metadata[lane]) & 0xFFFFFFFF
        for row, word in ((g, bits & 0xFFFF), (g + 8, bits >> 16)):
            for group in range(4):
                number = 4 * (t % 2) + group
                first, second = word >> 4 * group & 3, word >> 4 * group + 2 & 3
                assert first < second
                dense[row, 4 * number + first] = kept[row, 2 * number]
                dense[row, 4 * number + second] = kept[row, 2 * number + 1]
    return dense


@pytest.mark.parametrize("seed", range(3))
def test_the_lanes_of_a_warp_hold_the_tiles_of_the_weight(seed):
    weight = packed(32, 512, seed=seed)
    values, metadata = fragments_24.reference(weight)
    dense = torch.zeros(32, 512)
    for panel in range(2):
        for tile in range(16):
            chunk, k = divmod(tile, 8)
            found = tile_of(values[panel, chunk, k], metadata[panel, chunk, :, k // 2], k % 2)
            dense[16 * panel : 16 * panel + 16, 32 * tile : 32 * tile + 32] = found
    assert torch.equal(dense, weight.to_dense())


@given(st.integers(1, 40), st.integers(1, 140), st.sampled_from([torch.bfloat16, torch.float16]))
def test_what_is_shuffled_comes_back_and_gives_the_weight(out_features, groups, dtype):
    weight = packed(out_features, 4 * groups, dtype)
    back = fragments_24.reference_inverse(fragments_24.reference(weight), *weight.shape)
    assert torch.equal(back.values, weight.values)
    assert torch.equal(back.metadata, weight.metadata)
    assert torch.equal(back.to_dense(), weight.to_dense())


@pytest.mark.parametrize("shape", [(5, 0), (0, 8), (0, 0)], ids=str)
def test_a_weight_without_inputs_or_outputs_comes_back(shape):
    weight = SemiStructured.pack(torch.zeros(shape))
    operands = fragments_24.reference(weight)
    fragments_24.check(operands, *shape)
    back = fragments_24.reference_inverse(operands, *shape)
    assert torch.equal(back.values, weight.values)
    assert torch.equal(back.metadata, weight.metadata)


def test_what_fills_the_last_panel_and_chunk_is_zero_at_legal_positions():
    values, metadata = fragments_24.reference(packed(1, 4))
    assert values.shape == (1, 1, 8, 32, 8)
    assert int((values != 0).sum()) <= 2
    words = metadata.view(torch.int16).flatten()
    # row 0 stands in one word; all others are 0x4444
    assert int((words != 0x4444).sum()) <= 1


def test_fragments_of_another_weight_are_refused():
    operands = fragments_24.reference(packed(17, 260))
    with pytest.raises(ValueError, match=r"values must be \[1, 2, 8, 32, 8\], got \[2, 2, 8, 32, 8\]"):
        fragments_24.reference_inverse(operands, 16, 260)
    with pytest.raises(ValueError, match=r"metadata must be int32 \[2, 2, 32, 4\], got torch.int64"):
        fragments_24.reference_inverse((operands[0], operands[1].long()), 17, 260)
    bad = SemiStructured(operands[0].new_zeros(1, 2), torch.zeros(1, 1, dtype=torch.int16), 4)
    with pytest.raises(ValueError, match="positions must ascend"):
        fragments_24.reference(bad)


def test_the_metadata_lies_as_cutlass_orders_it():
    """torch's converter makes what CUTLASS's kernels read: rows 16 to 31 of a column of tiles are its selector 1."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    g = torch.Generator().manual_seed(0)
    tiles = torch.randn(8, 16, 32, generator=g).bfloat16()
    tiles = tiles.where(NM(2, 4).mask(tiles.abs().flatten(0, 1)).view_as(tiles), 0.0)
    _, metadata = fragments_24.reference(SemiStructured.pack(torch.cat(list(tiles), dim=1)))
    for register in range(4):
        pair = torch.cat([tiles[2 * register], tiles[2 * register + 1]])
        _, ordered = sparse_semi_structured_from_dense_cutlass(pair)
        assert torch.equal(ordered.view(torch.int16).flatten().view(torch.int32), metadata[0, 0, :, register])
