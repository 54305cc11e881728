"""bitmap_fragments: a bitmap weight as it is saved (formats/bitmap.py) to what a card's tensor cores read, and back.

A panel is 16 outputs by all inputs, a segment of it 256 inputs, in 4 blocks of 64. Lane 4 g + t of a warp has rows g
and g + 8 of the panel and inputs 16 t .. 16 t + 15 of each block: what mma.m16n8k16 wants of it, if its columns are
named so that a lane's are neighbours. For each four inputs it has those of row g, then those of row g + 8.

    masks      [panels, segments, 132] int32: first [4 blocks, 32 lanes], bit 8i + 4h + j: row g + 8h, input
               16t + 4i + j is kept; then 4 bits a lane, low bits first: its column among the 16 of its half warp
    cells      [cell_rows, 4 columns, 2, 4] uint8, four kept values of a lane: their low bytes, then their high bytes
    quad_rows  [panels * segments * 8 + 1] int32, where the rows of cells of columns 4q .. 4q + 3 of a segment begin
    capacity   [rows, 0] of the weight's dtype: no elements, but as many rows as the longest quad of a segment has

The kept values of a lane in a segment are one run in the order of the bits. Lanes 0 .. 15 have columns 0 .. 15 and the
others 16 .. 31, both in the order of how much they keep, the most first. The four columns that have the same rows take
as many cells as the fullest of them, filled up with zeros: at 50 % about 6 % more values than are kept, at 70 % 9 %, at
90 % 22 %; and never more bytes than the dense weight with its masks.

On a card kernels of its own do it: one writes the masks and counts cells, torch sums those up, and one writes the
cells, from the dense weight that another one has rebuilt and checked.

Both directions check what they read, for a bitmap and a module's tensors may come from a file.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.formats.bitmap import Bitmap, pack_bits, unpack_bits
from sparsekern.ops import bitmap_rows, compiled
from sparsekern.ops.kernel import Kernel, device_refuses, never_refuses, pick

PANEL_ROWS = 16
SEGMENT_INPUTS = 256

_QUADS = 8
_LANES = 32
_BLOCKS = 4
_WORDS = 132  # of masks, for a segment
_CELL = 4  # values
_RUN = _BLOCKS * 32  # weights of a lane in a segment
_DTYPES = (torch.bfloat16, torch.float16)
# what is converted in one go: some hundred bytes are needed for each weight of it
_CHUNK_WEIGHTS = 1 << 22

Fragments = tuple[Tensor, ...]


def reference(packed: Bitmap) -> Fragments:
    """The masks, cells, quad_rows and capacity that the kernel reads.

    Raises ValueError as Bitmap.validate does, and for a weight that is not of 2 bytes or has 2^31 rows of cells.
    """
    packed.validate()
    if packed.dtype not in _DTYPES:
        raise ValueError(f"the weight must be bfloat16 or float16, got {packed.dtype}")
    panels, segments = sizes(*packed.shape)
    device = packed.device
    masks, cells, rows = [], [], [torch.zeros(1, dtype=torch.int64, device=device)]
    for kept, values in _runs(packed, panels, segments):
        bits = kept.view(*kept.shape[:3], _BLOCKS, 32).transpose(2, 3)  # [panels, segments, 4, lanes, 32]
        words = pack_bits(bits).view(torch.int32).view(*bits.shape[:2], _BLOCKS * _LANES)
        counts = kept.sum(dim=3)  # of a lane, [panels, segments, lanes]
        most_first = counts.view(*counts.shape[:2], 2, 16).sort(dim=3, descending=True, stable=True)
        column = most_first.indices.argsort(dim=3)  # of a lane in its half
        nibbles = column.view(*column.shape[:2], 16, 2).byte()
        columns = (nibbles[..., 0] | nibbles[..., 1] << 4).view(torch.int32)
        masks.append(torch.cat([words, columns], dim=2))
        quads = most_first.values.reshape(-1, 4).amax(dim=1).add(_CELL - 1) // _CELL
        quad, place = _quads(column)
        begin = quads.cumsum(0) - quads
        made = torch.zeros(int(quads.sum()), 4, 2, _CELL, dtype=torch.uint8, device=device)
        lane = kept.reshape(-1, _RUN).nonzero()[:, 0]
        counts = counts.flatten()
        rank = torch.arange(len(lane), device=device) - (counts.cumsum(0) - counts)[lane]
        halves = values.view(torch.uint8).view(-1, 2)
        for plane in range(2):
            made[begin[quad[lane]] + rank // _CELL, place[lane], plane, rank % _CELL] = halves[:, plane]
        cells.append(made)
        rows.append(quads)
    quad_rows = torch.cat(rows).cumsum(0)
    if int(quad_rows[-1]) >= 1 << 31:
        raise ValueError(f"the weight must have fewer than 2^31 rows of cells, got {int(quad_rows[-1])}")
    capacity = max((int(quads.max()) for quads in rows if len(quads)), default=0)
    return (
        torch.cat(masks) if masks else torch.empty(0, segments, _WORDS, dtype=torch.int32, device=device),
        torch.cat(cells) if cells else torch.empty(0, 4, 2, _CELL, dtype=torch.uint8, device=device),
        quad_rows.int(),
        packed.values.new_empty(capacity, 0),
    )


def reference_inverse(operands: Fragments, out_features: int, in_features: int) -> Bitmap:
    """The inverse of `reference`, bit for bit. Raises ValueError when the operands contradict each other."""
    masks, cells, quad_rows, capacity = operands
    check(operands, out_features, in_features)
    panels, segments = sizes(out_features, in_features)
    words, columns = masks.split([_BLOCKS * _LANES, _WORDS - _BLOCKS * _LANES], dim=2)
    bits = unpack_bits(words.reshape(panels, segments, _BLOCKS, _LANES, 1).view(torch.uint8), 32)
    kept = bits.transpose(2, 3).reshape(panels, segments, _LANES, _RUN)
    two = columns.contiguous().view(torch.uint8).unsqueeze(-1)  # [panels, segments, 16, 1]
    column = torch.cat([two & 15, two >> 4], dim=3).view(panels, segments, 2, 16).long()
    shared = (column.sort(dim=3).values != torch.arange(16, device=masks.device)).any(dim=3).nonzero()
    if len(shared):
        raise ValueError(
            f"lanes of panel {int(shared[0, 0])}, segment {int(shared[0, 1])} must have columns of their own"
        )
    quad, place = _quads(column)
    counts = kept.sum(dim=3).flatten()
    begin = quad_rows[:-1].long()
    # a lane's values end where its quad's cells do at the latest
    crowded = (counts > quad_rows.diff()[quad] * _CELL).nonzero()
    if len(crowded):
        part = int(crowded[0]) // _LANES
        raise ValueError(
            f"masks of panel {part // segments}, segment {part % segments} keep more weights than there are cells for"
        )
    lane = kept.reshape(-1, _RUN).nonzero()[:, 0]
    rank = torch.arange(len(lane), device=masks.device) - (counts.cumsum(0) - counts)[lane]
    halves = [cells[begin[quad[lane]] + rank // _CELL, place[lane], plane, rank % _CELL] for plane in range(2)]
    values = torch.stack(halves, dim=1).view(capacity.dtype).flatten()
    dense = values.new_zeros(kept.shape).masked_scatter_(kept, values)
    kept, dense = (_in_row_order(t, out_features, in_features) for t in (kept, dense))
    row_offsets = torch.zeros(out_features + 1, dtype=torch.int64, device=masks.device)
    torch.cumsum(kept.sum(dim=1), dim=0, out=row_offsets[1:])
    if int(row_offsets[-1]) != len(values):
        raise ValueError("masks keep weights after the last row or input")
    return Bitmap(dense[kept], pack_bits(kept), row_offsets, in_features)


def sizes(out_features: int, in_features: int) -> tuple[int, int]:
    """How many panels and segments a weight has."""
    return -(-out_features // PANEL_ROWS), -(-in_features // SEGMENT_INPUTS)


def check(operands: Fragments, out_features: int, in_features: int) -> None:
    """Raises ValueError unless the operands are of the sizes that the shape asks for, and quad_rows of the cells'."""
    masks, cells, quad_rows, capacity = operands
    panels, segments = sizes(out_features, in_features)
    for name, tensor, shape, dtype in (
        ("masks", masks, [panels, segments, _WORDS], torch.int32),
        ("cells", cells, [len(cells), 4, 2, _CELL], torch.uint8),
        ("quad_rows", quad_rows, [panels * segments * _QUADS + 1], torch.int32),
        ("capacity", capacity, [len(capacity), 0], capacity.dtype),
    ):
        if list(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {shape} of {dtype} and contiguous, got {list(tensor.shape)} of {tensor.dtype}"
            )
    rows = quad_rows.diff()
    first, last = int(quad_rows[0]), int(quad_rows[-1])
    if first != 0 or last != len(cells) or bool((rows < 0).any()):
        raise ValueError(f"quad_rows must rise from 0 to the {len(cells)} rows of cells, got {first} to {last}")


