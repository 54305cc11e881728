"""linear_bitmap_index: linear_bitmap for a weight with few kept weights, each with its place instead of a bit a weight.

Where one weight of ten is kept, a bitmap's kernel works its way through ten bits for each. Here a step takes four kept
weights of each of 16 outputs from a window of 128 inputs, which the processor holds in registers: their places are
looked up there, 64 at once. A kept weight takes 3 bytes, a step 8 more: about 0.32 bytes a weight at 90 %, as a bitmap.

    steps          [panels, windows] int16, how many steps of a window
    masks          [all steps] int64, which of a step's 64 lanes hold a weight (csrc/ops.h)
    places         [kept] uint8, the input within its window, and TAIL zeros that a kernel may touch
    values         [kept] bfloat16, and as many zeros
    step_offsets, value_offsets  [panels + 1] int64, where each panel's masks and values start

The order is made on load, from a weight as it is saved. A token with a NaN or infinite input has NaN in every output;
subnormal weights and inputs count as zero. The gradient of x is g W, with the dense weight W, which is built for it.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsekern.formats.bitmap import Bitmap
from sparsekern.formats.bitmap_int8 import BitmapInt8
from sparsekern.ops import bitmap_rows, compiled
from sparsekern.ops.kernel import Kernel, device_refuses
from sparsekern.ops.linear_call import CpuLinear, weight_op

PANEL_ROWS = 16
WINDOW_INPUTS = 128
TAIL = 64
# measured on Zen 5, 4096 x 4096: with 19 % kept it is as fast as the bitmap's kernel, with 15 % a fifth faster
MOST_DENSITY = 0.2

Operands = tuple[Tensor, ...]


def reference(x: Tensor, packed: Bitmap, bias: Tensor | None) -> Tensor:
    """Multiply by the dense weight.

    x     [..., in_features] bfloat16
    bias  [out_features] or None

    Returns y [..., out_features].
    """
    return linear(x, packed.to_dense(), bias)


def to_index(packed: Bitmap) -> Operands:
    """What the compiled kernel reads. Raises ValueError as Bitmap.validate does."""
    bitmap_rows.validate(packed)
    return steps_of(packed)


def steps_of(packed: Bitmap | BitmapInt8) -> Operands:
    """A validated weight in the order above; its values may be int8 too, in the order of the bits then (csrc/ops.h)."""
    out_features, in_features = packed.shape
    panels, windows = -(-out_features // PANEL_ROWS), -(-in_features // WINDOW_INPUTS)
    fields = [tensor.contiguous() for tensor in (packed.values, packed.bitmap, packed.row_offsets)]
    rows = compiled.cpu().BitmapIndexRows(_name(packed.values), *_sizes(*fields), out_features, in_features)
    steps = torch.empty(panels, windows, dtype=torch.int16)
    step_offsets, value_offsets = (torch.empty(panels + 1, dtype=torch.int64) for _ in range(2))
    count = compiled.cpu().bitmap_to_index_steps(rows, *_sizes(steps, step_offsets, value_offsets))
    masks = compiled.in_huge_pages(torch.empty(count, dtype=torch.int64))
    places = compiled.in_huge_pages(torch.empty(len(packed.values) + TAIL, dtype=torch.uint8))
    values = compiled.in_huge_pages(packed.values.new_empty(len(packed.values) + TAIL))
    operands = steps, masks, places, values, step_offsets, value_offsets
    compiled.cpu().bitmap_to_index(rows, _addresses(operands, out_features, in_features), torch.get_num_threads())
    return operands


def from_index(operands: Operands, out_features: int, in_features: int) -> Bitmap:
    """The inverse of `to_index`, bit for bit. Raises ValueError when the operands contradict each other."""
    return Bitmap(*rows_of(operands, out_features, in_features), in_features)


def rows_of(operands: Operands, out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, bitmap and row_offsets of what `steps_of` has made. Raises ValueError as `from_index` does."""
    weight = _addresses(operands, out_features, in_features)
    values = operands[3].new_empty(len(operands[3]) - TAIL)
    bitmap = torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8)
    row_offsets = torch.empty(out_features + 1, dtype=torch.int64)
    panel = compiled.cpu().index_to_bitmap(weight, *_sizes(values, bitmap, row_offsets), torch.get_num_threads())
    if panel >= 0:
        raise ValueError(f"panel {panel} must keep as many weights as its offsets say, at places that rise in each row")
    return values, bitmap, row_offsets


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _sizes(*tensors: Tensor) -> list[int]:
    return [part for tensor in tensors for part in (tensor.data_ptr(), tensor.numel())]


def _addresses(operands: Operands, out_features: int, in_features: int):
    """Where the operands lie: for the compiled module, which checks sizes and offsets, and keeps no tensor."""
    return compiled.cpu().BitmapIndexWeight(_name(operands[3]), operands, out_features, in_features)


def _multiply(x: Tensor, operands: Operands, bias: Tensor | None, y: Tensor, in_features: int) -> None:
    compiled.cpu().linear_bitmap_index(operands, y.shape[-1], in_features, x, bias, y, torch.get_num_threads())


def _expanded(operands: Operands, out_features: int, in_features: int) -> Tensor:
    return bitmap_rows.to_dense(from_index(operands, out_features, in_features))


_OPERANDS = ("steps", "masks", "places", "values", "step_offsets", "value_offsets")
_WEIGHT = weight_op("linear_bitmap_index_cpu_weight", _OPERANDS, "values", _expanded)
_LINEAR = CpuLinear("linear_bitmap_index_cpu", _OPERANDS, "values", _multiply, _WEIGHT)


def dense(operands: Operands, out_features: int, in_features: int) -> Tensor:
    """The dense weight of what the kernel reads."""
    return _WEIGHT(operands, out_features, in_features)


def run(x: Tensor, operands: Operands, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """y [..., out_features] by the compiled kernel, from what to_index has made."""
    return _LINEAR.run(x, operands, bias, out_features, in_features)


def refuses(packed: Bitmap) -> str | None:
    """Why `run` cannot serve a weight, or never wins; None: it can."""
    if reason := device_refuses(packed, "cpu", (torch.bfloat16,)) or compiled.why_not("cpu"):
        return reason
    if not compiled.cpu().has_linear_bitmap_index():
        return "the processor must have AVX-512 with VBMI, VBMI2 and BF16"
    density = packed.values.numel() / max(packed.shape.numel(), 1)
    if density > MOST_DENSITY:
        return f"at most {MOST_DENSITY:.0%} of the weights may be kept, got {density:.0%}"
    return None


KERNELS = (Kernel("cpu_index", run, refuses, to_index, from_index, dense),)
