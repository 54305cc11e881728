"""The order of a layer's inputs in which an N:M mask keeps the most saliency.

N:M keeps the N largest of every M *neighbouring* inputs, so what it keeps depends on who is whose neighbour. With
S [channels, rows] the saliency of every weight, the order that retains the most is searched in three steps:

1. channels sorted by their total saliency are dealt out to the groups like cards, there and back again
2. rounds: one channel, drawn at random, leaves each group, and the groups exchange them where both together gain.
   Channel x is worth to group g what it adds to the N largest of those that stayed, of which t is the N-th:

       C[g, x] = sum_r max(S[x, r] - t[g, r], 0) = (sum_r S[x, r] - sum_r t[g, r] + ||S[x] - t[g]||_1) / 2

   so one pairwise L1 distance values every channel for every group. Exchanges go by the best mutual pair until none
   gains: what is retained never falls.
3. the groups are sorted, the one that loses the most first: a sweep from left to right (SparseGPT) repairs the early
   columns with all those behind them, the last ones with nothing.

Sources: allocation by sorting and assignment of one channel a group: RIA, Zhang et al. 2024,
https://openreview.net/forum?id=Tr0lPx9woF; exchanges between groups: Pool & Yu 2021, NeurIPS, "Channel Permutations for
N:M Sparsity". The L1 form of the gain, the batched exchanges and step 3 are ours.
"""

import torch
from torch import Tensor

from sparsekern.pattern import NM

# groups that exchange with each other in one round: more find better partners, and take longer
NEIGHBOURHOOD = 128
ROUNDS = 64
# saliencies to look at in all rounds together: 16 rounds of a layer of 2048 x 8192
LOOKS = 1 << 28
# of the gain so far: M rounds that bring less end the search
ENOUGH = 0.01
# rows that decide; on layers with more, these are drawn
ROWS = 2048


def search(saliency: Tensor, pattern: NM, generator: torch.Generator) -> Tensor:
    """The order of the channels that retains the most saliency found.

    saliency   [units, channels, rows] float32, not negative: each unit (a head) is ordered by itself
    generator  on the CPU: the same state gives the same order

    Returns [units, channels] int64: at position i stands the channel that now comes i-th. A unit keeps its own order
    unless another retains more.
    """
    units, channels, rows = saliency.shape
    own = torch.arange(channels, device=saliency.device).expand(units, channels)
    if pattern.n == pattern.m or channels == pattern.m:
        return own
    s = saliency
    if rows > ROWS:
        s = saliency[:, :, torch.randperm(rows, generator=generator)[:ROWS].to(saliency.device)]
    groups = _dealt(s, pattern.m)
    gained, recent = 0.0, 0.0
    for number in range(1, max(pattern.m, min(ROUNDS, LOOKS // max(s.numel(), 1))) + 1):
        groups, gain = _round(s, groups, pattern.n, generator)
        gained, recent = gained + gain, recent + gain
        # each of a group's M channels has left it about once
        if number % pattern.m == 0:
            if recent <= ENOUGH * gained:
                break
            recent = 0.0
    order = _most_lost_first(s, groups, pattern.n).flatten(1)
    better = retained(saliency, order, pattern) > retained(saliency, own, pattern)
    return order.where(better[:, None], own)


def retained(saliency: Tensor, order: Tensor, pattern: NM) -> Tensor:
    """The saliency that an N:M mask keeps.

    saliency  [units, channels, rows]
    order     [units, channels]

    Returns [units] float64.
    """
    kept = [
        sum(k.sum(dim=(1, 2), dtype=torch.float64) for k in _largest(_members(saliency, part), pattern.n))
        for part in order.unflatten(1, (-1, pattern.m)).split(NEIGHBOURHOOD, dim=1)
    ]
    return torch.stack(kept).sum(dim=0)


def _dealt(s: Tensor, m: int) -> Tensor:
    """Channels [units, groups, M] such that every group has one of the strongest, one of the next, and so on."""
    by_strength = s.sum(dim=2).argsort(dim=1, descending=True, stable=True)
    tiers = by_strength.unflatten(1, (m, -1)).clone()
    # there and back again: who is first in one tier is last in the next
    tiers[:, 1::2] = tiers[:, 1::2].flip(2)
    return tiers.transpose(1, 2).contiguous()


def _round(s: Tensor, groups: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """One channel leaves each group and comes back to whom it is worth most; returns the groups and the gain."""
    units, count, m = groups.shape

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).argsort(dim=-1).to(s.device)

    groups = groups.gather(2, drawn(units, count, m))
    met = drawn(units, count)
    gained = 0.0
    for some in met.split(NEIGHBOURHOOD, dim=1):
        members = groups.gather(1, some[:, :, None].expand(-1, -1, m))
        leaving, *staying = _members(s, members)
        threshold = _largest(staying, n)[-1]
        worth = torch.cdist(threshold, leaving, p=1)
        worth = (worth + leaving.sum(dim=2)[:, None, :] - threshold.sum(dim=2)[:, :, None]) / 2
        partner, gain = _exchanges(worth)
        gained += gain
        groups[:, :, 0].scatter_(1, some, members[:, :, 0].gather(1, partner))
    return groups, gained


def _exchanges(worth: Tensor) -> tuple[Tensor, float]:
    """Whose channel each group takes, [units, groups], a permutation found by exchanges of two; and what it gains.

    worth  [units, groups, channels], channel i comes from group i
    """
    count = worth.shape[1]
    own = torch.arange(count, device=worth.device)
    taken = own.expand(worth.shape[:2])
    # below this a gain may be nothing but rounding
    least = 1e-6 * worth.diagonal(dim1=1, dim2=2).abs().mean(dim=1, keepdim=True)
    for _ in range(count):
        now = worth.gather(2, taken[:, None, :].expand_as(worth))
        has = now.diagonal(dim1=1, dim2=2)
        gain, best = (now + now.transpose(1, 2) - (has[:, None, :] + has[:, :, None])).max(dim=2)
        willing = (best.gather(1, best) == own) & (gain > least)
        # rounding may let one of the two see a gain and the other none
        willing = willing & willing.gather(1, best)
        if not willing.any():
            break
        taken = taken.gather(1, best).where(willing, taken)
    gains = worth.gather(2, taken[:, :, None]).squeeze(2) - worth.diagonal(dim1=1, dim2=2)
    return taken, float(gains.sum(dtype=torch.float64))


def _most_lost_first(s: Tensor, groups: Tensor, n: int) -> Tensor:
    lost = []
    for part in groups.split(NEIGHBOURHOOD, dim=1):
        members = _members(s, part)
        lost.append(sum(x.sum(dim=2) for x in members) - sum(k.sum(dim=2) for k in _largest(members, n)))
    first = torch.cat(lost, dim=1).argsort(dim=1, descending=True, stable=True)
    return groups.gather(1, first[:, :, None].expand_as(groups))


def _members(s: Tensor, groups: Tensor) -> list[Tensor]:
    """The saliency of each group's 0th, 1st, ... channel, M tensors [units, groups, rows]."""
    unit = torch.arange(len(s), device=s.device)[:, None]
    return [s[unit, groups[:, :, i]] for i in range(groups.shape[2])]


def _largest(tensors: list[Tensor], n: int) -> list[Tensor]:
    """Elementwise the n largest, falling: by maximum and minimum, because sorting a short dimension is slow."""
    largest: list[Tensor] = []
    for x in tensors:
        for i, held in enumerate(largest):
            largest[i], x = torch.maximum(held, x), torch.minimum(held, x)
        if len(largest) < n:
            largest.append(x)
    return largest
