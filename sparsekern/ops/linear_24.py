"""linear_24: y = x W^T + bias with W packed 2:4 (formats/semi_structured.py).

`prepare` turns the packed weight into the tensors that a kernel reads, once; `restore` gives it back bit for bit.

On a card the weight is kept in the order of the tensor cores' mma.sp (fragments_24.py), 9/16 of the dense bytes and a
little more where in_features is no multiple of 256 or out_features none of 16. Up to `_DECODE_TOKENS` tokens one kernel
reads it once; for more, another one multiplies tiles of outputs and tokens. Both multiply what is kept and nothing
else: NaN and inf in x at a pruned input do not reach the output, but for groups that keep fewer than two weights, whose
zeros are multiplied as weights are.

On the CPU a bfloat16 weight is kept in panels (panels_24.py), 9/16 of the dense bytes, where the processor has AVX-512
with VBMI: a shuffle brings each value its input, so that half of the dense arithmetic is left too. It multiplies what
the tensor cores do. A processor with AVX512_BF16 takes subnormal weights and inputs for zero.

Elsewhere linear_bitmap's kernels serve, for a bitmap takes the same bytes but for 8 a row. In a group that keeps fewer
than two weights their `restore` puts the zeros where SemiStructured.pack does.

The gradient of x is g W, with the dense weight W, which is built for it and freed. The packed weight has none.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import bitmap_rows, compiled, cusparselt, fragments_24, linear_bitmap, pack_24, panels_24, wgmma_24
from sparsekern.ops.bitmap_panels import from_panels, to_panels
from sparsekern.ops.kernel import Kernel, device_refuses, never_refuses
from sparsekern.ops.linear_call import CUDA_NAMES, CpuLinear, CudaLinear, laid_out, through

# the most that the first CUDA kernel takes at once: kLinear24Tokens of csrc/cuda/ops.h
_DECODE_TOKENS = 64
# the most that the second one counts: kLinear24PrefillInputs
_MOST_INPUTS = 1 << 23


def reference(x: Tensor, packed: SemiStructured, bias: Tensor | None) -> Tensor:
    """Multiply by the dense weight.

    x     [..., in_features], the dtype of the values
    bias  [out_features] or None

    Returns y [..., out_features].
    """
    return linear(x, packed.to_dense(), bias)


def _bitmap(packed: SemiStructured) -> Bitmap:
    packed.validate()
    return bitmap_rows.pack(pack_24.to_dense(packed))


def _to_panels(packed: SemiStructured) -> tuple[Tensor, ...]:
    return to_panels(_bitmap(packed))


def _from_panels(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> SemiStructured:
    return SemiStructured.pack(bitmap_rows.to_dense(from_panels(operands, out_features, in_features)))


def _to_rows(packed: SemiStructured) -> tuple[Tensor, ...]:
    bitmap = _bitmap(packed)
    return bitmap.values, bitmap.bitmap, bitmap.row_offsets


def _from_rows(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> SemiStructured:
    return pack_24.pack(bitmap_rows.to_dense(Bitmap(*operands, in_features)))


def _as_saved(packed: SemiStructured) -> tuple[Tensor, Tensor]:
    packed.validate()
    return packed.values, packed.metadata


def _from_saved(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> SemiStructured:
    return SemiStructured(*operands, in_features)


def _dense_from_saved(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> Tensor:
    return SemiStructured(*operands, in_features).to_dense()


def _run(x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    return reference(x, SemiStructured(*operands, in_features), bias)


@functools.cache
def _workspace_bytes(card: int, tokens: int, out_features: int, in_features: int) -> int:
    with torch.cuda.device(card):
        return compiled.cuda().linear_24_workspace(tokens, out_features, in_features)


def _multiply_cuda(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    name, workspace, (x, bias, y) = "linear_24_prefill", {}, laid_out(x, bias, out_features)
    tokens = x.shape[:-1].numel()
    if tokens <= _DECODE_TOKENS:
        needed = _workspace_bytes(x.get_device(), tokens, out_features, in_features)
        # a new one for each call: launches on two streams must not meet in it
        name, workspace = "linear_24", {"workspace": x.new_empty(needed, dtype=torch.uint8) if needed else None}
    compiled.launch(
        getattr(compiled.cuda(), f"{name}_{CUDA_NAMES[x.dtype]}"),
        x=x,
        values=operands[0],
        metadata=operands[1],
        bias=bias,
        y=y,
        **workspace,
        tokens=tokens,
        out_features=out_features,
        in_features=in_features,
    )
    return y


_OPERANDS = ("values", "metadata")
_CUDA = CudaLinear("linear_24_cuda", _OPERANDS, "values", _multiply_cuda, fragments_24.to_dense)
_EXPANDED = CudaLinear("linear_24_expanded", _OPERANDS, "values", through(fragments_24.to_dense), fragments_24.to_dense)


def run_cuda(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """y [..., out_features] by the tensor cores, from what fragments_24 has made."""
    return _CUDA.run(x, operands, bias, out_features, in_features)


def run_expanded(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """The same by torch's own linear, with the dense weight that each call makes and frees; NaN and inf reach all."""
    return _EXPANDED.run(x, operands, bias, out_features, in_features)


