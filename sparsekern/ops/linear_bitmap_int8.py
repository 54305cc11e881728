"""linear_bitmap_int8: y = x W^T + bias with W packed as integers, scales and a bitmap (formats/bitmap_int8.py).

A kept weight is a byte, so that few tokens wait for a third of the bytes at 50 %, and a seventh at 90 %. The compiled
kernels multiply integers: a token of x is rounded to 16 bits of a power of two, to 24 where its largest input is more
than 64 times the mean one and for float32 x, and the products of a group of inputs are summed exactly. What is left of
an error is the rounding of x, at most 2^-15 or 2^-23 of the token's largest input for each input, and of y.

The CPU kernels read the weight in panels of 16 outputs (csrc/ops.h):

    masks          [panels, blocks, 16] int64, bit 4n + j of mask q = row n, input 4q + j of the block of 64 is kept
    values         [kept] int8 in the order of the bits, and TAIL_BYTES of zeros that a kernel may touch
    panel_offsets  [panels + 1] int64, where each panel's values start
    scales         [panels, groups, 16] float32, held as int32 so that a model's cast to another dtype leaves them alone
    kind           [0, group_size or 0] in the dtype of x: what no other operand says

A token with a NaN or infinite input has NaN in every output. A token whose largest input is below 2^-112 loses bits.

The gradient of x is g W, with the dense weight W, which is built for it and freed. The packed weight has none.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sparsekern.formats.bitmap_int8 import BitmapInt8
from sparsekern.ops import compiled
from sparsekern.ops.kernel import Kernel, never_refuses
from sparsekern.ops.linear_call import CpuLinear, check_product, weight_op

PANEL_ROWS = 16
BLOCK_INPUTS = 64
TAIL_BYTES = 576

Operands = tuple[Tensor, ...]

_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def reference(x: Tensor, packed: BitmapInt8, bias: Tensor | None) -> Tensor:
    """Multiply by the integers times their scales, in float32.

    x     [..., in_features], the dtype of `packed`
    bias  [out_features] or None

    Returns y [..., out_features].
    """
    return linear(x.float(), packed.dequantised(), None if bias is None else bias.float()).to(x.dtype)


def to_panels(packed: BitmapInt8, isa: str = "") -> Operands:
    """What the compiled kernels read. Raises ValueError as BitmapInt8.validate does."""
    packed.validate_shapes()
    out_features, in_features = packed.shape
    panels, blocks = -(-out_features // PANEL_ROWS), -(-in_features // BLOCK_INPUTS)
    fields = [tensor.contiguous() for tensor in (packed.values, packed.bitmap, packed.row_offsets)]
    masks = torch.empty(panels, blocks, BLOCK_INPUTS // 4, dtype=torch.int64)
    values = torch.empty(len(packed.values) + TAIL_BYTES, dtype=torch.int8)
    panel_offsets = torch.empty(panels + 1, dtype=torch.int64)
    sizes = [part for tensor in fields for part in (tensor.data_ptr(), tensor.numel())]
    targets = [part for tensor in (masks, values, panel_offsets) for part in (tensor.data_ptr(), tensor.numel())]
    row = compiled.cpu().bitmap_int8_to_panels(*sizes, *packed.shape, *targets, torch.get_num_threads(), isa)
    if row >= 0:
        packed.validate()
        raise RuntimeError(f"row {row} changed while it was read")
    return masks, values, panel_offsets, *scales_and_kind(packed)


def scales_and_kind(packed: BitmapInt8) -> Operands:
    """The last two operands, as above."""
    out_features, _ = packed.shape
    panels = -(-out_features // PANEL_ROWS)
    scales = pad(packed.scales, (0, 0, 0, panels * PANEL_ROWS - out_features))
    scales = scales.view(panels, PANEL_ROWS, packed.groups).transpose(1, 2).contiguous()
    return scales.view(torch.int32), torch.empty(0, packed.group_size or 0, dtype=packed.dtype)


def scales_of_rows(panel_scales: Tensor, out_features: int) -> Tensor:
    """[out_features, groups] float32, of what scales_and_kind has made."""
    return panel_scales.view(torch.float32).transpose(1, 2).flatten(0, 1)[:out_features].contiguous()


def from_panels(operands: Operands, out_features: int, in_features: int, isa: str = "") -> BitmapInt8:
    """The inverse of `to_panels`, bit for bit. Raises ValueError when the operands contradict each other."""
    weight = _addresses(operands, out_features, in_features)
    _, panel_values, panel_offsets, panel_scales, kind = operands
    values = torch.empty(int(panel_offsets[-1]), dtype=torch.int8)
    bitmap = torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8)
    row_offsets = torch.empty(out_features + 1, dtype=torch.int64)
    targets = [part for tensor in (values, bitmap, row_offsets) for part in (tensor.data_ptr(), tensor.numel())]
    panel = compiled.cpu().panels_to_bitmap_int8(weight, *targets, torch.get_num_threads(), isa)
    if panel >= 0:
        raise ValueError(
            f"masks of panel {panel} must keep as many weights as panel_offsets say, and none after the last row or "
            "input"
        )
    scales = scales_of_rows(panel_scales, out_features)
    return BitmapInt8(values, scales, bitmap, row_offsets, in_features, kind.shape[1] or None, kind.dtype)


def _addresses(operands: Operands, out_features: int, in_features: int):
    """Where the operands lie: for the compiled module, which checks sizes and offsets, and keeps no tensor."""
    return compiled.cpu().BitmapInt8Weight(operands, out_features, in_features)


def sparse(x: Tensor, operands: Operands, bias: Tensor | None, y: Tensor, in_features: int, isa: str = "") -> None:
    """Write y [..., out_features] with the compiled kernel of an instruction set ("" = the best this machine has).

    x     [..., in_features] contiguous
    bias  [out_features] contiguous, or None
    """
    compiled.cpu().linear_bitmap_int8(operands, y.shape[-1], in_features, x, bias, y, torch.get_num_threads(), isa)


def expand(operands: Operands, dense: Tensor, panels: range, out_features: int, isa: str = "") -> None:
    """Write the rows of `panels` to dense [rows, in_features] with the compiled kernel of an instruction set."""
    compiled.cpu().expand_bitmap_int8(
        _addresses(operands, out_features, dense.shape[1]),
        dense.data_ptr(),
        dense.numel(),
        panels.start,
        panels.stop,
        torch.get_num_threads(),
        isa,
    )


def _expanded(operands: Operands, out_features: int, in_features: int) -> Tensor:
    dense = operands[4].new_empty(out_features, in_features)
    expand(operands, dense, range(len(operands[2]) - 1), out_features)
    return dense


_OPERANDS = ("masks", "values", "panel_offsets", "scales", "kind")
_WEIGHT = weight_op("linear_bitmap_int8_cpu_weight", _OPERANDS, "kind", _expanded)
_LINEAR = CpuLinear("linear_bitmap_int8_cpu", _OPERANDS, "kind", sparse, _WEIGHT)


def dense_cpu(operands: Operands, out_features: int, in_features: int) -> Tensor:
    """The dense weight of what the CPU kernel reads: the integers times their scales, rounded to the dtype of x."""
    return _WEIGHT(operands, out_features, in_features)


def run_cpu(x: Tensor, operands: Operands, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """y [..., out_features] by the compiled kernels, from what to_panels has made."""
    return _LINEAR.run(x, operands, bias, out_features, in_features)


def cpu_refuses(packed: BitmapInt8) -> str | None:
    """Why run_cpu cannot serve a weight; None: it can."""
    if packed.device.type != "cpu":
        return f"the weight must be on the CPU, got {packed.device}"
    if packed.dtype not in _NAMES:
        return f"x must be bfloat16 or float32, got {packed.dtype}"
    if packed.groups > 1 and packed.group_size % BLOCK_INPUTS:
        return f"group_size must be a multiple of {BLOCK_INPUTS}, got {packed.group_size}"
    return compiled.why_not("cpu")


def _as_saved(packed: BitmapInt8) -> Operands:
    packed.validate()
    kind = torch.empty(0, packed.group_size or 0, dtype=packed.dtype, device=packed.device)
    return packed.values, packed.scales.view(torch.int32), packed.bitmap, packed.row_offsets, kind


def _from_saved(operands: Operands, out_features: int, in_features: int) -> BitmapInt8:
    values, scales, bitmap, row_offsets, kind = operands
    scales, group_size = scales.view(torch.float32), kind.shape[1] or None
    return BitmapInt8(values, scales, bitmap, row_offsets, in_features, group_size, kind.dtype)


def _run_reference(x: Tensor, operands: Operands, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    packed = _from_saved(operands, out_features, in_features)
    check_product(x, operands[4], bias, in_features)
    return reference(x, packed, bias)


def _dense_from_saved(operands: Operands, out_features: int, in_features: int) -> Tensor:
    return _from_saved(operands, out_features, in_features).to_dense()


KERNELS = (
    Kernel("cpu", run_cpu, cpu_refuses, to_panels, from_panels, dense_cpu),
    Kernel("reference", _run_reference, never_refuses, _as_saved, _from_saved, _dense_from_saved),
)
