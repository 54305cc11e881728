"""OBS against brute force in float64: each removal is the best there is, and what stays is the least-squares refit."""

import pytest
import torch

from sparsekern import OBS, SparseGPT
from sparsekern import prune as prune_model
from sparsekern.methods import obs
from sparsekern.pattern import NM, Unstructured
from sparsekern.stats import Gram
from tests import tiny_models

PATTERNS = [Unstructured(0.5), Unstructured(0.6, "row"), Unstructured(0.3, "layer"), NM(2, 4), NM(1, 4), NM(4, 8)]


def problem(rows=5, columns=8, tokens=256, seed=0):
    """A layer with correlated inputs, their Gram matrix, and H as the methods see it: damped, in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 3, generator=g) @ torch.randn(3, columns, generator=g)
    gram = Gram(columns)
    gram.add(x + 0.3 * torch.randn(tokens, columns, generator=g))
    u, _ = gram.inverse_cholesky(OBS().damping, per_input=True)
    return torch.randn(rows, columns, generator=g), gram, (u.double().T @ u.double()).inverse()


def least_squares(weight, h, kept):
    """The row v with v zero where not kept that has the least (v - w) H (v - w)^T, and half of that."""
    v = torch.zeros_like(weight)
    v[kept] = weight[kept] + torch.linalg.solve(h[kept][:, kept], h[kept][:, ~kept] @ weight[~kept])
    return v, (v - weight) @ h @ (v - weight) / 2


def brute_force(weight, h, count, scope, group=None):
    """Remove `count` weights one by one; each time try every single one of them with an exact refit of its row."""
    kept = torch.ones_like(weight, dtype=torch.bool)
    loss = torch.zeros(len(weight), dtype=torch.float64)
    for _ in range(count):
        tries = []
        for row, column in kept.nonzero().tolist():
            without = kept[row].clone()
            without[column] = False
            if group is None or without.view(-1, group.m)[column // group.m].sum() >= group.n:
                tries.append(((least_squares(weight[row], h, without)[1] - loss[row]).item(), row, column))
        for row in range(len(weight)) if scope == "row" else [None]:
            if mine := [one for one in tries if row in (one[1], None)]:
                _, at, column = min(mine)
                kept[at, column] = False
                loss[at] = least_squares(weight[at], h, kept[at])[1]
    return kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_every_removal_is_the_best_single_one(scope, seed):
    weight, gram, h = problem(rows=3, columns=6, seed=seed)
    for count in range(1, 6) if scope == "row" else range(1, 18, 2):
        pruned = OBS().prune(weight, gram, Unstructured(count / (6 if scope == "row" else 18), scope))
        assert torch.equal(pruned != 0, brute_force(weight.double(), h, count, scope)), count


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 8)], ids=str)
def test_a_group_gives_no_more_than_it_may(pattern):
    weight, gram, h = problem(rows=3)
    removals = round(pattern.sparsity * weight.numel())
    expected = brute_force(weight.double(), h, removals, "layer", group=pattern)
    assert torch.equal(OBS().prune(weight, gram, pattern) != 0, expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("columns", [8, 72])
def test_what_stays_is_the_least_squares_refit(pattern, columns):
    weight, gram, h = problem(columns=columns)
    pruned = OBS().prune(weight, gram, pattern)
    for row, dense in zip(pruned.double(), weight.double(), strict=True):
        torch.testing.assert_close(row, least_squares(dense, h, row != 0)[0], rtol=1e-5, atol=1e-6)


def test_blocks_and_chunks_remove_what_the_formula_removes_one_by_one(monkeypatch):
    """70 removals span three blocks of 32, and every row is a chunk of its own."""
    monkeypatch.setattr(obs, "CHUNK_BYTES", 1)
    weight, gram, h = problem(rows=3, columns=80)
    pruned = OBS().prune(weight, gram, Unstructured(70 / 80, "row"))
    for row, w in zip(pruned, weight.double(), strict=True):
        inverse, left = h.inverse(), torch.ones(80, dtype=torch.bool)
        for _ in range(70):
            q = int((w**2 / (2 * inverse.diagonal())).where(left, torch.inf).argmin())
            w = w - w[q] / inverse[q, q] * inverse[q]
            inverse = inverse - torch.outer(inverse[q], inverse[q]) / inverse[q, q]
            left[q] = False
        torch.testing.assert_close(row.double(), w.where(left, 0.0), rtol=1e-4, atol=1e-5)


def test_a_row_whose_second_removal_is_cheap_waits_for_its_first():
    # H = [[1, .9], [.9, 1]]: row 0 costs .095 and then .005, row 1 costs .00855 first: it is row 1's turn
    h = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, -1.0], [0.3, 5.0]], dtype=torch.float64)
    order = obs.removal_order(weight, h.inverse(), Unstructured(0.25, "layer"))
    assert order.tolist() == [[1, 2], [0, 3]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_is_no_better_and_least_squares_on_the_support_gains_nothing(pattern, seed):
    weight, gram, h = problem(rows=16, columns=64, seed=seed)

    def loss(pruned):
        difference = pruned.double() - weight.double()
        return ((difference @ h) * difference).sum().item()

    pruned = OBS().prune(weight, gram, pattern)
    refitted = torch.stack(
        [least_squares(dense, h, row != 0)[0] for dense, row in zip(weight.double(), pruned, strict=True)]
    )
    assert loss(pruned) == pytest.approx(loss(refitted), rel=1e-4)
    assert loss(pruned) < loss(SparseGPT(block_size=16).prune(weight, gram, pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_an_existing_mask_is_kept_counts_and_is_refitted_around(pattern):
    """Zeros that were there may be more than a group or a row has to give; the others must not wake them."""
    weight, gram, h = problem(rows=6, columns=16)
    weight[torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    weight[1, :7] = 0
    pruned = OBS().prune(weight, gram, pattern)
    assert (pruned[weight == 0] == 0).all()
    for row, dense in zip(pruned.double(), weight.double(), strict=True):
        torch.testing.assert_close(row, least_squares(dense, h, row != 0)[0], rtol=1e-5, atol=1e-6)
    if pattern == Unstructured(0.5):
        assert (pruned == 0).sum() == round(0.5 * weight.numel())


def test_more_inputs_than_it_serves_are_refused_before_any_weight_changes():
    model = tiny_models.llama(intermediate_size=1028)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(ValueError, match=r"down_proj: OBS .* serves 1024 inputs at most, got 1028; SparseGPT\(\)"):
        prune_model(model, OBS(), 0.5, tiny_models.batches("llama"))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


def test_a_negative_damping_is_refused():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        OBS(damping=-1)
