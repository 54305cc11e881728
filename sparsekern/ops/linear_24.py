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

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import bitmap_rows, compiled, cusparselt, fragments_24, linear_bitmap, pack_24, panels_24, wgmma_24
from sparsekern.ops.bitmap_panels import from_panels, to_panels
from sparsekern.ops.kernel import Kernel, never_refuses
from sparsekern.ops.linear_call import CpuLinear

_CUDA_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
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


def _decode(x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, y: Tensor) -> None:
    """Write y [tokens, out_features] from x [tokens, in_features], both contiguous, 0 to _DECODE_TOKENS tokens."""
    sizes = len(x), y.shape[1], x.shape[1]
    # a new one for each call: launches on two streams must not meet in it
    workspace = x.new_empty(compiled.cuda().linear_24_workspace(*sizes), dtype=torch.uint8)
    _launch("linear_24", x, operands, bias, y, workspace=workspace.data_ptr(), workspace_size=workspace.numel())


def _prefill(x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, y: Tensor) -> None:
    """The same for any number of tokens, made for many."""
    _launch("linear_24_prefill", x, operands, bias, y)


def _launch(
    name: str, x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, y: Tensor, **workspace: int
) -> None:
    values, metadata = operands
    getattr(compiled.cuda(), f"{name}_{_CUDA_NAMES[values.dtype]}")(
        x=x.data_ptr(),
        x_size=x.numel(),
        values=values.data_ptr(),
        values_size=values.numel(),
        metadata=metadata.data_ptr(),
        metadata_size=metadata.numel(),
        bias=0 if bias is None else bias.data_ptr(),
        bias_size=0 if bias is None else bias.numel(),
        y=y.data_ptr(),
        y_size=y.numel(),
        **workspace,
        tokens=len(x),
        out_features=y.shape[1],
        in_features=x.shape[1],
        stream=torch.cuda.current_stream().cuda_stream,
    )


def _linear_24_cuda(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    _check_cuda(x, values, bias, in_features)
    tokens = x.shape[:-1].numel()
    # not a view: autograd lets nobody write to one that an op has returned
    y = x.new_empty(*x.shape[:-1], out_features)
    bias = None if bias is None else bias.contiguous()
    multiply = _decode if tokens <= _DECODE_TOKENS else _prefill
    # a launch goes to the current device
    with torch.cuda.device(x.device):
        multiply(x.reshape(tokens, in_features).contiguous(), (values, metadata), bias, y.view(tokens, out_features))
    return y


def _linear_24_expanded(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    _check_cuda(x, values, bias, in_features)
    return linear(x, dense_cuda((values, metadata), out_features, in_features), bias)


def _check_cuda(x: Tensor, values: Tensor, bias: Tensor | None, in_features: int) -> None:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must end with in_features = {in_features}, got shape {list(x.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (values.dtype, values.device):
            raise ValueError(
                f"{name} must be {values.dtype} on {values.device} as the weight is, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def _linear_24_fake(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    _, values, metadata, _, *ctx.sizes = inputs
    ctx.save_for_backward(values, metadata)


def _backward_cuda(ctx, g: Tensor) -> tuple:
    gx = g @ dense_cuda(ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[0] else None
    gb = g.sum_to_size(g.shape[-1]) if ctx.needs_input_grad[3] else None
    return gx, None, None, gb, None, None


_LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")
for _name, _implementation in (("linear_24_cuda", _linear_24_cuda), ("linear_24_expanded", _linear_24_expanded)):
    _LIBRARY.define(
        f"{_name}(Tensor x, Tensor values, Tensor metadata, Tensor? bias, int out_features, int in_features) -> Tensor"
    )
    _LIBRARY.impl(_name, _implementation, "CUDA")
    torch.library.register_fake(f"sparsekern::{_name}", _linear_24_fake, lib=_LIBRARY)
    torch.library.register_autograd(f"sparsekern::{_name}", _backward_cuda, setup_context=_keep, lib=_LIBRARY)


def run_cuda(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """y [..., out_features] by the tensor cores, from what fragments_24 has made."""
    return torch.ops.sparsekern.linear_24_cuda(x, *operands, bias, out_features, in_features)


def run_expanded(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """The same by torch's own linear, with the dense weight that each call makes and frees; NaN and inf reach all."""
    return torch.ops.sparsekern.linear_24_expanded(x, *operands, bias, out_features, in_features)


def dense_cuda(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> Tensor:
    """The dense weight of what the CUDA kernel reads."""
    return fragments_24.to_dense(operands, out_features, in_features)


def cuda_refuses(packed: SemiStructured) -> str | None:
    """Why run_cuda and run_expanded cannot serve a weight; None: they can."""
    if packed.device.type != "cuda":
        return f"the weight must be on a CUDA device, got {packed.device}"
    if packed.dtype not in _CUDA_NAMES:
        return f"the weight must be bfloat16 or float16, got {packed.dtype}"
    if packed.shape[1] > _MOST_INPUTS:
        return f"in_features must be at most {_MOST_INPUTS}, got {packed.shape[1]}"
    major, minor = torch.cuda.get_device_capability(packed.device)
    if major < 8:
        return f"the card must have compute capability 8.0 or more, got {major}.{minor}"
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
    if packed.device.type != "cpu":
        return f"the weight must be on the CPU, got {packed.device}"
    if packed.dtype != torch.bfloat16:
        return f"the weight must be bfloat16, got {packed.dtype}"
    if reason := compiled.why_not("cpu"):
        return reason
    if compiled.cpu().linear_24_sets()[0] == "portable":
        return "the processor must have AVX-512 with VBMI: without them the bitmap's kernels are faster"
    return None


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
    Kernel("cuda", run_cuda, cuda_refuses, fragments_24.prepare, fragments_24.reference_inverse, dense_cuda),
    Kernel(
        "cuda_expanded", run_expanded, cuda_refuses, fragments_24.prepare, fragments_24.reference_inverse, dense_cuda
    ),
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
