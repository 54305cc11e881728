"""Patterns: counts are exact, ties go to the lower index, groups are never broken."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.pattern import NM, Unstructured, as_pattern

shapes = st.tuples(st.integers(1, 9), st.integers(1, 40))
scopes = st.sampled_from(["row", "block", "layer", None])


def tied_saliency(shape, seed):
    """Few distinct values, so that most ranks are ties."""
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@given(shapes, st.floats(0, 1), scopes, st.integers(0, 99))
def test_unstructured_prunes_exactly_the_rounded_number_of_weights(shape, sparsity, scope, seed):
    mask = Unstructured(sparsity, scope).mask(tied_saliency(shape, seed))
    assert (~mask).sum() == round(sparsity * mask.numel())


@given(shapes, st.floats(0, 1), st.integers(0, 99))
def test_row_scope_prunes_every_row_alike_within_one_weight(shape, sparsity, seed):
    pruned = (~Unstructured(sparsity, "row").mask(tied_saliency(shape, seed))).sum(dim=1)
    assert pruned.max() - pruned.min() <= 1


@given(shapes, st.floats(0, 1), scopes, st.integers(0, 99))
def test_no_pruned_weight_outranks_a_kept_one_of_its_scope(shape, sparsity, scope, seed):
    saliency = tied_saliency(shape, seed)
    mask = Unstructured(sparsity, scope).mask(saliency)
    rows = zip(saliency, mask, strict=True) if scope == "row" else [(saliency.flatten(), mask.flatten())]
    for s, kept in rows:
        if kept.any() and not kept.all():
            assert s[~kept].max() <= s[kept].min()


@given(
    st.integers(1, 8).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))), st.integers(1, 5), st.integers(0, 99)
)
def test_nm_keeps_n_in_every_group(nm, groups, seed):
    n, m = nm
    mask = NM(n, m).mask(tied_saliency((3, groups * m), seed))
    assert (mask.view(-1, m).sum(dim=1) == n).all()


def test_of_equal_saliencies_the_first_is_kept():
    equal = torch.ones(2, 4)
    assert NM(2, 4).mask(equal).tolist() == [[True, True, False, False]] * 2
    assert Unstructured(0.5, "row").mask(equal).tolist() == [[True, True, False, False]] * 2
    assert Unstructured(0.5, "layer").mask(equal).tolist() == [[True] * 4, [False] * 4]


def test_four_of_eight_is_not_two_of_four_twice():
    saliency = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    assert NM(4, 8).mask(saliency).tolist() == [[True] * 4 + [False] * 4]
    assert NM(2, 4).mask(saliency).tolist() == [[True, True, False, False] * 2]


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ("2:4", NM(2, 4)),
        (" 4:8", NM(4, 8)),
        ("50%", Unstructured(0.5)),
        ("0.7", Unstructured(0.7)),
        (0.6, Unstructured(0.6)),
    ],
)
def test_a_pattern_is_read_from_text_or_number(spec, pattern):
    assert as_pattern(spec) == pattern
    assert as_pattern(pattern) is pattern


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "50%", "12.5%", "0%", "99.96%", "0.04%"])
def test_a_pattern_prints_as_it_is_read(pattern):
    assert str(as_pattern(pattern)) == pattern


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("5:4", "0 < N <= M is needed, got 5:4"),
        ("0:4", "0 < N <= M is needed, got 0:4"),
        (1.5, "must lie in 0..1, got 1.5"),
        (float("nan"), "must lie in 0..1, got nan"),
        (-0.1, "must lie in 0..1, got -0.1"),
        ("half", "pattern must be N:M"),
        ("2:x", "pattern must be N:M"),
        (None, "pattern must be N:M"),
    ],
)
def test_a_wrong_pattern_is_refused_with_its_value(spec, reason):
    with pytest.raises(ValueError, match=reason):
        as_pattern(spec)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope must be .* got 'global'"):
        Unstructured(0.5, "global")


def test_a_width_that_m_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        NM(2, 4).mask(torch.rand(2, 10))


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.5, "layer")], ids=str)
def test_nan_saliency_is_refused(pattern):
    saliency = torch.rand(2, 8)
    saliency[1, 3] = torch.nan
    with pytest.raises(ValueError, match="saliency holds 1 NaN"):
        pattern.mask(saliency)


def test_infinite_saliency_is_kept():
    saliency = torch.tensor([[1.0, torch.inf, 2.0, torch.inf]])
    assert Unstructured(0.5, "row").mask(saliency).tolist() == [[False, True, False, True]]


def test_weights_of_all_layers_compete_when_the_scope_is_the_model():
    g = torch.Generator().manual_seed(0)
    saliencies = {"a": torch.rand(3, 7, generator=g), "b": 2 * torch.rand(5, 4, generator=g), "c": torch.rand(1, 1)}
    patterns = Unstructured(0.6, "model").spread(saliencies)
    kept = [patterns[name].mask(saliency) for name, saliency in saliencies.items()]
    assert sum(int((~mask).sum()) for mask in kept) == round(0.6 * 42)
    highest = max(
        float(saliency[~mask].max()) for saliency, mask in zip(saliencies.values(), kept, strict=True) if not mask.all()
    )
    lowest = min(
        float(saliency[mask].min()) for saliency, mask in zip(saliencies.values(), kept, strict=True) if mask.any()
    )
    assert highest < lowest
    assert patterns["a"].sparsity > patterns["b"].sparsity


def test_one_layer_alone_refuses_the_scope_of_the_model():
    with pytest.raises(ValueError, match='scope "model" is for prune'):
        Unstructured(0.5, "model").mask(torch.rand(2, 4))
