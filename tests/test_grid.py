"""Grids: the integers by hand, the best of the scales tried, and what is recovered from a weight."""

import pytest
import torch

from sparsekern import grid


def test_the_nearest_grid_value_is_that_of_half_to_even_within_the_levels():
    weight = torch.tensor([[0.5, 1.5, -2.5, 9.0, -9.0, -0.2]])
    got = grid.nearest(weight, torch.tensor([[1.0]]), 7)
    assert got.tolist() == [[0, 2, -2, 7, -7, 0]]
    assert not torch.signbit(got[got == 0]).any()
    assert (grid.nearest(weight, torch.zeros(1, 1), 7) == 0).all()


def test_one_large_weight_is_cut_when_the_others_gain_more():
    weight = torch.cat([torch.tensor([10.0]), torch.full((300,), 1.0)])[None]
    # at 10 / 7 the ones would become 1.43; a step of 1 costs the large one 3, once
    scale = grid.best_scale(weight, torch.ones(301), 7)
    assert float(scale) < 10 / 7 * 0.8
    # unless the large one is all that counts
    importance = torch.cat([torch.tensor([1.0]), torch.full((300,), 1e-9)])
    assert float(grid.best_scale(weight, importance, 7)) == pytest.approx(10 / 7)


def test_what_counts_nothing_does_not_widen_the_grid():
    weight = torch.tensor([[1.0, -0.7, 50.0]])
    scale = grid.best_scale(weight, torch.tensor([[1.0, 1.0, 0.0]]), 127)
    assert float(scale) <= 1 / 127
    assert grid.best_scale(torch.zeros(3, 5), torch.ones(5), 7).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 20])
def test_integers_and_scales_come_back(bits, group_size):
    g = torch.Generator().manual_seed(bits)
    largest = grid.levels(bits)
    integers = torch.randint(-largest, largest + 1, (9, 40), generator=g)
    integers[:, ::20] = largest
    integers[3] = 0
    scales = torch.rand(9, 1 if group_size is None else 2, generator=g) + 0.1
    weight = (integers.view(9, scales.shape[1], -1) * scales[:, :, None]).view(9, 40)
    got, got_scales = grid.recover(weight, bits, group_size)
    assert torch.equal(got.long(), integers)
    torch.testing.assert_close(
        got_scales[integers.view(9, scales.shape[1], -1).any(dim=2)],
        scales[integers.view(9, scales.shape[1], -1).any(dim=2)],
    )


def test_the_last_group_of_a_row_may_be_shorter():
    integers = torch.tensor([[7, -3, 0, 1, 7, 2, -7], [-7, 7, 1, 2, 0, 0, 0]])
    scales = torch.tensor([[0.5, 0.25], [0.125, 0.0]])
    got, got_scales = grid.recover(integers * scales.repeat_interleave(4, dim=1)[:, :7], 4, 4)
    assert torch.equal(got.long(), integers)
    assert torch.equal(got_scales, scales)


def test_a_weight_off_the_grid_is_refused_by_name():
    weight = torch.ones(4, 16)
    weight[2, 8:] = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0.3])
    with pytest.raises(ValueError, match=r"row 2, group 1 does not lie on a grid of 4 bits \(1 groups like this\)"):
        grid.recover(weight, 4, 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_exact_scale_gives_a_quantised_weight_bit_for_bit(bits):
    torch.manual_seed(0)
    weight = torch.randn(50, 200) * (torch.rand(50, 200) < 0.5)
    weight[7] = 0
    scale = grid.best_scale(weight, torch.ones(200), grid.levels(bits))
    quantised = grid.nearest(weight, scale[:, None], grid.levels(bits))
    found = grid.exact_scale(quantised, grid.levels(8))
    assert found[7] == 0
    assert torch.equal((quantised / found[:, None]).nan_to_num().round() * found[:, None], quantised)


def test_a_weight_that_was_not_quantised_has_no_exact_scale():
    torch.manual_seed(0)
    assert (grid.exact_scale(torch.randn(50, 200), 127) == 0).all()
