"""What the Triton sweep does, on a card, or on the CPU where TRITON_INTERPRET=1: run by test_obs_sweep.py, in both."""

import os

import pytest
import torch

from sparsekern.ops import obs_sweep as op
from sparsekern.ops.triton import obs_sweep
from sparsekern.pattern import NM, Unstructured

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
PATTERNS = [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(4, 8)]


def problem(rows, block, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(block) + torch.randn(block, block, generator=g) / (2 * block**0.5)
    x = torch.randn(4 * block, block, generator=g) @ mix
    u = torch.linalg.cholesky((x.T @ x / len(x)).inverse(), upper=True).contiguous()
    return torch.randn(rows, block, generator=g).to(DEVICE), u.to(DEVICE)


def asked(pattern, weight, u):
    """What a caller gives for a pattern: the mask, and nm."""
    if isinstance(pattern, NM):
        return torch.ones_like(weight, dtype=torch.bool), (pattern.n, pattern.m)
    return pattern.mask((weight / u.diagonal()).square()), None


def compare(weight, u, mask, nm, scale=None, levels=0, share=1.0):
    """Against the reference in float64, in at least this share of the rows: a near tie may fall to either side."""
    before = weight.clone()
    pruned, e = obs_sweep.run(weight, u, mask, nm, scale, levels)
    double = None if scale is None else scale.double()
    expected, expected_e = op.reference(weight.double(), u.double(), mask, nm, double, levels)
    same = ((pruned != 0) == (expected != 0)).all(dim=1) & ((pruned - expected).abs() < 1e-3).all(dim=1)
    assert same.float().mean() >= share
    torch.testing.assert_close(pruned.double()[same], expected[same], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(e.double()[same], expected_e[same], rtol=1e-4, atol=1e-4)
    assert not torch.signbit(pruned[pruned == 0]).any()
    assert torch.equal(weight, before)
    return pruned


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("rows", "block"), [(1, 40), (37, 16), (37, 128)], ids=str)
def test_it_matches_float64_with_the_same_mask(rows, block, pattern):
    weight, u = problem(rows, block, seed=rows + block)
    compare(weight, u, *asked(pattern, weight, u))


@pytest.mark.parametrize(("levels", "pattern"), [(7, Unstructured(0.5)), (7, NM(2, 4)), (127, NM(4, 8))], ids=str)
def test_it_rounds_to_the_grid_and_repairs(levels, pattern):
    weight, u = problem(37, 40)
    scale = weight.abs().amax(dim=1) / levels
    scale[3] = 0
    pruned = compare(weight, u, *asked(pattern, weight, u), scale, levels, share=0.9)
    steps = (pruned / scale[:, None].where(scale[:, None] != 0, 1.0)).round()
    assert torch.equal(steps * scale[:, None], pruned)
    assert steps.abs().max() <= levels
    assert (pruned[3] == 0).all()


def test_halves_round_to_the_even_integer_and_the_grid_ends():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 9.0, -9.0, 1e30, -0.4, 6.5]], device=DEVICE)
    u, mask = torch.eye(10, device=DEVICE), torch.ones(1, 10, dtype=torch.bool, device=DEVICE)
    pruned, e = obs_sweep.run(weight, u, mask, None, torch.ones(1, device=DEVICE), 7)
    assert pruned.tolist() == [[0, 2, 2, 0, -2, 7, -7, 7, 0, 6]]
    torch.testing.assert_close(e, weight - pruned)


@pytest.mark.parametrize(
    ("block", "nm"),
    [(1, None), (7, None), (7, (1, 7)), (40, (3, 5)), (150, None), (96, (8, 16)), (60, (10, 20)), (260, (99, 130))],
    ids=str,
)
def test_every_block_and_group_is_served(block, nm):
    weight, u = problem(3, block)
    mask = (torch.rand(3, block, generator=torch.Generator().manual_seed(1)) < 0.7).to(DEVICE)
    pruned = compare(weight, u, mask, nm)
    assert (pruned[~mask] == 0).all()


