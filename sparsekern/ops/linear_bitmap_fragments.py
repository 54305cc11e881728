"""linear_bitmap_fragments: y = x W^T + bias on a card's tensor cores, W a bitmap in their order.

That order is bitmap_fragments.py's.

A warp rebuilds fragments of 16 outputs x 16 inputs in registers, at about 3.4 instructions a dense weight, and
multiplies each by up to 64 tokens: where the weight is read once from memory, the bytes that are left out are time that
is saved. More tokens than `_DECODE_TOKENS` wait for arithmetic: the weight is expanded once for torch's own linear.
Whether that is faster for fewer, a card knows: `cuda_expanded` does it for any number, so that a plan can measure it.

NaN and inf in x reach every output, as in the dense product. The same bits every time on the same card.

The gradient of x is g W, with the dense weight W, which is built for it and freed. The packed weight has none.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsekern.formats.bitmap import Bitmap
from sparsekern.ops import bitmap_fragments, compiled
from sparsekern.ops.bitmap_fragments import Fragments
from sparsekern.ops.kernel import Kernel, never_refuses

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# the most that the kernel takes at once: kBitmapFragmentsTokens of csrc/cuda/ops.h. Whether the expansion with torch's
# product overtakes earlier, no card has been asked
_DECODE_TOKENS = 64


def reference(x: Tensor, operands: Fragments, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """Multiply by the dense weight.

    x         [..., in_features], the dtype of the weight
    operands  as bitmap_fragments.reference makes them
    bias      [out_features] or None

    Returns y [..., out_features].
    """
    return linear(x, bitmap_fragments.reference_inverse(operands, out_features, in_features).to_dense(), bias)


def run(x: Tensor, operands: Fragments, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """y [..., out_features] by the tensor cores, from what bitmap_fragments has made."""
    return torch.ops.sparsekern.linear_bitmap_fragments(x, *operands, bias, out_features, in_features)


def run_expanded(x: Tensor, operands: Fragments, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """The same for any number of tokens by torch's own linear, with the dense weight that each call makes and frees."""
    return torch.ops.sparsekern.linear_bitmap_expanded(x, *operands, bias, out_features, in_features)


def refuses(packed: Bitmap) -> str | None:
    """Why `run` and `run_expanded` cannot serve a weight; None: they can."""
    if packed.device.type != "cuda":
        return f"the weight must be on a CUDA device, got {packed.device}"
    if packed.dtype not in _NAMES:
        return f"the weight must be bfloat16 or float16, got {packed.dtype}"
    major, minor = torch.cuda.get_device_capability(packed.device)
    if major < 8:
        return f"the card must have compute capability 8.0 or more, got {major}.{minor}"
    return compiled.why_not("cuda")


def _decode(x: Tensor, operands: Fragments, bias: Tensor | None, y: Tensor) -> None:
    """Write y [tokens, out_features] from x [tokens, in_features], both contiguous, 0 to _DECODE_TOKENS tokens."""
    (tokens, in_features), out_features = x.shape, y.shape[1]
    module, capacity = compiled.cuda(), len(operands[3])
    # a launch goes to the current device
    with torch.cuda.device(x.device):
        # a new one for each call: launches on two streams must not meet in it
        bytes_needed = module.linear_bitmap_fragments_workspace(tokens, capacity, out_features, in_features)
        workspace = x.new_empty(bytes_needed, dtype=torch.uint8)
        getattr(module, f"linear_bitmap_fragments_{_NAMES[x.dtype]}")(
            **bitmap_fragments.addresses(operands, out_features, in_features),
            x=x.data_ptr(),
            x_size=x.numel(),
            bias=0 if bias is None else bias.data_ptr(),
            bias_size=0 if bias is None else bias.numel(),
            y=y.data_ptr(),
            y_size=y.numel(),
            workspace=workspace.data_ptr(),
            workspace_size=workspace.numel(),
            tokens=tokens,
            stream=torch.cuda.current_stream().cuda_stream,
        )


def _cuda(
    x: Tensor,
    masks: Tensor,
    cells: Tensor,
    quad_rows: Tensor,
    capacity: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    operands, tokens = (masks, cells, quad_rows, capacity), x.shape[:-1].numel()
    if tokens > _DECODE_TOKENS:
        return _expanded(x, *operands, bias, out_features, in_features)
    _check(x, operands, bias, in_features)
    # not a view: autograd lets nobody write to one that an op has returned
    y = x.new_empty(*x.shape[:-1], out_features)
    bias = None if bias is None else bias.contiguous()
    _decode(x.reshape(tokens, in_features).contiguous(), operands, bias, y.view(tokens, out_features))
    return y


def _expanded(
    x: Tensor,
    masks: Tensor,
    cells: Tensor,
    quad_rows: Tensor,
    capacity: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    operands = (masks, cells, quad_rows, capacity)
    _check(x, operands, bias, in_features)
    return linear(x, bitmap_fragments.to_dense(operands, out_features, in_features), bias)


def _check(x: Tensor, operands: Fragments, bias: Tensor | None, in_features: int) -> None:
    masks, _, _, capacity = operands
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must end with in_features = {in_features}, got shape {list(x.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (capacity.dtype, masks.device):
            raise ValueError(
                f"{name} must be {capacity.dtype} on {masks.device} as the weight is, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def _fake(
    x: Tensor,
    masks: Tensor,
    cells: Tensor,
    quad_rows: Tensor,
    capacity: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    _, *operands, _, out_features, in_features = inputs
    ctx.save_for_backward(*operands)
    ctx.sizes = out_features, in_features


def _backward(ctx, g: Tensor) -> tuple:
    gx = g @ bitmap_fragments.to_dense(ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[0] else None
    gb = g.sum_to_size(g.shape[-1]) if ctx.needs_input_grad[5] else None
    return gx, None, None, None, None, gb, None, None


_LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")
for _name, _implementation in (("linear_bitmap_fragments", _cuda), ("linear_bitmap_expanded", _expanded)):
    _LIBRARY.define(
        f"{_name}(Tensor x, Tensor masks, Tensor cells, Tensor quad_rows, Tensor capacity, Tensor? bias, "
        "int out_features, int in_features) -> Tensor"
    )
    _LIBRARY.impl(_name, _implementation, "CUDA")
    torch.library.register_fake(f"sparsekern::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"sparsekern::{_name}", _backward, setup_context=_keep, lib=_LIBRARY)


_CONVERSIONS = (bitmap_fragments.prepare, bitmap_fragments.reference_inverse)
KERNELS = (
    Kernel("cuda", run, refuses, *_CONVERSIONS, bitmap_fragments.to_dense),
    Kernel("cuda_expanded", run_expanded, refuses, *_CONVERSIONS, bitmap_fragments.to_dense),
    Kernel("reference", reference, never_refuses, *_CONVERSIONS),
)
