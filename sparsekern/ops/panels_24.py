"""panels_24: a 2:4 weight as it is saved (formats/semi_structured.py) to what linear_24's CPU kernels read, and back.

A panel is 16 outputs by all inputs, filled up to 32 inputs, as in bitmap_panels.py; a group is four inputs:

    values     [panels, groups, 16, 2], the two of row n in group g, in the order of their inputs
    positions  [panels, groups] int64, bits 4n and 4n + 1 the first one's input in the group, the two after them the
               second's: the saved metadata of 16 rows

Nine sixteenths of the dense bytes. Rows and inputs that fill up have zeros at positions 0 and 1.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.formats import SemiStructured
from sparsekern.ops import compiled
from sparsekern.ops.bitmap_panels import BLOCK_INPUTS, PANEL_ROWS

GROUP = 4
# positions 0 and 1, of two groups
_FIRST_TWO = 0x44

Panels = tuple[Tensor, Tensor]


def reference(packed: SemiStructured) -> Panels:
    """The values and positions that the compiled kernels read. Raises ValueError as SemiStructured.validate does."""
    packed.validate()
    out_features, in_features = packed.shape
    panels, groups = _size(out_features, in_features)
    if not panels * groups:
        empty = packed.values.new_empty(panels, groups, PANEL_ROWS, 2)
        return empty, empty.new_empty(panels, groups, dtype=torch.int64)
    rows, inputs = panels * PANEL_ROWS - out_features, groups * GROUP - in_features
    values = pad(packed.values, (0, inputs // 2, 0, rows)).view(panels, PANEL_ROWS, groups, 2)
    # one byte for two groups
    metadata = packed.metadata.view(torch.uint8)[:, : groups // 2]
    metadata = pad(metadata, (0, groups // 2 - metadata.shape[1], 0, rows), value=_FIRST_TWO)
    nibbles = torch.stack([metadata & 15, metadata >> 4], dim=2).view(panels, PANEL_ROWS // 2, 2, groups)
    positions = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).transpose(1, 2)  # [panels, groups, 8], two rows a byte
    return compiled.copy(values.transpose(1, 2)), compiled.copy(positions).view(torch.int64).view(panels, groups)


def reference_inverse(operands: Panels, out_features: int, in_features: int) -> SemiStructured:
    """The inverse of `reference`, bit for bit. Raises ValueError when the operands are no 2:4 weight of this size."""
    packed = unchecked_inverse(operands, out_features, in_features)
    packed.validate()
    return packed


def unchecked_inverse(operands: Panels, out_features: int, in_features: int) -> SemiStructured:
    """`reference_inverse` without a look at what the positions say. Raises ValueError for another size or dtype."""
    values, positions = operands
    panels, groups = _size(out_features, in_features)
    for name, tensor, shape, dtype in (
        ("values", values, [panels, groups, PANEL_ROWS, 2], values.dtype),
        ("positions", positions, [panels, groups], torch.int64),
    ):
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {shape} of {dtype}, got {list(tensor.shape)} of {tensor.dtype}")
    if not panels * groups:
        empty = values.new_empty(out_features, in_features // 2)
        return SemiStructured(
            empty, empty.new_empty(out_features, -(-in_features // 16), dtype=torch.int16), in_features
        )
    rows = values.transpose(1, 2).reshape(panels * PANEL_ROWS, groups * 2)[:out_features, : in_features // 2]
    pairs = _contiguous(positions).view(torch.uint8).view(panels, groups, PANEL_ROWS // 2).transpose(1, 2)
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=2).view(panels * PANEL_ROWS, groups)[:out_features]
    words = -(-in_features // 16)
    metadata = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4)[:, : 2 * words]
    return SemiStructured(
        _contiguous(rows), _contiguous(metadata).view(torch.int16).view(out_features, words), in_features
    )


def _size(out_features: int, in_features: int) -> tuple[int, int]:
    """Panels, and groups with those that fill up the last block."""
    return -(-out_features // PANEL_ROWS), -(-in_features // BLOCK_INPUTS) * BLOCK_INPUTS // GROUP


def _contiguous(tensor: Tensor) -> Tensor:
    """A copy whose strides are those of its shape, which .contiguous() leaves as they are where a size is 0."""
    return tensor.clone(memory_format=torch.contiguous_format)
