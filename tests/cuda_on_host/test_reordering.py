"""csrc/cuda/fragments_24.cu and bitmap_fragments.cu without a card: packed weights brought into the kernels' order.

The ops above them run too, as they would on a card (conftest.py).
"""

from dataclasses import replace

import pytest
import torch

from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import bitmap_fragments, fragments_24
from tests.cuda_on_host.emulator import ORDERS
from tests.cuda_on_host.weights import told, weight_24, weight_of


# less and more than a panel and a chunk, a warp's share; with and without rows on 16 bytes
@pytest.mark.parametrize("shape", [(1, 4), (17, 100), (16, 256), (33, 528), (70, 1040), (0, 8), (3, 0)], ids=str)
def test_a_2_4_weight_is_brought_into_the_order_of_mma_sp_and_to_dense(emulated, shape):
    for dtype in (torch.bfloat16, torch.float16):
        weight = weight_24(shape, dtype)
        packed = SemiStructured.pack(weight)
        emulated.order = ORDERS[(sum(shape) + (dtype == torch.float16)) % 3]
        found, expected = fragments_24.prepare(packed), fragments_24.reference(packed)
        for name, got, wanted in zip(("values", "metadata"), found, expected, strict=True):
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
            assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)), name
        assert torch.equal(fragments_24.to_dense(found, *shape), weight + 0.0)
    values = packed.values.new_empty(packed.values.numel() + 1)[1:].view_as(packed.values).copy_(packed.values)
    assert torch.equal(fragments_24.prepare(replace(packed, values=values))[0], expected[0])


def test_positions_that_cannot_be_are_not_brought_into_that_order(emulated):
    for shape in ((20, 300), (3, 4), (17, 256)):
        packed = SemiStructured.pack(weight_24(shape, torch.bfloat16))
        for row, byte in ((0, 0), (shape[0] - 1, packed.metadata.shape[1] * 2 - 1)):
            for wrong in (0x41, 0x14, 0xFF, 0x88, 0x4E, 0xE4):
                lying = replace(packed, metadata=packed.metadata.clone())
                lying.metadata.view(torch.uint8)[row, byte] = wrong
                assert told(fragments_24.prepare, lying) == told(SemiStructured.validate, lying)


@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (129, 17), (16, 512), (33, 1000), (0, 5), (5, 0)], ids=str)
def test_a_bitmap_is_brought_into_the_order_of_the_tensor_cores(emulated, shape):
    for number, density in enumerate((0.5, 0.0, 0.1, 1.0)):
        packed = Bitmap.pack(weight_of(shape, torch.bfloat16, density))
        emulated.order = ORDERS[(sum(shape) + number) % 3]
        found, expected = bitmap_fragments._cuda(packed), bitmap_fragments.reference(packed)
        for got, wanted in zip(found, expected, strict=True):
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
            assert torch.equal(got, wanted)


def test_rows_of_cells_that_lie_lead_nowhere(emulated):
    packed = Bitmap.pack(weight_of((20, 600), torch.float16))
    masks, cells, quad_rows, _ = bitmap_fragments.reference(packed)
    far = torch.tensor([1 << 30, -5, 7], dtype=torch.int32).repeat(len(quad_rows))[: len(quad_rows)]
    for lying, rows in ((torch.full_like(masks, -1), quad_rows), (masks, far)):
        torch.ops.sparsekern.bitmap_fragments_cells(packed.to_dense(), lying, rows, len(cells))


def test_the_ops_keep_the_rules_of_torch(emulated):
    """Schemas, fake tensors, traced shapes: what torch.compile and CUDA graphs need."""
    weight = weight_24((5, 24), torch.bfloat16)
    packed, bitmap = SemiStructured.pack(weight), Bitmap.pack(weight)
    masks, cells, quad_rows, _ = bitmap_fragments.reference(bitmap)
    ops = torch.ops.sparsekern
    for op, arguments in (
        (ops.pack_24.default, (weight,)),
        (ops.unpack_24.default, (packed.values, packed.metadata, 24)),
        (ops.fragments_24.default, (packed.values, packed.metadata, 24)),
        (ops.fragments_24_to_dense.default, (*fragments_24.reference(packed), 5, 24)),
        (ops.bitmap_fragments_masks.default, (bitmap.bitmap, 24)),
        (ops.bitmap_fragments_cells.default, (weight, masks, quad_rows, len(cells))),
        (ops.bitmap_bits.default, (weight,)),
        (ops.bitmap_values.default, (weight, bitmap.bitmap, bitmap.row_offsets, len(bitmap.values))),
        (ops.bitmap_to_dense.default, (bitmap.values, bitmap.bitmap, bitmap.row_offsets, 24)),
        (ops.keep_largest.default, (torch.rand(9, 4), torch.full((1,), 2).expand(9))),
    ):
        torch.library.opcheck(op, arguments)
