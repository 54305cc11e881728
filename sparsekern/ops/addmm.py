"""addmm: total += scale * a @ b in float32, in place: the product that the solvers spend their time in.

torch's own addmm_ is the reference, and on most machines the best there is. On an AMD processor it runs MKL's AVX2
path: measured on Zen 5, the compiled kernel's AVX-512 is twice as fast.
"""

import torch
from torch import Tensor

from sparsekern.ops import compiled
from sparsekern.ops.kernel import Kernel, never_refuses, pick


def reference(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Add scale * a @ b to `total`, in place.

    total  [rows, columns] float32, overlaps neither a nor b
    a      [rows, inner] float32
    b      [inner, columns] float32; row-major or column-major, as a, or the compiled kernel refuses
    """
    total.addmm_(a, b, alpha=scale)


def addmm(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """What `reference` does, by the best kernel for these tensors."""
    pick(KERNELS, total, a, b).run(total, a, b, scale)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b [rows, columns] float32, by the best kernel for these tensors."""
    total = a.new_zeros(a.shape[0], b.shape[1])
    addmm(total, a, b)
    return total


def _cpu(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    (rows, columns), inner = total.shape, a.shape[1]
    if a.shape != (rows, inner) or b.shape != (inner, columns):
        raise ValueError(f"total {[rows, columns]} cannot be {list(a.shape)} times {list(b.shape)}")
    compiled.cpu().addmm(
        total.data_ptr(),
        max(total.stride(0), columns),
        a.data_ptr(),
        *_strides(a),
        b.data_ptr(),
        *_strides(b),
        rows,
        inner,
        columns,
        scale,
        torch.get_num_threads(),
    )


def _cpu_refuses(total: Tensor, a: Tensor, b: Tensor) -> str | None:
    for name, matrix in (("total", total), ("a", a), ("b", b)):
        if matrix.device.type != "cpu" or matrix.dtype != torch.float32 or matrix.dim() != 2:
            return f"{name} must be a float32 matrix on the CPU, got {matrix.dtype} on {matrix.device}"
        if 1 not in _strides(matrix):
            return f"{name} must be row-major or column-major, got strides {list(matrix.stride())}"
    if _strides(total)[1] != 1 or len(total) > 1 and total.stride(0) < total.shape[1]:
        return f"the rows of total must be contiguous, got strides {list(total.stride())}"
    if why_not := compiled.why_not("cpu"):
        return why_not
    return None if compiled.cpu().has_addmm() else "it is for AMD processors with AVX-512"


def _strides(matrix: Tensor) -> tuple[int, int]:
    """Of the rows and of the columns; the stride along a dimension of one element is torch's to choose, so it is 1."""
    rows, columns = matrix.shape
    if columns == 1:
        return matrix.stride(0), 1
    return (1 if rows == 1 and matrix.stride(1) != 1 else matrix.stride(0)), matrix.stride(1)


KERNELS = (Kernel("cpu", _cpu, _cpu_refuses), Kernel("reference", reference, never_refuses))
