"""bitmap_panels: a weight as it is saved (formats/bitmap.py) to what linear_bitmap's CPU kernels read, and back.

A panel is 16 outputs by all inputs, cut into blocks of 32 inputs (csrc/ops.h):

    masks          [panels, blocks, 16] int32, bit 2n + j of mask q = row n, input 2q + j of the block is kept
    values         [kept] in the order of the bits, and TAIL_BYTES of zeros that a kernel may touch
    panel_offsets  [panels + 1] int64, where each panel's values start

Both directions check what they read as they go, because it may come from a file: what is converted holds as many values
as it has bits, so a kernel that counts bits stays within its values. The compiled kernels move each byte once.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.formats.bitmap import DTYPES, Bitmap, pack_bits, unpack_bits
from sparsekern.ops import bitmap_rows, compiled
from sparsekern.ops.kernel import Kernel, device_refuses, never_refuses, pick

PANEL_ROWS = 16
BLOCK_INPUTS = 32
TAIL_BYTES = 576

Panels = tuple[Tensor, ...]


def reference(packed: Bitmap) -> Panels:
    """The masks, values and panel_offsets that the compiled kernels read. Raises ValueError as Bitmap.validate does."""
    packed.validate()
    out_features, in_features = packed.shape
    panels, blocks = -(-out_features // PANEL_ROWS), -(-in_features // BLOCK_INPUTS)
    kept = _in_panel_order(packed.kept(), panels, blocks)  # [panels, blocks, 16, 32]
    values = _in_panel_order(packed.to_dense(), panels, blocks)[kept]
    masks = pack_bits(kept).view(torch.int32).view(panels, blocks, BLOCK_INPUTS // 2)
    panel_offsets = torch.zeros(panels + 1, dtype=torch.int64, device=packed.device)
    torch.cumsum(kept.flatten(1).sum(dim=1), dim=0, out=panel_offsets[1:])
    return masks, pad(values, (0, TAIL_BYTES // values.itemsize)), panel_offsets


def reference_inverse(operands: Panels, out_features: int, in_features: int) -> Bitmap:
    """The inverse of `reference`, bit for bit. Raises ValueError when the operands contradict each other."""
    _check_shapes(operands, out_features, in_features)
    masks, values, panel_offsets = operands
    in_order = unpack_bits(masks.unsqueeze(-1).view(torch.uint8), 2 * PANEL_ROWS)  # [panels, blocks, 16, 32]
    kept = _in_row_order(in_order, out_features, in_features)
    ones = in_order.flatten(1).sum(dim=1)
    wrong = ones != panel_offsets.diff()
    wrong |= ones != _in_panel_order(kept, *in_order.shape[:2]).flatten(1).sum(dim=1)
    if wrong.any():
        _refuse(int(wrong.nonzero()[0]))
    dense_in_order = values.new_zeros(in_order.shape)
    dense_in_order.masked_scatter_(in_order, values[: len(values) - TAIL_BYTES // values.itemsize])
    row_offsets = torch.zeros(out_features + 1, dtype=torch.int64, device=values.device)
    torch.cumsum(kept.sum(dim=1), dim=0, out=row_offsets[1:])
    return Bitmap(
        _in_row_order(dense_in_order, out_features, in_features)[kept], pack_bits(kept), row_offsets, in_features
    )


def to_panels(packed: Bitmap) -> Panels:
    """What `reference` does, by the best kernel for this weight."""
    return pick(KERNELS, packed.values).run(packed)


def from_panels(operands: Panels, out_features: int, in_features: int) -> Bitmap:
    """The inverse of `to_panels`, bit for bit. Raises ValueError when the operands contradict each other."""
    return pick(KERNELS, operands[1]).restore(operands, out_features, in_features)


def addresses(operands: Panels, out_features: int, in_features: int):
    """Where the operands lie: for the compiled module, which checks sizes and offsets, and keeps no tensor."""
    return compiled.cpu().BitmapWeight(operands, out_features, in_features)


def _to_panels_cpu(packed: Bitmap, isa: str = "") -> Panels:
    packed.validate_shapes()
    out_features, in_features = packed.shape
    panels = -(-out_features // PANEL_ROWS)
    masks = torch.empty(panels, -(-in_features // BLOCK_INPUTS), BLOCK_INPUTS // 2, dtype=torch.int32)
    values = packed.values.new_empty(len(packed.values) + TAIL_BYTES // packed.values.itemsize)
    panel_offsets = torch.empty(panels + 1, dtype=torch.int64)
    targets = (masks.data_ptr(), masks.numel(), values.data_ptr(), values.numel(), panel_offsets.data_ptr(), panels + 1)
    row = compiled.cpu().bitmap_to_panels(bitmap_rows.rows(packed), *targets, torch.get_num_threads(), isa)
    bitmap_rows.refuse(packed, row)
    return masks, values, panel_offsets


def _from_panels_cpu(operands: Panels, out_features: int, in_features: int, isa: str = "") -> Bitmap:
    _check_shapes(operands, out_features, in_features)
    weight = addresses(operands, out_features, in_features)
    values = operands[1].new_empty(int(operands[2][-1]))
    bitmap = torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8)
    row_offsets = torch.empty(out_features + 1, dtype=torch.int64)
    targets = (values.data_ptr(), values.numel(), bitmap.data_ptr(), bitmap.numel(), row_offsets.data_ptr())
    panel = compiled.cpu().panels_to_bitmap(weight, *targets, out_features + 1, torch.get_num_threads(), isa)
    if panel >= 0:
        _refuse(panel)
    return Bitmap(values, bitmap, row_offsets, in_features)


def _cpu_refuses(values: Tensor) -> str | None:
    return device_refuses(values, "cpu", DTYPES) or compiled.why_not("cpu")


def _check_shapes(operands: Panels, out_features: int, in_features: int) -> None:
    masks, values, panel_offsets = operands
    panels, blocks = -(-out_features // PANEL_ROWS), -(-in_features // BLOCK_INPUTS)
    for name, tensor, shape, dtype in (
        ("masks", masks, [panels, blocks, BLOCK_INPUTS // 2], torch.int32),
        ("values", values, [values.numel()], values.dtype),
        ("panel_offsets", panel_offsets, [panels + 1], torch.int64),
    ):
        if list(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {shape} of {dtype} and contiguous, got {list(tensor.shape)} of {tensor.dtype}"
            )
    kept = len(values) - TAIL_BYTES // values.itemsize
    first, last = int(panel_offsets[0]), int(panel_offsets[-1])
    if first != 0 or last != kept:
        raise ValueError(f"panel_offsets must run from 0 to the {kept} kept values, got {first} to {last}")
    if bool((panel_offsets.diff() < 0).any()):
        raise ValueError(f"panel_offsets must not fall, panel {int((panel_offsets.diff() < 0).nonzero()[0])} does")


def _refuse(panel: int) -> None:
    raise ValueError(
        f"masks of panel {panel} must keep as many weights as panel_offsets say, and none after the last row or input"
    )


def _in_panel_order(dense: Tensor, panels: int, blocks: int) -> Tensor:
    out_features, in_features = dense.shape
    padded = pad(dense, (0, blocks * BLOCK_INPUTS - in_features, 0, panels * PANEL_ROWS - out_features))
    tiles = padded.view(panels, PANEL_ROWS, blocks, BLOCK_INPUTS // 2, 2)
    return tiles.permute(0, 2, 3, 1, 4).reshape(panels, blocks, BLOCK_INPUTS // 2, 2 * PANEL_ROWS)


def _in_row_order(tiles: Tensor, out_features: int, in_features: int) -> Tensor:
    panels, blocks = tiles.shape[:2]
    padded = tiles.view(panels, blocks, BLOCK_INPUTS // 2, PANEL_ROWS, 2).permute(0, 3, 1, 2, 4)
    return padded.reshape(panels * PANEL_ROWS, blocks * BLOCK_INPUTS)[:out_features, :in_features]


KERNELS = (
    Kernel("cpu", _to_panels_cpu, _cpu_refuses, restore=_from_panels_cpu),
    Kernel("reference", reference, never_refuses, restore=reference_inverse),
)
