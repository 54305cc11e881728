"""Symmetric integer grids: a weight of b bits is an integer of -(2^(b-1) - 1) .. 2^(b-1) - 1 times a scale.

A row has one scale, or one for every `group_size` neighbouring inputs.
"""

import torch
from torch import Tensor
from torch.nn import functional

BITS = (4, 8)
# the largest weight of a row at 4 bits is best cut by a sixth or so; no row was seen to gain from less than half
_SHRINK = torch.linspace(1.0, 0.5, 26)
# weights whose candidates the cache holds
_CACHED = 1 << 16
# weights of a group by which most candidates are told wrong
_SAMPLE = 16


def levels(bits: int) -> int:
    """The largest integer: 7 for 4 bits, 127 for 8."""
    return (1 << bits - 1) - 1


def check(bits: int | None, group_size: int | None, block_size: int | None = None) -> None:
    """Raises ValueError for settings of a method that no grid has."""
    if bits not in (*BITS, None):
        raise ValueError(f"bits must be 4, 8 or None, got {bits}")
    if group_size is not None and (bits is None or group_size < 1):
        raise ValueError(f"group_size goes with bits and must be at least 1, got {group_size} with bits {bits}")
    if group_size is not None and block_size is not None and group_size % block_size:
        raise ValueError(f"group_size must be a multiple of block_size {block_size}, got {group_size}")


def best_scale(weight: Tensor, importance: Tensor, largest: int) -> Tensor:
    """The scale of each row with the least squared rounding error, among 26 of 0.5 to 1 times the largest weight's.

    weight      [rows, columns] float32
    importance  [rows, columns] or [columns], what a squared error counts; 0 where a weight will be pruned
    largest     the largest integer of the grid

    Returns [rows], 0 for a row of zeros.
    """
    rows = max(_CACHED // max(weight.shape[1], 1), 1)
    scales = []
    for w, factor in zip(weight.split(rows), importance.expand_as(weight).split(rows), strict=True):
        most = w.abs().where(factor > 0, 0.0).amax(dim=1) / largest
        best, least = most.clone(), torch.full_like(most, torch.inf)
        for shrink in _SHRINK.tolist():
            scale = most * shrink
            error = ((nearest(w, scale[:, None], largest) - w).square_() * factor).sum(dim=1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        scales.append(best)
    return torch.cat(scales) if scales else weight.new_zeros(0)


def nearest(weight: Tensor, scale: Tensor, largest: int) -> Tensor:
    """The nearest grid values, half to even; a scale of 0 has only 0."""
    steps = (weight / scale).round_().clamp_(-largest, largest)
    return (steps * scale).where(scale != 0, 0.0) + 0.0


def recover(weight: Tensor, bits: int, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """The integers and scales that a weight on the grid was made from, or coarser ones that give the same weight.

    weight  [out_features, in_features] float32; rounded to half precision, 8 bits cannot be told apart any more

    Returns the integers [out_features, in_features] int8 and the scales [out_features, groups] float32. Raises
    ValueError naming the row and group that lies on no such grid.
    """
    rows, columns = weight.shape
    size = group_size or max(columns, 1)
    # the last group of a row may be shorter: zeros lie on every grid
    groups = functional.pad(weight.float(), (0, -columns % size)).reshape(-1, size)
    most = groups.abs().amax(dim=1)
    scale, found = torch.zeros_like(most), most == 0
    for integer in range(1, levels(bits) + 1):
        candidate = most / integer
        steps = groups / candidate[:, None]
        # a grid that is not the row's misses some weight by 1 / levels of a step at the least
        fits = ((steps - steps.round()).abs().amax(dim=1) < 0.25 / levels(bits)) & ~found
        scale, found = torch.where(fits, candidate, scale), found | fits
    if not found.all():
        first = int((~found).nonzero()[0])
        row, group = divmod(first, -(-columns // size))
        raise ValueError(
            f"row {row}, group {group} does not lie on a grid of {bits} bits ({int((~found).sum())} groups like this)"
        )
    steps = (groups / scale[:, None]).where(scale[:, None] != 0, 0.0).round()
    return steps.to(torch.int8).view(rows, -1)[:, :columns], scale.view(rows, -1)


def exact_scale(groups: Tensor, largest: int) -> Tensor:
    """The scale with which integers give each group bit for bit, rounded to its dtype; 0 where there is none.

    groups   [groups, size] of any floating dtype, such as a quantised weight that was saved in bfloat16
    largest  the largest integer

    The group's largest weight is some integer k times the scale. Each k says which integers the others are, each of
    these between which bounds the scale lies, and all of them, where the bounds meet. Returns [groups] float32; of
    several scales that of the smallest k. A group of zeros has 0.
    """
    most = groups.abs().amax(dim=1).double() if groups.shape[1] else groups.new_zeros(len(groups), dtype=torch.float64)
    found = torch.zeros_like(most, dtype=torch.float32)
    # some that are not zero from all over the group: by the large ones alone all candidates look alike
    order = (torch.rand(groups.shape[1], generator=torch.Generator().manual_seed(0)) + 1).to(groups.device)
    picked = (order * (groups != 0)).topk(min(_SAMPLE, groups.shape[1]), dim=1).indices
    sample, candidates = groups.gather(1, picked), torch.arange(1, largest + 1, device=groups.device)
    low, high = _bounds(sample[:, None], most[:, None] / candidates)  # [groups, largest]
    possible = (low <= high) & (most > 0)[:, None]
    while len(open_groups := possible.any(dim=1).nonzero()[:, 0]):
        k = possible[open_groups].to(torch.uint8).argmax(dim=1)
        rows, step = groups[open_groups], most[open_groups] / (k + 1)
        low, high = _bounds(rows, step)
        middle = ((low + high) / 2).float()
        # the bounds may meet between two float32
        for scale in (middle, middle.nextafter(high.float()), middle.nextafter(low.float())):
            steps = (rows.float() / scale[:, None]).round().clamp(-largest, largest)
            same = ((steps * scale[:, None]).to(rows.dtype) == rows).all(dim=1) & (low <= high)
            found[open_groups] = torch.where(same & (found[open_groups] == 0), scale, found[open_groups])
        possible[open_groups, k] = False
        possible[found > 0] = False
    return found


def _bounds(weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Between which scales all of `weight` [..., size] are, rounded, their nearest integers of `step` [...]."""
    size = weight.abs().double()
    integers = (size / step[..., None]).round_()
    # half of the last place: bfloat16 has 8 bits, of which eps is the last of 1
    mantissa, exponent = torch.frexp(size)
    half = torch.ldexp(torch.full_like(size, torch.finfo(weight.dtype).eps / 4), exponent)
    # below a power of two numbers lie twice as close
    below = torch.where(mantissa == 0.5, half / 2, half)
    nothing, inside = size == 0, integers > 0
    low = ((size - below) / integers).masked_fill_(nothing, 0.0).masked_fill_(~inside & ~nothing, torch.inf)
    high = ((size + half) / integers).masked_fill_(nothing, torch.inf).masked_fill_(~inside & ~nothing, 0.0)
    return low.amax(dim=-1), high.amin(dim=-1)
