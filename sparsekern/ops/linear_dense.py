"""linear_dense: y = x W^T + bias with a dense W (formats/dense.py): what a sparse layer must beat, and falls back to.

The CPU kernels read the weight as the panels of linear_bitmap with every weight kept (csrc/ops.h):

    panels  [ceil(out_features / 16), 16 ceil(in_features / 32), 16, 2], input pair q of row n, zeros where W ends

NaN and inf in x reach every output. On a processor with AVX512_BF16 subnormal weights and inputs count as zero.

The gradient of x is g W, with W as a plain tensor, which is built for it and freed. The packed weight has none.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sparsekern.formats.dense import DTYPES, Dense
from sparsekern.ops import compiled
from sparsekern.ops.bitmap_panels import BLOCK_INPUTS, PANEL_ROWS
from sparsekern.ops.kernel import Kernel, device_refuses, never_refuses
from sparsekern.ops.linear_call import CpuLinear

_PAIRS = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}


def reference(x: Tensor, packed: Dense, bias: Tensor | None) -> Tensor:
    """Multiply by torch's own linear.

    x     [..., in_features], the dtype of the weight
    bias  [out_features] or None

    Returns y [..., out_features].
    """
    return linear(x, packed.weight, bias)


def to_panels(packed: Dense) -> tuple[Tensor]:
    """The panels that the compiled kernels read. Raises ValueError as Dense.validate does."""
    packed.validate()
    out_features, in_features = packed.shape
    panels, pairs = -(-out_features // PANEL_ROWS), -(-in_features // BLOCK_INPUTS) * BLOCK_INPUTS // 2
    missing = 2 * pairs - in_features, panels * PANEL_ROWS - out_features
    weight = pad(packed.weight, (0, missing[0], 0, missing[1])) if any(missing) else packed.weight
    if not weight.numel():
        return (weight.new_empty(panels, pairs, PANEL_ROWS, 2),)
    # a pair as one number: twice as fast as moving single weights
    by_rows = weight.view(_PAIRS[weight.dtype]).view(panels, PANEL_ROWS, pairs)
    by_pairs = compiled.copy(by_rows.transpose(1, 2))
    return (by_pairs.view(weight.dtype).view(panels, pairs, PANEL_ROWS, 2),)


def from_panels(operands: tuple[Tensor], out_features: int, in_features: int) -> Dense:
    """The inverse of `to_panels`, bit for bit. Raises ValueError for panels of another weight's size."""
    (panels,) = operands
    pairs = -(-in_features // BLOCK_INPUTS) * BLOCK_INPUTS // 2
    size = [-(-out_features // PANEL_ROWS), pairs, PANEL_ROWS, 2]
    if list(panels.shape) != size:
        raise ValueError(f"panels must be {size}, got {list(panels.shape)}")
    rows = panels.transpose(1, 2).reshape(size[0] * PANEL_ROWS, pairs * 2)
    return Dense(rows[:out_features, :in_features].contiguous())


def multiply(x: Tensor, panels: Tensor, bias: Tensor | None, y: Tensor, in_features: int, isa: str = "") -> None:
    """Write y [..., out_features] with the compiled kernel of an instruction set ("" = the best this machine has).

    x     [..., in_features] contiguous
    bias  [out_features] contiguous, or None
    """
    compiled.cpu().linear_dense((panels,), y.shape[-1], in_features, x, bias, y, torch.get_num_threads(), isa)


def _multiply(x: Tensor, operands: tuple[Tensor], bias: Tensor | None, y: Tensor, in_features: int) -> None:
    multiply(x, operands[0].contiguous(), bias, y, in_features)


def _dense_cpu(operands: tuple[Tensor], out_features: int, in_features: int) -> Tensor:
    return from_panels(operands, out_features, in_features).weight


_LINEAR = CpuLinear("linear_dense_cpu", ("panels",), "panels", _multiply, _dense_cpu)


def _run_cpu(x: Tensor, operands: tuple[Tensor], bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    return _LINEAR.run(x, operands, bias, out_features, in_features)


def _cpu_refuses(packed: Dense) -> str | None:
    return device_refuses(packed, "cpu", DTYPES) or compiled.why_not("cpu")


def _as_saved(packed: Dense) -> tuple[Tensor]:
    packed.validate()
    return (packed.weight,)


def _from_saved(operands: tuple[Tensor], out_features: int, in_features: int) -> Dense:
    return Dense(*operands)


def _dense_from_saved(operands: tuple[Tensor], out_features: int, in_features: int) -> Tensor:
    return operands[0]


def _run(x: Tensor, operands: tuple[Tensor], bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    return linear(x, *operands, bias)


KERNELS = (
    Kernel("cpu", _run_cpu, _cpu_refuses, to_panels, from_panels, _dense_cpu),
    Kernel("reference", _run, never_refuses, _as_saved, _from_saved, _dense_from_saved),
)
