"""The search for an order of channels: a permutation, never worse, the best one where that can be tried out."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern import channel_order
from sparsekern.pattern import NM
from sparsekern.stats import Gram
from tests.synthetic import layer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def search(saliency, pattern, seed=0):
    return channel_order.search(saliency, pattern, generator(seed))


def kept_by_mask(saliency, order, pattern):
    """What pattern.mask keeps of one unit [channels, rows], in float64."""
    weight = saliency[order].T.double()
    return float(weight[pattern.mask(weight)].sum())


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 7),
    st.sampled_from([NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 4), NM(1, 2), NM(2, 7), NM(4, 4)]),
    st.integers(0, 99),
)
def test_every_unit_gets_a_permutation_that_retains_no_less(units, groups, rows, pattern, seed):
    # rounded, so that there are ties
    saliency = torch.randn(units, groups * pattern.m, rows, generator=generator(seed)).square().mul(4).round()
    order = search(saliency, pattern, seed)
    own = torch.arange(groups * pattern.m)
    for unit in range(units):
        assert torch.equal(order[unit].sort().values, own)
        now, before = (kept_by_mask(saliency[unit], some, pattern) for some in (order[unit], own))
        assert now > before or torch.equal(order[unit], own)
        assert channel_order.retained(saliency, order, pattern)[unit] == pytest.approx(now, rel=1e-6)


def test_no_round_of_exchanges_loses_anything():
    saliency = torch.randn(2, 64, 33, generator=generator()).square()
    groups, pattern, draws = channel_order._dealt(saliency, 4), NM(2, 4), generator(1)
    kept = [channel_order.retained(saliency, groups.flatten(1), pattern).sum()]
    for _ in range(40):
        groups, gain = channel_order._round(saliency, groups, 2, draws)
        kept.append(channel_order.retained(saliency, groups.flatten(1), pattern).sum())
        # what a round says it gained is what it gained
        assert float(kept[-1] - kept[-2]) == pytest.approx(gain, abs=1e-3)
        assert kept[-1] >= kept[-2] - 1e-3
    assert kept[-1] > kept[0]


def test_two_groups_are_split_almost_as_well_as_all_splits_tried():
    kept, best = 0.0, 0.0
    for seed in range(20):
        saliency = torch.randn(1, 8, 6, generator=generator(seed)).square()
        splits = [first + tuple(set(range(8)) - set(first)) for first in itertools.combinations(range(8), 4)]
        best += max(kept_by_mask(saliency[0], list(split), NM(2, 4)) for split in splits)
        kept += kept_by_mask(saliency[0], search(saliency, NM(2, 4))[0], NM(2, 4))
    assert kept > 0.99 * best


def test_channels_that_compete_are_parted():
    """Four strong channels side by side, in rows that each: 2:4 would lose two of them."""
    saliency = torch.ones(1, 16, 5)
    saliency[:, :4] = 9
    order = search(saliency, NM(2, 4))[0]
    groups = (order.view(4, 4) < 4).sum(dim=1)
    assert groups.max() <= 2


def test_the_group_that_loses_most_comes_first():
    saliency = torch.randn(1, 64, 9, generator=generator()).square()
    order = search(saliency, NM(2, 4))[0]
    groups = saliency[0, order].view(16, 4, 9)
    lost = groups.sum(dim=(1, 2)) - groups.topk(2, dim=1).values.sum(dim=(1, 2))
    assert (lost.diff() <= 1e-5).all()


def test_what_is_pruned_to_the_pattern_keeps_its_order():
    weight = torch.randn(8, 32, generator=generator()).square()
    pruned = weight.where(NM(2, 4).mask(weight), 0.0)
    assert torch.equal(search(pruned.T[None].contiguous(), NM(2, 4))[0], torch.arange(32))


def test_the_same_seed_gives_the_same_order():
    saliency = torch.randn(1, 64, 5000, generator=generator()).square()
    assert torch.equal(search(saliency, NM(2, 4), 3), search(saliency, NM(2, 4), 3))


@pytest.mark.parametrize(("pattern", "gain"), [("2:4", 0.10), ("4:8", 0.04)])
def test_the_synthetic_layers_lose_less_on_tokens_that_nobody_saw(pattern, gain):
    """SparseGPT's held-out error before and after, the mean of two layers."""
    pattern, errors = sk.as_pattern(pattern), torch.zeros(2)
    for seed in range(2):
        weight, x = layer(256, 256, tokens=4096, seed=seed)
        order = search((weight.square() * x.square().mean(dim=0)).T[None].contiguous(), pattern)[0]
        for number, inputs in enumerate((torch.arange(256), order)):
            gram, w = Gram(256), weight[:, inputs]
            gram.add(x[:, inputs])
            errors[number] += gram.held_out_error(w, sk.SparseGPT(block_size=64).prune(w, gram, pattern))
    before, after = errors
    assert after < (1 - gain) * before