def addresses(operands: Fragments, out_features: int, in_features: int) -> dict[str, int]:
    """The operands for the compiled module, which checks their sizes."""
    masks, cells, quad_rows, capacity = operands
    return {
        "masks": masks.data_ptr(),
        "masks_size": masks.numel(),
        "cells": cells.data_ptr(),
        "cell_rows": len(cells),
        "quad_rows": quad_rows.data_ptr(),
        "quad_rows_size": len(quad_rows),
        "capacity": len(capacity),
        "out_features": out_features,
        "in_features": in_features,
    }


def to_dense(operands: Fragments, out_features: int, in_features: int) -> Tensor:
    """The dense weight [out_features, in_features], on a card by one kernel that reads each byte once."""
    if operands[0].device.type != "cuda" or compiled.why_not("cuda"):
        return reference_inverse(operands, out_features, in_features).to_dense()
    dense = operands[3].new_empty(out_features, in_features)
    compiled.launch(
        compiled.cuda().bitmap_fragments_to_dense, **addresses(operands, out_features, in_features), dense=dense
    )
    return dense


def _quads(column: Tensor) -> tuple[Tensor, Tensor]:
    """The quad of each lane of a weight, and which of its four columns is the lane's.

    column  [panels, segments, 2, 16], of each lane of a half warp

    Returns two vectors [panels * segments * 32].
    """
    place = column.flatten(2) + torch.arange(_LANES, device=column.device) // 16 * 16
    part = torch.arange(place.shape[0] * place.shape[1], device=column.device)
    return (place // 4 + part.view(*place.shape[:2], 1) * _QUADS).flatten(), (place % 4).flatten()


def _runs(packed: Bitmap, panels: int, segments: int) -> Iterator[tuple[Tensor, Tensor]]:
    """By some panels: what each lane keeps [panels, segments, lanes, 256] bool, and the kept values in that order."""
    out_features, in_features = packed.shape
    step = max(1, _CHUNK_WEIGHTS // (PANEL_ROWS * SEGMENT_INPUTS * max(segments, 1)))
    for first in range(0, panels, step):
        rows = slice(first * PANEL_ROWS, min((first + step) * PANEL_ROWS, out_features))
        offsets = packed.row_offsets[rows.start : rows.stop + 1]
        values = packed.values[int(offsets[0]) : int(offsets[-1])]
        part = Bitmap(values, packed.bitmap[rows], offsets - offsets[0], in_features)
        count = min(step, panels - first)
        kept = _in_run_order(part.kept(), count, segments)
        yield kept, _in_run_order(bitmap_rows.to_dense(part), count, segments)[kept]


def _in_run_order(dense: Tensor, panels: int, segments: int) -> Tensor:
    out_features, in_features = dense.shape
    padded = pad(dense, (0, segments * SEGMENT_INPUTS - in_features, 0, panels * PANEL_ROWS - out_features))
    # rows are (h, g), inputs (segment, block, t, i, j)
    tiles = padded.view(panels, 2, 8, segments, _BLOCKS, 4, 4, 4).permute(0, 3, 2, 5, 4, 6, 1, 7)
    return tiles.reshape(panels, segments, _LANES, _RUN)


def _in_row_order(runs: Tensor, out_features: int, in_features: int) -> Tensor:
    panels, segments = runs.shape[:2]
    tiles = runs.view(panels, segments, 8, 4, _BLOCKS, 4, 2, 4).permute(0, 6, 2, 1, 4, 3, 5, 7)
    return tiles.reshape(panels * PANEL_ROWS, segments * SEGMENT_INPUTS)[:out_features, :in_features]


def prepare(packed: Bitmap) -> Fragments:
    """What `reference` does, by the best kernel for this weight."""
    return pick(KERNELS, packed).run(packed)


def _cuda(packed: Bitmap) -> Fragments:
    dense = bitmap_rows.to_dense(packed)
    masks, quads = torch.ops.sparsekern.bitmap_fragments_masks(packed.bitmap.contiguous(), packed.in_features)
    quad_rows = torch.zeros(quads.numel() + 1, dtype=torch.int64, device=packed.device)
    torch.cumsum(quads, dim=0, out=quad_rows[1:])
    most = quads.amax().long() if quads.numel() else quad_rows[0]
    cell_rows, capacity = torch.stack([quad_rows[-1], most]).tolist()
    if cell_rows >= 1 << 31:
        raise ValueError(f"the weight must have fewer than 2^31 rows of cells, got {cell_rows}")
    quad_rows = quad_rows.int()
    cells = torch.ops.sparsekern.bitmap_fragments_cells(dense, masks, quad_rows, cell_rows)
    return masks, cells, quad_rows, packed.values.new_empty(capacity, 0)


def _cuda_refuses(packed: Bitmap) -> str | None:
    if refused := device_refuses(packed, "cuda", _DTYPES):
        return refused
    if max(packed.shape) >= (1 << 31) - SEGMENT_INPUTS:
        return f"rows and columns must be fewer than 2^31 - {SEGMENT_INPUTS}, got {list(packed.shape)}"
    return compiled.why_not("cuda")


def _masks(bitmap: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    masks, quads = _masks_fake(bitmap, in_features)
    compiled.launch(
        compiled.cuda().bitmap_fragments_masks,
        bitmap=bitmap,
        masks=masks,
        quads=quads,
        out_features=len(bitmap),
        in_features=in_features,
    )
    return masks, quads


def _masks_fake(bitmap: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    panels, segments = sizes(bitmap.shape[0], in_features)
    return (
        bitmap.new_empty(panels, segments, _WORDS, dtype=torch.int32),
        bitmap.new_empty(panels * segments * _QUADS, dtype=torch.int32),
    )


def _cells(dense: Tensor, masks: Tensor, quad_rows: Tensor, cell_rows: int) -> Tensor:
    cells = _cells_fake(dense, masks, quad_rows, cell_rows)
    compiled.launch(
        compiled.cuda().bitmap_fragments_cells,
        dense=dense,
        masks=masks,
        cells=cells.data_ptr(),
        cell_rows=cell_rows,
        quad_rows=quad_rows,
        out_features=dense.shape[0],
        in_features=dense.shape[1],
    )
    return cells


def _cells_fake(dense: Tensor, masks: Tensor, quad_rows: Tensor, cell_rows: int) -> Tensor:
    return dense.new_empty(cell_rows, 4, 2, _CELL, dtype=torch.uint8)


_LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")
_LIBRARY.define("bitmap_fragments_masks(Tensor bitmap, int in_features) -> (Tensor masks, Tensor quads)")
_LIBRARY.define("bitmap_fragments_cells(Tensor dense, Tensor masks, Tensor quad_rows, SymInt cell_rows) -> Tensor")
_LIBRARY.impl("bitmap_fragments_masks", _masks, "CUDA")
_LIBRARY.impl("bitmap_fragments_cells", _cells, "CUDA")
torch.library.register_fake("sparsekern::bitmap_fragments_masks", _masks_fake, lib=_LIBRARY)
torch.library.register_fake("sparsekern::bitmap_fragments_cells", _cells_fake, lib=_LIBRARY)

KERNELS = (
    Kernel("cuda", _cuda, _cuda_refuses, restore=reference_inverse),
    Kernel("reference", reference, never_refuses, restore=reference_inverse),
)
