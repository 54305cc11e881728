"""linear_bitmap_fragments: y = x W^T + bias on a card's tensor cores, W a bitmap in their order.

That order is bitmap_fragments.py's.

A warp rebuilds fragments of 16 outputs x 16 inputs in registers, at about 3.2 instructions a dense weight, and
multiplies each by up to 64 tokens: where the weight is read once from memory, the bytes that are left out are time that
is saved. More tokens than `_DECODE_TOKENS` wait for arithmetic: the weight is expanded once for torch's own linear.
Whether that is faster for fewer, a card knows: `cuda_expanded` does it for any number, so that a plan can measure it.

NaN and inf in x reach every output, as in the dense product. The same bits every time on the same card.

The gradient of x is g W, with the dense weight W, which is built for it and freed. The packed weight has none.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsekern.formats.bitmap import Bitmap
from sparsekern.ops import bitmap_fragments, compiled
from sparsekern.ops.bitmap_fragments import Fragments
from sparsekern.ops.kernel import Kernel, device_refuses, never_refuses
from sparsekern.ops.linear_call import CUDA_NAMES, CudaLinear, laid_out, through

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


@functools.cache
def _workspace_bytes(card: int, tokens: int, capacity: int, out_features: int, in_features: int) -> int:
    with torch.cuda.device(card):
        return compiled.cuda().linear_bitmap_fragments_workspace(tokens, capacity, out_features, in_features)


def _multiply(x: Tensor, operands: Fragments, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    tokens, capacity = x.shape[:-1].numel(), len(operands[3])
    if tokens > _DECODE_TOKENS:
        return _by_dense(x, operands, bias, out_features, in_features)
    x, bias, y = laid_out(x, bias, out_features)
    needed = _workspace_bytes(x.get_device(), tokens, capacity, out_features, in_features)
    compiled.launch(
        getattr(compiled.cuda(), f"linear_bitmap_fragments_{CUDA_NAMES[x.dtype]}"),
        **bitmap_fragments.addresses(operands, out_features, in_features),
        x=x,
        bias=bias,
        y=y,
        # a new one for each call: launches on two streams must not meet in it
        workspace=x.new_empty(needed, dtype=torch.uint8) if needed else None,
        tokens=tokens,
    )
    return y


_OPERANDS = ("masks", "cells", "quad_rows", "capacity")
_by_dense = through(bitmap_fragments.to_dense)
_CUDA = CudaLinear("linear_bitmap_fragments", _OPERANDS, "capacity", _multiply, bitmap_fragments.to_dense)
_EXPANDED = CudaLinear("linear_bitmap_expanded", _OPERANDS, "capacity", _by_dense, bitmap_fragments.to_dense)


def run(x: Tensor, operands: Fragments, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """y [..., out_features] by the tensor cores, from what bitmap_fragments has made."""
    return _CUDA.run(x, operands, bias, out_features, in_features)


def run_expanded(x: Tensor, operands: Fragments, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """The same for any number of tokens by torch's own linear, with the dense weight that each call makes and frees."""
    return _EXPANDED.run(x, operands, bias, out_features, in_features)


def refuses(packed: Bitmap) -> str | None:
    """Why `run` and `run_expanded` cannot serve a weight; None: they can."""
    return device_refuses(packed, "cuda", (torch.bfloat16, torch.float16)) or compiled.why_not("cuda")


_CONVERSIONS = (bitmap_fragments.prepare, bitmap_fragments.reference_inverse)
KERNELS = (
    Kernel("cuda", run, refuses, *_CONVERSIONS, bitmap_fragments.to_dense),
    Kernel("cuda_expanded", run_expanded, refuses, *_CONVERSIONS, bitmap_fragments.to_dense),
    Kernel("reference", reference, never_refuses, *_CONVERSIONS),
)