def cuda_refuses(packed: SemiStructured) -> str | None:
    """Why run_cuda and run_expanded cannot serve a weight; None: they can."""
    if reason := device_refuses(packed, "cuda", fragments_24.DTYPES):
        return reason
    if packed.shape[1] > _MOST_INPUTS:
        return f"in_features must be at most {_MOST_INPUTS}, got {packed.shape[1]}"
    return compiled.why_not("cuda")


def multiply(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, y: Tensor, in_features: int, isa: str = ""
) -> None:
    """Write y [..., out_features] with the compiled kernel of an instruction set ("" = the best this machine has).

    x     [..., in_features] bfloat16, contiguous
    bias  [out_features] contiguous, or None
    """
    compiled.cpu().linear_24(operands, y.shape[-1], in_features, x, bias, y, torch.get_num_threads(), isa)


def dense_cpu(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> Tensor:
    """The dense weight of what the CPU kernel reads."""
    return panels_24.unchecked_inverse(operands, out_features, in_features).to_dense()


_LINEAR_CPU = CpuLinear("linear_24_cpu", ("values", "positions"), "values", multiply, dense_cpu)


def run_cpu(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """y [..., out_features] by the compiled kernels, from what panels_24 has made."""
    return _LINEAR_CPU.run(x, operands, bias, out_features, in_features)


def cpu_refuses(packed: SemiStructured) -> str | None:
    """Why run_cpu should not serve a weight; None: it should."""
    if reason := device_refuses(packed, "cpu", (torch.bfloat16,)) or compiled.why_not("cpu"):
        return reason
    if compiled.cpu().linear_24_sets()[0] == "portable":
        return "the processor must have AVX-512 with VBMI: without them the bitmap's kernels are faster"
    return None


_CONVERSIONS = (fragments_24.prepare, fragments_24.reference_inverse, fragments_24.to_dense)
KERNELS = (
    Kernel("cpu", run_cpu, cpu_refuses, panels_24.reference, panels_24.reference_inverse, dense_cpu),
    Kernel(
        "cpu_bitmap",
        linear_bitmap.run_cpu,
        linear_bitmap.cpu_refuses,
        _to_panels,
        _from_panels,
        linear_bitmap.dense_cpu,
    ),
    Kernel("cuda", run_cuda, cuda_refuses, *_CONVERSIONS),
    Kernel("cuda_expanded", run_expanded, cuda_refuses, *_CONVERSIONS),
    Kernel("wgmma", wgmma_24.run, wgmma_24.refuses, wgmma_24.prepare, wgmma_24.restore, wgmma_24.dense),
    Kernel(
        "cuda_bitmap",
        linear_bitmap.run_cuda,
        linear_bitmap.cuda_refuses,
        _to_rows,
        _from_rows,
        linear_bitmap.dense_cuda,
    ),
    Kernel("cusparselt", cusparselt.run, cusparselt.refuses, cusparselt.prepare, cusparselt.restore, cusparselt.dense),
    Kernel("reference", _run, never_refuses, _as_saved, _from_saved, _dense_from_saved),
)
