"""pack_24: a weight from dense to 2:4 as it is saved (formats/semi_structured.py), back, and checked.

SemiStructured itself is the reference. On a card one kernel reads the dense weight once and writes values and metadata,
and one goes back; both look at what they read as they go, and leave a few numbers that say whether to believe the rest.
Asking for those is all that the host waits for.
"""

import torch
from torch import Tensor

from sparsekern.formats.bitmap import DTYPES
from sparsekern.formats.semi_structured import SemiStructured, not_24, not_finite
from sparsekern.ops import compiled
from sparsekern.ops.kernel import Kernel, device_refuses, never_refuses, pick


def reference(weight: Tensor) -> SemiStructured:
    """Pack `weight` [out_features, in_features]; -0.0 becomes +0.0.

    Raises ValueError when a group of four holds more than two nonzeros, naming row and columns, and on NaN or inf.
    """
    return SemiStructured.pack(weight)


def pack(weight: Tensor) -> SemiStructured:
    """What `reference` does, by the best kernel for this weight."""
    return pick(KERNELS, weight).run(weight)


def to_dense(packed: SemiStructured) -> Tensor:
    """The weight [out_features, in_features].

    On a card it raises ValueError, as SemiStructured.validate does, when the parts of `packed` contradict each other.
    """
    if _to_dense_refuses(packed):
        return packed.to_dense()
    packed.validate_sizes()
    dense, status = torch.ops.sparsekern.unpack_24(
        packed.values.contiguous(), packed.metadata.contiguous(), packed.in_features
    )
    if int(status):
        packed.validate()
        raise RuntimeError("the metadata changed while it was read")
    return dense


def validate(packed: SemiStructured) -> None:
    """What SemiStructured.validate does. Raises ValueError."""
    packed.validate()


def _pack_cuda(weight: Tensor) -> SemiStructured:
    values, metadata, status = torch.ops.sparsekern.pack_24(weight.detach().contiguous())
    missing, crowded, behind = status.tolist()
    if missing:
        raise not_finite(missing)
    if crowded:
        row, group = divmod(weight.numel() // 4 - behind, weight.shape[1] // 4)
        raise not_24(row, group, int((weight[row, 4 * group : 4 * group + 4] != 0).sum()), crowded)
    return SemiStructured(values, metadata, weight.shape[1])


def _pack_refuses(weight: Tensor) -> str | None:
    if weight.dim() != 2:
        return f"the weight must have 2 dimensions, got {weight.dim()}"
    if weight.shape[1] % 4:
        return f"in_features must be a multiple of 4, got {weight.shape[1]}"
    return _refuses(weight)


def _to_dense_refuses(packed: SemiStructured) -> str | None:
    if packed.metadata.device != packed.device:
        return f"values and metadata must be on one device, got {packed.device} and {packed.metadata.device}"
    return _refuses(packed.values)


def _refuses(weight: Tensor) -> str | None:
    return device_refuses(weight, "cuda", DTYPES) or compiled.why_not("cuda")


def _pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out_features, in_features = weight.shape
    values, metadata, status = _new(weight, out_features, in_features)
    compiled.launch(
        compiled.cuda().pack_24,
        dense=weight,
        dtype=str(weight.dtype).removeprefix("torch."),
        values=values,
        metadata=metadata,
        status=status,
        out_features=out_features,
        in_features=in_features,
    )
    return values, metadata, status


def _new(weight: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        weight.new_empty(out_features, in_features // 2),
        weight.new_empty(out_features, -(-in_features // 16), dtype=torch.int16),
        weight.new_zeros(3, dtype=torch.int64),
    )


def _pack_fake(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _new(weight, *weight.shape)


def _unpack(values: Tensor, metadata: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    dense, status = _unpack_fake(values, metadata, in_features)
    compiled.launch(
        compiled.cuda().unpack_24,
        values=values,
        dtype=str(values.dtype).removeprefix("torch."),
        metadata=metadata,
        dense=dense,
        status=status,
        out_features=len(values),
        in_features=in_features,
    )
    return dense, status


def _unpack_fake(values: Tensor, metadata: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape[0], in_features), values.new_zeros(1, dtype=torch.int64)


_LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")
# status is what csrc/cuda/ops.h says; who asks it waits for the card
_LIBRARY.define("pack_24(Tensor weight) -> (Tensor values, Tensor metadata, Tensor status)")
_LIBRARY.define("unpack_24(Tensor values, Tensor metadata, int in_features) -> (Tensor dense, Tensor status)")
_LIBRARY.impl("pack_24", _pack, "CUDA")
_LIBRARY.impl("unpack_24", _unpack, "CUDA")
torch.library.register_fake("sparsekern::pack_24", _pack_fake, lib=_LIBRARY)
torch.library.register_fake("sparsekern::unpack_24", _unpack_fake, lib=_LIBRARY)

KERNELS = (Kernel("cuda", _pack_cuda, _pack_refuses), Kernel("reference", reference, never_refuses))
