"""linear_bitmap: y = x W^T + bias with W packed as a bitmap and the kept values (formats/bitmap.py).

Few tokens wait for the weight to arrive from memory, so half the bytes are nearly half the time; many tokens wait for
the arithmetic. On AVX-512, where tokens are many and kept weights few enough, the kernels pass the zeros over, in
bfloat16 pairs of them, when all of x is finite. Otherwise a zero costs as much as any weight: from `_DENSE_TOKENS` on,
where torch has instructions that the kernel has not, the weight is expanded, a slice at a time, for torch's own linear.

The CPU kernels read the weight in panels of 16 outputs (bitmap_panels.py). On a card 2-byte weights go to the tensor
cores (linear_bitmap_fragments.py); the simple CUDA kernel, float32's, reads the weight as it is saved.

NaN and inf in x reach every output, as in the dense product. On a processor with AVX512_BF16 subnormal weights and
inputs count as zero.

The gradient of x is g W, with the dense weight W, which is built for it and freed: slow beside the forward pass. The
packed weight has none.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsekern.formats import SemiStructured
from sparsekern.formats.bitmap import DTYPES, Bitmap
from sparsekern.ops import bitmap_rows, compiled, linear_bitmap_fragments, linear_call
from sparsekern.ops.bitmap_panels import PANEL_ROWS, addresses, from_panels, to_panels
from sparsekern.ops.kernel import Kernel, device_refuses, never_refuses
from sparsekern.ops.linear_call import CUDA_NAMES, check_product, laid_out

Packed = Bitmap | SemiStructured

# measured on Zen 5, 4096 x 4096 at 50 %: torch's product of bfloat16, the expansion with it, overtakes kernels without
# instructions for bfloat16 between 192 and 200 tokens. At 2048 tokens of float32 the sparse kernel was 3.2 times as
# fast on AVX-512 and 1.1 times on AVX2, of float16 9.6 times: what is here is for plain C++, not measured
_DENSE_TOKENS = {torch.bfloat16: 192, torch.float16: 2048, torch.float32: 2048}
# instruction sets that leave zeros out without instructions for bfloat16, and the share of kept weights up to which
# they are as fast as torch with such: at 30 %, 8.3 against 8.7 ms at 200 tokens and 35 against 41 at 1024
_NONZERO_SETS = ("avx512", "avx512bw")
_NONZERO_SHARE = 0.33
# of the instruction sets that multiply bfloat16: by the tiles of AMX as fast as torch, which multiplies after the same
# expansion, not measured yet; None: never. Where the processor has none of them torch has no fast product either: with
# oneDNN and ATen kept to AVX2 and to AVX-512 the sparse kernels were 3.6 and 2.7 times as fast at 256 tokens
_BFLOAT16_DENSE_TOKENS = {"amx_bf16": 1024, "avx512_bf16": None}
# fewer than any of these
_FEWEST_DENSE_TOKENS = 192
# the CUDA kernel decodes the weight once for four tokens; not measured yet
_CUDA_DENSE_TOKENS = 32
# a slice of the expanded weight stays in the cache until it is multiplied
_SLICE_BYTES = 4 << 20


def reference(x: Tensor, packed: Bitmap, bias: Tensor | None) -> Tensor:
    """Multiply by the dense weight.

    x     [..., in_features], the dtype of the values
    bias  [out_features] or None

    Returns y [..., out_features].
    """
    return linear(x, packed.to_dense(), bias)


def sparse(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, y: Tensor, in_features: int, isa: str = ""
) -> None:
    """Write y [..., out_features] with the compiled kernel of an instruction set ("" = the best this machine has).

    x     [..., in_features] contiguous
    bias  [out_features] contiguous, or None
    """
    compiled.cpu().linear_bitmap(operands, y.shape[-1], in_features, x, bias, y, torch.get_num_threads(), isa)


def expand(operands: tuple[Tensor, ...], dense: Tensor, panels: range, out_features: int, isa: str = "") -> None:
    """Write the rows of `panels` to dense [rows, in_features] with the compiled kernel of an instruction set."""
    weight = addresses(operands, out_features, dense.shape[1])
    compiled.cpu().expand_bitmap(
        weight, dense.data_ptr(), dense.numel(), panels.start, panels.stop, torch.get_num_threads(), isa
    )


def through_dense(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, y: Tensor, in_features: int, isa: str = ""
) -> None:
    """What `sparse` does, by torch's linear on one slice of the expanded weight after the other."""
    out_features = y.shape[-1]
    y = y.view(y.shape[:-1].numel(), out_features)
    x = x.view(len(y), in_features)
    panels = len(operands[2]) - 1
    step = max(1, _SLICE_BYTES // (PANEL_ROWS * in_features * x.itemsize or 1))
    scratch = x.new_empty(min(step * PANEL_ROWS, out_features), in_features)
    for first in range(0, panels, step):
        end = min(first + step, panels)
        rows = slice(first * PANEL_ROWS, min(end * PANEL_ROWS, out_features))
        dense = scratch[: rows.stop - rows.start]
        expand(operands, dense, range(first, end), out_features, isa)
        y[:, rows] = linear(x, dense, None if bias is None else bias[rows])


@functools.cache
def _dense_tokens(dtype: torch.dtype, isa: str, few_kept: bool) -> float:
    if dtype == torch.bfloat16 and isa in _BFLOAT16_DENSE_TOKENS:
        return _BFLOAT16_DENSE_TOKENS[isa] or math.inf
    if few_kept and isa in _NONZERO_SETS:
        return math.inf
    sets_that_multiply = _BFLOAT16_DENSE_TOKENS.keys() & {*compiled.cpu().instruction_sets()}
    torch_is_fast = dtype == torch.bfloat16 and sets_that_multiply
    return _DENSE_TOKENS[dtype] if torch_is_fast or isa == "portable" else math.inf


def _multiply(x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, y: Tensor, in_features: int) -> None:
    if x.numel() < _FEWEST_DENSE_TOKENS * in_features:
        sparse(x, operands, bias, y, in_features)
        return
    check_product(x, operands[1], bias, in_features)
    few_kept = len(operands[1]) <= _NONZERO_SHARE * y.shape[-1] * in_features
    few = x.shape[:-1].numel() < _dense_tokens(x.dtype, compiled.cpu().isa(), few_kept)
    (sparse if few else through_dense)(x, operands, bias, y, in_features)


def _expanded(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> Tensor:
    dense = operands[1].new_empty(out_features, in_features)
    expand(operands, dense, range(len(operands[2]) - 1), out_features)
    return dense


_OPERANDS = ("masks", "values", "panel_offsets")
_WEIGHT = linear_call.weight_op("linear_bitmap_cpu_weight", _OPERANDS, "values", _expanded)
_LINEAR = linear_call.CpuLinear("linear_bitmap_cpu", _OPERANDS, "values", _multiply, _WEIGHT)


def dense_cpu(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> Tensor:
    """The dense weight of what the CPU kernel reads."""
    return _WEIGHT(operands, out_features, in_features)


def run_cpu(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """y [..., out_features] by the compiled kernels, from what to_panels has made."""
    return _LINEAR.run(x, operands, bias, out_features, in_features)


def cpu_refuses(packed: Packed) -> str | None:
    """Why run_cpu cannot serve a weight, in whatever format it is saved; None: it can."""
    return device_refuses(packed, "cpu", DTYPES) or compiled.why_not("cpu")


def dense_cuda(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> Tensor:
    """The dense weight of the tensors of a Bitmap, which were checked when they were prepared, by a CUDA kernel."""
    return torch.ops.sparsekern.bitmap_to_dense(*operands, in_features)[0]


def _multiply_cuda(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    tokens, (values, bitmap, row_offsets) = x.shape[:-1].numel(), operands
    if tokens >= _CUDA_DENSE_TOKENS:
        return _by_dense(x, operands, bias, out_features, in_features)
    x, bias, y = laid_out(x, bias, out_features)
    compiled.launch(
        getattr(compiled.cuda(), f"linear_bitmap_{CUDA_NAMES[x.dtype]}"),
        x=x,
        values=values.data_ptr(),
        bitmap=bitmap,
        row_offsets=row_offsets,
        bias=bias,
        y=y,
        tokens=tokens,
        in_features=in_features,
    )
    return y


_by_dense = linear_call.through(dense_cuda)
_CUDA = linear_call.CudaLinear(
    "linear_bitmap_cuda",
    ("values", "bitmap", "row_offsets"),
    "values",
    _multiply_cuda,
    dense_cuda,
    rows_of=lambda operands: operands[2].shape[0] - 1,
)


def run_cuda(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """y [..., out_features] by the CUDA kernel, from the tensors of a Bitmap."""
    return _CUDA.run(x, operands, bias, out_features, in_features)


def cuda_refuses(packed: Packed) -> str | None:
    """Why run_cuda cannot serve a weight, in whatever format it is saved; None: it can."""
    return device_refuses(packed, "cuda", DTYPES) or compiled.why_not("cuda")


def _as_saved(packed: Bitmap) -> tuple[Tensor, ...]:
    bitmap_rows.validate(packed)
    return packed.values, packed.bitmap, packed.row_offsets


def _from_saved(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> Bitmap:
    return Bitmap(*operands, in_features)


def dense_from_saved(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> Tensor:
    """The dense weight of the tensors of a Bitmap."""
    return Bitmap(*operands, in_features).to_dense()


def _run_reference(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    return reference(x, Bitmap(*operands, in_features), bias)


KERNELS = (
    Kernel("cpu", run_cpu, cpu_refuses, to_panels, from_panels, dense_cpu),
    *linear_bitmap_fragments.KERNELS[:-1],
    Kernel("cuda_rows", run_cuda, cuda_refuses, _as_saved, _from_saved, dense_cuda),
    Kernel("reference", _run_reference, never_refuses, _as_saved, _from_saved, dense_from_saved),
)
