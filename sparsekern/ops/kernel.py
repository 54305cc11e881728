"""Kernel: one implementation of an op; pick() is the only dispatch in the project."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    run      does the work; every kernel of an op takes the same arguments as the op's `reference`
    refuses  takes what `pick` was given; returns None, or in words why this kernel cannot serve it
    prepare  for ops on packed weights: canonical format -> the tensors that `run` reads, made once on load
    restore  the inverse of `prepare`, or of `run` where the op is a conversion, bit for bit
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]
    prepare: Callable[..., Any] | None = None
    restore: Callable[..., Any] | None = None
    dense: Callable[..., Any] | None = None


def never_refuses(*_: Any) -> None:
    """The `refuses` of a kernel that serves everything: a function with a name, so that its kernel can be pickled."""


def device_refuses(weight: Any, device: str, dtypes: Iterable[torch.dtype]) -> str | None:
    """Why no kernel for a device, "cpu" or "cuda", and `dtypes` can serve a weight, packed or not; None: one may."""
    if weight.device.type != device:
        return f"the weight must be on {'the CPU' if device == 'cpu' else 'a CUDA device'}, got {weight.device}"
    if weight.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"the weight must be {' or '.join([', '.join(names), last] if names else [last])}, got {weight.dtype}"
    if device == "cuda" and (capability := torch.cuda.get_device_capability(weight.device)) < (8, 0):
        return "the card must have compute capability 8.0 or more, got {}.{}".format(*capability)
    return None


def pick(kernels: tuple[Kernel, ...], *args: Any) -> Kernel:
    """The first kernel that does not refuse `args`: the tuple's order is the preference.

    Raises ValueError naming every kernel and its reason when all refuse.
    """
    reasons = []
    for kernel in kernels:
        reason = kernel.refuses(*args)
        if reason is None:
            return kernel
        reasons.append(f"  {kernel.name}: {reason}")
    raise ValueError("\n".join(["no kernel accepts these arguments", *reasons]))