@pytest.mark.parametrize("nm", [(2, 4), (6, 8), (3, 5), (8, 8), (16, 32)], ids=str)
def test_ties_go_to_the_lower_index(nm):
    mask = torch.ones(5, 160, dtype=torch.bool, device=DEVICE)
    pruned, _ = obs_sweep.run(mask.float(), torch.eye(160, device=DEVICE), mask, nm)
    expected = torch.arange(160, device=DEVICE) % nm[1] < nm[0]
    assert torch.equal(pruned != 0, expected.expand(5, 160))


def test_where_the_mask_leaves_fewer_than_n_they_all_stay():
    weight, u = problem(16, 32)
    mask = (torch.rand(16, 32, generator=torch.Generator().manual_seed(5)) > 0.6).to(DEVICE)
    pruned, _ = obs_sweep.run(weight, u, mask, (2, 4))
    assert torch.equal((pruned != 0).view(16, 8, 4).sum(dim=2), mask.view(16, 8, 4).sum(dim=2).clamp(max=2))


def test_slices_and_transposes_are_read_where_they_lie():
    weight, u = problem(7, 24)
    mask = (torch.rand(7, 24, generator=torch.Generator().manual_seed(5)) > 0.6).to(DEVICE)
    wide, wide_mask = torch.full((7, 50), torch.nan, device=DEVICE), torch.ones(7, 50, device=DEVICE).bool()
    wide[:, 13:37], wide_mask[:, 13:37] = weight, mask
    expected = obs_sweep.run(weight, u, mask)
    for got in (
        obs_sweep.run(wide[:, 13:37], u, wide_mask[:, 13:37]),
        obs_sweep.run(weight.T.contiguous().T, u, mask.T.contiguous().T),
    ):
        assert all(torch.equal(mine, whole) for mine, whole in zip(got, expected, strict=True))


def test_what_lies_below_the_diagonal_of_u_is_not_read():
    weight, u = problem(5, 40)
    mask = torch.ones(5, 40, dtype=torch.bool, device=DEVICE)
    below = u + torch.full_like(u, 1e3).tril(-1)
    for mine, clean in zip(
        obs_sweep.run(weight, below, mask, (2, 4)), obs_sweep.run(weight, u, mask, (2, 4)), strict=True
    ):
        assert torch.equal(mine, clean)


def test_no_rows_and_no_columns_are_nothing_to_do():
    for rows, block in ((0, 8), (3, 0)):
        weight, u = torch.zeros(rows, block, device=DEVICE), torch.eye(block, device=DEVICE)
        pruned, e = obs_sweep.run(weight, u, weight.bool())
        assert pruned.shape == e.shape == (rows, block)


def test_what_does_not_fit_is_refused_in_words():
    weight, u = problem(5, 10)
    with pytest.raises(ValueError, match=r"u must be contiguous, got strides \[1, 10\]"):
        obs_sweep.run(weight, u.T, weight.bool())
    with pytest.raises(ValueError, match="a block that M divides, got 2:4 and 10 columns"):
        obs_sweep.run(weight, u, weight.bool(), (2, 4))


if not INTERPRETED:

    @pytest.mark.parametrize("pattern", PATTERNS, ids=str)
    def test_4096_rows_match_float64_with_the_same_mask_in_all_but_near_ties(pattern):
        weight, u = problem(4096, 128)
        compare(weight, u, *asked(pattern, weight, u), share=0.99)

    def test_the_answer_is_the_same_run_to_run():
        weight, u = problem(4096, 128)
        mask = torch.ones_like(weight, dtype=torch.bool)
        first, second = (obs_sweep.run(weight, u, mask, (2, 4)) for _ in range(2))
        assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))

    def test_the_kernels_are_picked_for_a_card():
        weight, u = problem(5, 8)
        assert op.KERNELS[0].refuses(weight, u) is None
        assert "float32" in op.KERNELS[0].refuses(weight.half(), u)
