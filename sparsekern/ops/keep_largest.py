"""keep_largest: the mask of the largest saliencies of each set, counted exactly.

The threshold is selected, not sorted for: by radix select on the floats' bit pattern, which orders them as their values
do, on the CPU and, for one set, on a card. There each saliency of a small set, as N:M has them, is compared with the
others: it is kept where few enough come before it. Of equal saliencies the lower index is kept, so that the same input
always gives the same mask.
"""

import math

import torch
from torch import Tensor

from sparsekern.ops import compiled, triton
from sparsekern.ops.kernel import Kernel, never_refuses


def reference(saliency: Tensor, kept: Tensor) -> Tensor:
    """The kept[i] largest of set i, ties to the lower index.

    saliency  [sets, size]
    kept      [sets] int64, each 0..size; on the CPU nobody waits for a card to tell them

    Returns a bool tensor [sets, size]. Raises ValueError on NaN and on counts that are out of range.
    """
    check(saliency, kept)
    # NaN compares as neither larger nor smaller: it would break the counts and hide the fault that made it
    refuse_nan(int(saliency.isnan().sum()))
    sets, size = saliency.shape
    kept = kept.to(saliency.device)
    if sets == 1 and 0 < int(kept) < size:
        # one long set: selecting is linear, sorting is not
        threshold = saliency.kthvalue(size - int(kept) + 1, dim=1).values[:, None]
    else:
        ascending = torch.cat([saliency.sort(dim=1).values, saliency.new_full((sets, 1), math.inf)], dim=1)
        threshold = ascending.gather(1, size - kept[:, None])
    above = saliency > threshold
    # with none to keep the threshold is infinite, and an infinite saliency only ties with it
    tied = saliency == threshold
    room = kept[:, None] - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= room))


def _cpu(saliency: Tensor, kept: Tensor) -> Tensor:
    check(saliency, kept)
    saliency = saliency.contiguous()
    mask = torch.empty(saliency.shape, dtype=torch.bool)
    refuse_nan(
        compiled.cpu().keep_largest(
            *(saliency.data_ptr(), kept.data_ptr(), kept.stride(0), mask.data_ptr()),
            *(*saliency.shape, torch.get_num_threads()),
        )
    )
    return mask


def _cpu_refuses(saliency: Tensor) -> str | None:
    if saliency.device.type != "cpu":
        return f"saliency must be on the CPU, got {saliency.device}"
    if saliency.dtype != torch.float32:
        return f"saliency must be float32, got {saliency.dtype}"
    if saliency.shape[1] >= 1 << 32:
        return f"a set must be smaller than 2^32, got {saliency.shape[1]}"
    return compiled.why_not("cpu")


# saliencies of a set that the CUDA kernel takes
_SMALL = (2, 4, 8, 16)


def _cuda(saliency: Tensor, kept: Tensor) -> Tensor:
    if kept.device.type == "cpu":
        check(saliency, kept)
        # one count that serves all sets is not written out
        kept = kept[:1].to(saliency.device).expand(len(kept)) if kept.stride(0) == 0 else kept.to(saliency.device)
    _check_shape(saliency, kept)
    saliency = saliency.contiguous()
    if saliency.data_ptr() % 16:
        saliency = saliency.clone()
    mask, status = torch.ops.sparsekern.keep_largest(saliency, kept)
    missing, impossible = status.tolist()
    refuse_nan(missing)
    if impossible:
        check(saliency, kept)
    return mask


def _cuda_refuses(saliency: Tensor) -> str | None:
    if saliency.device.type != "cuda":
        return f"saliency must be on a CUDA device, got {saliency.device}"
    if saliency.dtype != torch.float32:
        return f"saliency must be float32, got {saliency.dtype}"
    if saliency.shape[1] not in _SMALL:
        return f"a set must have 2, 4, 8 or 16 saliencies, got {saliency.shape[1]}"
    return compiled.why_not("cuda")


def _keep_largest(saliency: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    mask, status = _keep_largest_fake(saliency, kept)
    compiled.launch(
        compiled.cuda().keep_largest,
        saliency=saliency.data_ptr(),
        kept=kept.data_ptr(),
        kept_stride=kept.stride(0),
        mask=mask,
        status=status,
        sets=saliency.shape[0],
        size=saliency.shape[1],
    )
    return mask, status


def _keep_largest_fake(saliency: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    return saliency.new_empty(saliency.shape, dtype=torch.bool), saliency.new_zeros(2, dtype=torch.int64)


_LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")
# status is what csrc/cuda/ops.h says; who asks it waits for the card
_LIBRARY.define("keep_largest(Tensor saliency, Tensor kept) -> (Tensor mask, Tensor status)")
_LIBRARY.impl("keep_largest", _keep_largest, "CUDA")
torch.library.register_fake("sparsekern::keep_largest", _keep_largest_fake, lib=_LIBRARY)


def check(saliency: Tensor, kept: Tensor) -> None:
    """Raises ValueError unless the counts fit the sets."""
    _check_shape(saliency, kept)
    sets, size = saliency.shape
    if sets and not 0 <= int(kept.min()) <= int(kept.max()) <= size:
        raise ValueError(f"kept must lie in 0..{size}, got {int(kept.min())}..{int(kept.max())}")


def _check_shape(saliency: Tensor, kept: Tensor) -> None:
    """The part of `check` that nobody waits for a card for."""
    sets = len(saliency)
    if kept.shape != (sets,) or kept.dtype != torch.int64:
        raise ValueError(f"kept must be [{sets}] int64, got {list(kept.shape)} {kept.dtype}")


def refuse_nan(missing: int) -> None:
    """Raises ValueError when there are any."""
    if missing:
        raise ValueError(f"saliency holds {missing} NaN values; check the weight and the statistics")


def _triton(saliency: Tensor, kept: Tensor) -> Tensor:
    # here, because importing sparsekern must not need Triton
    from sparsekern.ops.triton import keep_largest

    return keep_largest.run(saliency, kept)


def _triton_refuses(saliency: Tensor) -> str | None:
    if saliency.device.type != "cuda":
        return f"saliency must be on a CUDA device, got {saliency.device}"
    if saliency.dtype != torch.float32:
        return f"saliency must be float32, got {saliency.dtype}"
    sets, size = saliency.shape
    if sets != 1:
        return f"one set at a time, got {sets}"
    if size >= 1 << 31:
        return f"a set must be smaller than 2^31, got {size}"
    return triton.why_not()


KERNELS = (
    Kernel("cuda", _cuda, _cuda_refuses),
    Kernel("triton", _triton, _triton_refuses),
    Kernel("cpu", _cpu, _cpu_refuses),
    Kernel("reference", reference, never_refuses),
)
