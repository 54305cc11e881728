"""gram: total += x^T x, the running second moment of a layer's input, with float32 sums.

    total_ij += sum_t x_ti x_tj        for i <= j

The product is symmetric, so only what lies on and above the diagonal is summed; `mirror` makes it whole when it is
read. Inputs in bfloat16 and float16 are multiplied as they are, exactly: only the order of the sums differs from that
of float32. On a processor with AVX512_BF16 a bfloat16 input below 1.2e-38 counts as zero.
"""

import torch
from torch import Tensor

from sparsekern.ops import compiled
from sparsekern.ops.kernel import Kernel, never_refuses, pick

# of x
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
# rows of the result that one library product takes; smaller leaves out more of the half that is not wanted
_TILE_ROWS = 512


def reference(total: Tensor, x: Tensor) -> None:
    """Add x^T x to `total`, in place, on and above its diagonal; what lies below it is unspecified.

    total  [in_features, in_features] float32, contiguous
    x      [tokens, in_features] bfloat16, float16 or float32

    Raises ValueError for other shapes, dtypes or devices.
    """
    _check(total, x)
    total.addmm_(x.float().T, x.float())


def accumulate(total: Tensor, x: Tensor) -> None:
    """What `reference` does, by the best kernel for these tensors."""
    pick(KERNELS, total, x).run(total, x)


def mirror(total: Tensor) -> None:
    """Copy what lies above the diagonal of `total` [in_features, in_features] below it, in place."""
    for start in range(0, len(total), _TILE_ROWS):
        stop = start + _TILE_ROWS
        corner = total[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T


def _cpu(total: Tensor, x: Tensor, isa: str | None = None) -> None:
    """`isa`: one of the instruction sets of the compiled kernel; None = the best for the dtype of x."""
    _check(total, x)
    x = x.contiguous()
    if isa is None:
        isa = next(name for name in compiled.cpu().gram_sets() if name != "avx512_bf16" or x.dtype == torch.bfloat16)
    compiled.cpu().gram(
        DTYPES[x.dtype],
        x.data_ptr(),
        x.numel(),
        total.data_ptr(),
        total.numel(),
        *x.shape,
        torch.get_num_threads(),
        isa,
    )


def _cpu_refuses(total: Tensor, x: Tensor) -> str | None:
    if total.device.type != "cpu":
        return f"the sums must be on the CPU, got {total.device}"
    if why_not := compiled.why_not("cpu"):
        return why_not
    return None if compiled.cpu().gram_sets() else "this processor has no AVX-512"


def _half_cuda(total: Tensor, x: Tensor) -> None:
    _check(total, x)
    # a product of halves that comes out in float32: on the matrix unit, and nothing is rounded in between
    total += torch.mm(x.T, x, out_dtype=torch.float32)


def _half_cuda_refuses(total: Tensor, x: Tensor) -> str | None:
    if total.device.type != "cuda":
        return f"the sums must be on a CUDA device, got {total.device}"
    if x.dtype == torch.float32:
        return "x is float32"
    return None if "dtype" in torch.ops.aten.mm.overloads() else "this torch cannot give halves' product in float32"


def _tile_rows(total: Tensor, x: Tensor) -> None:
    """The library's float32 product, of each tile of rows only what lies from its diagonal on."""
    _check(total, x)
    x = x.float()
    for start in range(0, len(total), _TILE_ROWS):
        stop = start + _TILE_ROWS
        total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def _check(total: Tensor, x: Tensor) -> None:
    if total.dim() != 2 or total.shape[0] != total.shape[1] or total.dtype != torch.float32:
        raise ValueError(f"total must be [in_features, in_features] float32, got {list(total.shape)} {total.dtype}")
    if not total.is_contiguous():
        raise ValueError(f"total must be contiguous, got strides {list(total.stride())}")
    if x.dim() != 2 or x.shape[1] != len(total):
        raise ValueError(f"x must be [tokens, {len(total)}], got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be bfloat16, float16 or float32, got {x.dtype}")
    if x.device != total.device:
        raise ValueError(f"x must be on the device of the sums, {total.device}, got {x.device}")


KERNELS = (
    Kernel("cpu", _cpu, _cpu_refuses),
    Kernel("half_cuda", _half_cuda, _half_cuda_refuses),
    Kernel("tile_rows", _tile_rows, never_refuses),
    Kernel("reference", reference, never_refuses),
)
