"""ceilings: how fast this card copies and reads memory, and multiplies bf16 matrices, measured here and now."""

from collections.abc import Iterator

import torch

from card.clock import time_variants
from card.worker import Case, Json, Setting

COPY_BYTES = 2 << 30
SIDE = 8192


def cases(setting: Setting) -> Iterator[Case]:
    yield Case("ceilings", lambda: measure(setting))


def measure(setting: Setting) -> Iterator[Json]:
    """Times of a copy, a read and a product; the work of each stands beside it."""
    size, side = (1 << 12, 64) if setting.tiny else (COPY_BYTES, SIDE)
    source = torch.randn(size // 4, device=setting.device)
    target, total = torch.empty_like(source), torch.empty((), device=setting.device)
    # random data: zeros are multiplied with less power, and so faster
    left, right = (torch.randn(side, side, device=setting.device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    variants = {
        "copy": lambda _: target.copy_(source),
        "read": lambda _: torch.sum(source, 0, out=total),
        "product": lambda _: torch.mm(left, right, out=product),
    }
    work = {"copy": 2 * source.nbytes, "read": source.nbytes, "product": 2 * side**3}
    yield {"work": work, **time_variants(variants, None, setting).to_json()}
