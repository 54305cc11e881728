"""linear_bitmap_int8_index: linear_bitmap_int8 for a weight with few kept weights, by the places of what is kept.

The order is that of linear_bitmap_index, with integers for values. A kept weight takes 2 bytes, a step of 64 places 8
more: 0.22 bytes a weight at 90 %, as a bitmap takes, but the work is that of the kept weights. So it is first where
compute is what takes time: below some 15 % kept at one token, and up to a third at 16 tokens.

    steps, masks, places  as in linear_bitmap_index
    values         [kept] int8 in the order of the bits, and TAIL zeros that a kernel may touch
    step_offsets, value_offsets  [panels + 1] int64, where each panel's masks and values start
    scales, kind   as in linear_bitmap_int8

What is computed is what linear_bitmap_int8 says, to the same bits, for a NaN or infinite input too. The gradient of x
is g W, with the dense weight W, which is built for it.
"""

import torch
from torch import Tensor

from sparsekern.formats.bitmap_int8 import BitmapInt8
from sparsekern.ops import compiled, linear_bitmap_index, linear_bitmap_int8
from sparsekern.ops.kernel import Kernel
from sparsekern.ops.linear_call import CpuLinear, weight_op

PANEL_ROWS = linear_bitmap_index.PANEL_ROWS
WINDOW_INPUTS = linear_bitmap_index.WINDOW_INPUTS
# measured on Zen 5, 4096 x 4096: a quarter faster than the bitmap's kernel at 16 tokens, a half slower at one
MOST_DENSITY = 0.35

Operands = tuple[Tensor, ...]


def reference(x: Tensor, packed: BitmapInt8, bias: Tensor | None) -> Tensor:
    """Multiply by the integers times their scales, in float32.

    x     [..., in_features], the dtype of `packed`
    bias  [out_features] or None

    Returns y [..., out_features].
    """
    return linear_bitmap_int8.reference(x, packed, bias)


def to_index(packed: BitmapInt8) -> Operands:
    """What the compiled kernel reads. Raises ValueError as BitmapInt8.validate does."""
    packed.validate()
    return *linear_bitmap_index.steps_of(packed), *linear_bitmap_int8.scales_and_kind(packed)


def from_index(operands: Operands, out_features: int, in_features: int) -> BitmapInt8:
    """The inverse of `to_index`, bit for bit. Raises ValueError when the operands contradict each other."""
    *steps, scales, kind = operands
    values, bitmap, row_offsets = linear_bitmap_index.rows_of(tuple(steps), out_features, in_features)
    scales = linear_bitmap_int8.scales_of_rows(scales, out_features)
    return BitmapInt8(values, scales, bitmap, row_offsets, in_features, kind.shape[1] or None, kind.dtype)


def _multiply(x: Tensor, operands: Operands, bias: Tensor | None, y: Tensor, in_features: int) -> None:
    compiled.cpu().linear_bitmap_int8_index(operands, y.shape[-1], in_features, x, bias, y, torch.get_num_threads())


def _expanded(operands: Operands, out_features: int, in_features: int) -> Tensor:
    return from_index(operands, out_features, in_features).to_dense()


_OPERANDS = ("steps", "masks", "places", "values", "step_offsets", "value_offsets", "scales", "kind")
_WEIGHT = weight_op("linear_bitmap_int8_index_cpu_weight", _OPERANDS, "kind", _expanded)
_LINEAR = CpuLinear("linear_bitmap_int8_index_cpu", _OPERANDS, "kind", _multiply, _WEIGHT)


def dense(operands: Operands, out_features: int, in_features: int) -> Tensor:
    """The dense weight of what the kernel reads: the integers times their scales, rounded to the dtype of x."""
    return _WEIGHT(operands, out_features, in_features)


def run(x: Tensor, operands: Operands, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """y [..., out_features] by the compiled kernel, from what to_index has made."""
    return _LINEAR.run(x, operands, bias, out_features, in_features)


def refuses(packed: BitmapInt8) -> str | None:
    """Why `run` cannot serve a weight, or never wins; None: it can."""
    if reason := linear_bitmap_int8.cpu_refuses(packed):
        return reason
    if packed.groups > 1 and packed.group_size % WINDOW_INPUTS:
        return f"group_size must be a multiple of {WINDOW_INPUTS}, got {packed.group_size}"
    if not compiled.cpu().has_linear_bitmap_int8_index():
        return "the processor must have AVX-512 with VBMI, VBMI2 and VNNI"
    density = packed.values.numel() / max(packed.shape.numel(), 1)
    if density > MOST_DENSITY:
        return f"at most {MOST_DENSITY:.0%} of the weights may be kept, got {density:.0%}"
    return None


KERNELS = (Kernel("cpu_index", run, refuses, to_index, from_index, dense),)
