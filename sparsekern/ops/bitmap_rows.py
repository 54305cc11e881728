"""bitmap_rows: a weight from dense to packed as it is saved (formats/bitmap.py), back, and checked.

Bitmap itself is the reference. The compiled kernels read each byte of the dense weight twice to pack it, and count a
row's ones before they believe what it says of itself: the kept values of a row that lies are neither read nor written.
Only then is the whole weight looked at again by Bitmap.validate, for its words.
"""

import torch
from torch import Tensor

from sparsekern.formats.bitmap import DTYPES, Bitmap
from sparsekern.ops import compiled
from sparsekern.ops.kernel import Kernel, never_refuses, pick


def reference(weight: Tensor) -> Bitmap:
    """Pack `weight` [out_features, in_features]; what is zero is pruned, -0.0 too.

    Raises ValueError for another dtype, another number of dimensions, and NaN or infinite weights.
    """
    return Bitmap.pack(weight)


def pack(weight: Tensor) -> Bitmap:
    """What `reference` does, by the best kernel for this weight."""
    return pick(KERNELS, weight).run(weight)


def to_dense(packed: Bitmap, isa: str = "") -> Tensor:
    """The weight [out_features, in_features], zeros as +0.0.

    Raises ValueError, as Bitmap.validate does, when the parts of `packed` contradict each other.
    """
    if _cpu_refuses(packed.values):
        packed.validate()
        return packed.to_dense()
    packed.validate_shapes()
    dense = packed.values.new_empty(packed.shape)
    refuse(packed, compiled.cpu().bitmap_to_dense(rows(packed), dense.data_ptr(), dense.numel(), _threads(), isa))
    return dense


def validate(packed: Bitmap, isa: str = "") -> None:
    """What Bitmap.validate does, by the best kernel for this weight. Raises ValueError."""
    if _cpu_refuses(packed.values):
        packed.validate()
        return
    packed.validate_shapes()
    refuse(packed, compiled.cpu().check_bitmap(rows(packed), _threads(), isa))


def rows(packed: Bitmap):
    """The addresses and sizes of `packed`, for the compiled module; its shapes are validated."""
    for name in ("values", "bitmap", "row_offsets"):
        if not getattr(packed, name).is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(getattr(packed, name).stride())}")
    return compiled.cpu().BitmapRows(
        str(packed.dtype).removeprefix("torch."),
        packed.values.data_ptr(),
        packed.values.numel(),
        packed.bitmap.data_ptr(),
        packed.bitmap.numel(),
        packed.row_offsets.data_ptr(),
        packed.row_offsets.numel(),
        *packed.shape,
    )


def refuse(packed: Bitmap, row: int) -> None:
    """Raises ValueError, in Bitmap.validate's words, unless `row` is -1."""
    if row >= 0:
        packed.validate()
        raise RuntimeError(f"row {row} changed while it was read")


def bits(weight: Tensor, isa: str = "") -> tuple[Tensor, Tensor] | None:
    """The bitmap and row_offsets of `weight` without its values: what is kept, before it is packed.

    None when it holds NaN or infinite values. Raises ValueError as `reference` does otherwise.
    """
    if not _pack_refuses(weight):
        return _bits_cpu(_by_rows(weight), isa)
    try:
        packed = Bitmap.pack(weight)
    except ValueError:
        if weight.dim() == 2 and weight.dtype in DTYPES:
            return None
        raise
    return packed.bitmap, packed.row_offsets


def _by_rows(weight: Tensor) -> Tensor:
    weight = weight.detach()
    # one row that is seen many times has stride 0, which is served
    return weight.contiguous() if weight.stride(1) != 1 or weight.stride(0) < 0 else weight


def _bits_cpu(weight: Tensor, isa: str) -> tuple[Tensor, Tensor] | None:
    out_features, in_features = weight.shape
    dtype = str(weight.dtype).removeprefix("torch.")
    bitmap = torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8)
    row_offsets = torch.empty(out_features + 1, dtype=torch.int64)
    if compiled.cpu().dense_to_bits(
        dtype,
        weight.data_ptr(),
        weight.stride(0),
        out_features,
        in_features,
        bitmap.data_ptr(),
        bitmap.numel(),
        row_offsets.data_ptr(),
        row_offsets.numel(),
        _threads(),
        isa,
    ):
        return None
    return bitmap, row_offsets


def _pack_cpu(weight: Tensor, isa: str = "") -> Bitmap:
    weight = _by_rows(weight)
    kept = _bits_cpu(weight, isa)
    if kept is None:
        # what is not finite is refused there, in words
        return Bitmap.pack(weight)
    packed = Bitmap(weight.new_empty(int(kept[1][-1])), *kept, weight.shape[1])
    values = packed.values.data_ptr(), packed.values.numel()
    refuse(
        packed,
        compiled.cpu().dense_to_values(rows(packed), weight.data_ptr(), weight.stride(0), *values, _threads(), isa),
    )
    return packed


def _cpu_refuses(weight: Tensor) -> str | None:
    if weight.device.type != "cpu":
        return f"the weight must be on the CPU, got {weight.device}"
    if weight.dtype not in DTYPES:
        return f"the weight must be bfloat16, float16 or float32, got {weight.dtype}"
    return compiled.why_not("cpu")


def _pack_refuses(weight: Tensor) -> str | None:
    if weight.dim() != 2:
        return f"the weight must have 2 dimensions, got {weight.dim()}"
    return _cpu_refuses(weight)


def _threads() -> int:
    return torch.get_num_threads()


KERNELS = (Kernel("cpu", _pack_cpu, _pack_refuses), Kernel("reference", reference, never_refuses))
