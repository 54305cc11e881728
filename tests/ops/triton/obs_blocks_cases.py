"""What the blocks in Triton do, on a card, or on the CPU where TRITON_INTERPRET=1: run by test_obs_blocks.py."""

import os

import pytest
import torch

from sparsekern.ops import obs_blocks as op
from sparsekern.ops.obs_blocks import Choice
from sparsekern.ops.triton import obs_blocks
from tests.ops.test_obs_blocks import choices, problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def compare(w, u, block_size, choice, share=1.0):
    """Against the reference in float64, in at least this share of the rows: a near tie may fall to either side."""
    mine, exact = w.clone(), w.double()
    obs_blocks.run(mine, u, block_size, choice)
    op.reference(exact, u.double(), block_size, choice)
    same = ((mine != 0) == (exact != 0)).all(dim=1)
    assert same.float().mean() >= share
    torch.testing.assert_close(mine.double()[same], exact[same], rtol=1e-4, atol=1e-4)
    assert not torch.signbit(mine[mine == 0]).any()
    return mine


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (37, 104)], ids=str)
def test_masks_and_repairs_are_those_of_float64(rows, columns):
    w, u = problem(rows, columns, DEVICE)
    for choice in choices(rows, columns, DEVICE):
        compare(w, u, 32, choice)


def test_a_block_may_be_narrower_than_its_power_of_two_and_hold_any_groups():
    w, u = problem(33, 90, DEVICE)
    compare(w, u, 30, Choice(nm=(3, 5)))
    compare(w, u, 40, Choice(kept=[700, 900, 1]))


def test_ties_go_to_the_lower_index_across_programs():
    w = torch.ones(70, 24, device=DEVICE)
    kept = [16 * 70 // 2 + 3, 0]
    obs_blocks.run(w, torch.eye(24, device=DEVICE), 16, Choice(kept=kept))
    expected = torch.arange(16 * 70, device=DEVICE).view(70, 16) < kept[0]
    assert torch.equal(w[:, :16] != 0, expected)
    assert not w[:, 16:].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e18])
def test_saliencies_of_every_magnitude_are_told_apart(scale):
    """Their squares are zeros, subnormal, normal and infinite."""
    g = torch.Generator().manual_seed(3)
    w = (scale * torch.randn(40, 16, generator=g).exp2().exp2()).to(DEVICE)
    mine, theirs = w.clone(), w.clone()
    obs_blocks.run(mine, torch.eye(16, device=DEVICE), 16, Choice(kept=[300]))
    op.reference(theirs, torch.eye(16, device=DEVICE), 16, Choice(kept=[300]))
    assert torch.equal(mine, theirs)


def test_nan_is_refused_with_its_count():
    w, u = problem(40, 40, DEVICE)
    w[[3, 39], [35, 39]] = torch.tensor([torch.nan, -torch.nan], device=DEVICE)
    with pytest.raises(ValueError, match="saliency holds 2 NaN values"):
        obs_blocks.run(w, u, 32, Choice(kept=[640, 100]))


def test_a_layer_takes_the_launches_that_are_counted(monkeypatch):
    chain, products = [], []
    launch, multiply = obs_blocks._Launch.__call__, torch.Tensor.addmm_
    monkeypatch.setattr(obs_blocks._Launch, "__call__", lambda self, *a: (chain.append(1), launch(self, *a)))
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *a, **k: (products.append(1), multiply(*a, **k)))
    w, u = problem(9, 72, DEVICE)
    for choice in (Choice(nm=(2, 4)), Choice(kept=[50] * 5)):
        obs_blocks.run(w.clone(), u, 16, choice)
        assert (len(chain), len(products)) == obs_blocks.launches(72, 16, choice.kept is not None)
        chain.clear(), products.clear()


if not INTERPRETED:

    @pytest.mark.parametrize("kept", [False, True])
    def test_a_layer_of_4096_keeps_the_mask_of_float64_but_for_near_ties(kept):
        w, u = problem(4096, 1024, DEVICE)
        choice = Choice(kept=[4096 * 64] * 8) if kept else Choice(nm=(2, 4))
        compare(w, u, 128, choice, share=0.5)

    def test_a_captured_layer_is_the_same_layer():
        w, u = problem(512, 512, DEVICE)
        choice = Choice(kept=[512 * 64] * 4)
        expected, mine = w.clone(), w.clone()
        obs_blocks.run(expected, u, 128, choice)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            missing = obs_blocks.enqueue(mine, u, 128, choice)
        mine.copy_(w)
        graph.replay()
        assert torch.equal(mine, expected)
        assert int(missing) == 0
