"""bitmap_rows: a weight from dense to packed as it is saved (formats/bitmap.py), back, and checked.

Bitmap itself is the reference. The compiled CPU kernels read each byte of the dense weight twice to pack it, and count
a row's ones before they believe what it says of itself: the kept values of a row that lies are neither read nor
written. Only then is the whole weight looked at again by Bitmap.validate, for its words.

On a card the first kernel reads the weight and writes bits and rows' counts, torch sums those up, and the second reads
the weight again for its values, of which the host must know the number between the two: it waits once. The inverse is
one kernel, which counts too, and leaves whether to believe what it wrote.
"""

import torch
from torch import Tensor

from sparsekern.formats.bitmap import DTYPES, Bitmap, not_finite
from sparsekern.ops import compiled
from sparsekern.ops.kernel import Kernel, device_refuses, never_refuses, pick


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
    if not _cuda_refuses(packed.values):
        return _to_dense_cuda(packed)
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
    if not _pack_cuda_refuses(weight):
        bitmap, row_offsets, (missing, _, _) = _bits_cuda(_by_rows(weight))
        return None if missing else (bitmap, row_offsets)
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


def _bits_cuda(weight: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The bitmap, the row_offsets, and: how many weights are not finite, how far from the end of the bitmap the first
    byte with one is, how many weights are kept.
    """
    bitmap, counts, status = torch.ops.sparsekern.bitmap_bits(weight)
    row_offsets = torch.zeros(len(weight) + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(counts, dim=0, out=row_offsets[1:])
    return bitmap, row_offsets, torch.cat([status, row_offsets[-1:]]).tolist()


def _pack_cuda(weight: Tensor) -> Bitmap:
    weight = _by_rows(weight)
    bitmap, row_offsets, (missing, behind, kept) = _bits_cuda(weight)
    if missing:
        row, byte = divmod(bitmap.numel() - behind, bitmap.shape[1])
        first = int((~weight[row, 8 * byte : 8 * byte + 8].isfinite()).nonzero()[0])
        raise not_finite(missing, row, 8 * byte + first)
    values = torch.ops.sparsekern.bitmap_values(weight, bitmap, row_offsets, kept)
    return Bitmap(values, bitmap, row_offsets, weight.shape[1])


def _to_dense_cuda(packed: Bitmap) -> Tensor:
    packed.validate_sizes()
    parts = (part.contiguous() for part in (packed.values, packed.bitmap, packed.row_offsets))
    dense, status = torch.ops.sparsekern.bitmap_to_dense(*parts, packed.in_features)
    if int(status):
        packed.validate()
        raise RuntimeError("the bitmap changed while it was read")
    return dense


def _bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out_features, in_features = weight.shape
    bitmap, counts, status = _bits_fake(weight)
    compiled.launch(
        compiled.cuda().bitmap_bits,
        dense=weight.data_ptr(),
        stride=weight.stride(0),
        dtype=str(weight.dtype).removeprefix("torch."),
        bitmap=bitmap,
        counts=counts,
        status=status,
        out_features=out_features,
        in_features=in_features,
    )
    return bitmap, counts, status


def _bits_fake(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out_features, in_features = weight.shape
    return (
        weight.new_empty(out_features, -(-in_features // 8), dtype=torch.uint8),
        weight.new_empty(out_features, dtype=torch.int64),
        weight.new_zeros(2, dtype=torch.int64),
    )


def _values(weight: Tensor, bitmap: Tensor, row_offsets: Tensor, kept: int) -> Tensor:
    out_features, in_features = weight.shape
    values = weight.new_empty(kept)
    compiled.launch(
        compiled.cuda().bitmap_values,
        dense=weight.data_ptr(),
        stride=weight.stride(0),
        dtype=str(weight.dtype).removeprefix("torch."),
        bitmap=bitmap,
        row_offsets=row_offsets,
        values=values,
        out_features=out_features,
        in_features=in_features,
    )
    return values


def _values_fake(weight: Tensor, bitmap: Tensor, row_offsets: Tensor, kept: int) -> Tensor:
    return weight.new_empty(kept)


def _dense(values: Tensor, bitmap: Tensor, row_offsets: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    dense, status = _dense_fake(values, bitmap, row_offsets, in_features)
    compiled.launch(
        compiled.cuda().bitmap_to_dense,
        values=values,
        dtype=str(values.dtype).removeprefix("torch."),
        bitmap=bitmap,
        row_offsets=row_offsets,
        dense=dense,
        status=status,
        out_features=len(dense),
        in_features=in_features,
    )
    return dense, status


def _dense_fake(values: Tensor, bitmap: Tensor, row_offsets: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    return values.new_empty(row_offsets.shape[0] - 1, in_features), values.new_zeros(1, dtype=torch.int64)


_LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")
# status is what csrc/cuda/ops.h says; who asks it waits for the card
_LIBRARY.define("bitmap_bits(Tensor weight) -> (Tensor bitmap, Tensor counts, Tensor status)")
_LIBRARY.define("bitmap_values(Tensor weight, Tensor bitmap, Tensor row_offsets, SymInt kept) -> Tensor")
_LIBRARY.define(
    "bitmap_to_dense(Tensor values, Tensor bitmap, Tensor row_offsets, int in_features) "
    "-> (Tensor dense, Tensor status)"
)
_LIBRARY.impl("bitmap_bits", _bits, "CUDA")
_LIBRARY.impl("bitmap_values", _values, "CUDA")
_LIBRARY.impl("bitmap_to_dense", _dense, "CUDA")
torch.library.register_fake("sparsekern::bitmap_bits", _bits_fake, lib=_LIBRARY)
torch.library.register_fake("sparsekern::bitmap_values", _values_fake, lib=_LIBRARY)
torch.library.register_fake("sparsekern::bitmap_to_dense", _dense_fake, lib=_LIBRARY)


def _cuda_refuses(weight: Tensor) -> str | None:
    return device_refuses(weight, "cuda", DTYPES) or compiled.why_not("cuda")


def _cpu_refuses(weight: Tensor) -> str | None:
    return device_refuses(weight, "cpu", DTYPES) or compiled.why_not("cpu")


def _pack_refuses(weight: Tensor) -> str | None:
    if weight.dim() != 2:
        return f"the weight must have 2 dimensions, got {weight.dim()}"
    return _cpu_refuses(weight)


def _pack_cuda_refuses(weight: Tensor) -> str | None:
    if weight.dim() != 2:
        return f"the weight must have 2 dimensions, got {weight.dim()}"
    if max(weight.shape) >= 1 << 31:
        return f"rows and columns must be fewer than 2^31, got {list(weight.shape)}"
    return _cuda_refuses(weight)


def _threads() -> int:
    return torch.get_num_threads()


KERNELS = (
    Kernel("cpu", _pack_cpu, _pack_refuses),
    Kernel("cuda", _pack_cuda, _pack_cuda_refuses),
    Kernel("reference", reference, never_refuses),
)
