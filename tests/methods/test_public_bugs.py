"""Bugs that public implementations have or had, over every method; and weights and inputs that are not as usual.

Three more are tested where they belong: keyword arguments of one block reused for another in test_architectures.py
(Gemma, sliding windows), the norm mistaken for its square in test_wanda.py, a block that M does not divide in
test_sparsegpt.py.
"""

import copy
import weakref

import pytest
import torch

from sparsekern import hf, prune
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.methods import METHODS
from sparsekern.pattern import NM, Unstructured, as_pattern
from sparsekern.stats import GradSquare, Gram
from tests import tiny_models

PATTERNS = [
    *(Unstructured(0.5), Unstructured(0.3, "row"), Unstructured(0.7, "layer"), Unstructured(0.37, "block")),
    *(NM(2, 4), NM(4, 8), NM(1, 4), NM(6, 8)),
]
every_method = pytest.mark.parametrize("method", [method() for method in METHODS.values()], ids=METHODS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
# what repairs the weights that it keeps needs to know how inputs go together
REPAIRING = [method() for method in METHODS.values() if method.needs is Gram]


def inputs(in_features, tokens=256, seed=0):
    """Correlated inputs [tokens, in_features] of different strength."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 5, generator=g) @ torch.randn(5, in_features, generator=g)
    return (x + 0.5 * torch.randn(tokens, in_features, generator=g)) * torch.rand(in_features, generator=g).exp()


def statistics(method, weight, x):
    """What the method needs of a layer with this weight and these inputs."""
    if method.needs is None:
        return None
    if method.needs is GradSquare:
        stats = GradSquare(*weight.shape)
        g = torch.Generator().manual_seed(2)
        for token in x[:16]:
            stats.add(torch.outer(torch.randn(len(weight), generator=g), token))
        return stats
    stats = method.needs(weight.shape[1])
    stats.add(x)
    return stats


def layer(rows=12, columns=48, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def pruned_by(method, weight, pattern, x=None):
    x = inputs(weight.shape[1]) if x is None else x
    return method.prune(weight, statistics(method, weight, x), pattern)


def kept_a_group(weight, m):
    return (weight != 0).reshape(-1, m).sum(dim=1)


@every_method
@pytest.mark.parametrize("sparsity", [0, 0.001, 0.37, 0.5, 0.999, 1])
@pytest.mark.parametrize("scope", ["row", "block", "layer", None])
def test_not_one_weight_more_goes_and_not_all_that_tie(method, sparsity, scope):
    """A threshold `score <= sorted[k]` prunes one too many, and every tie with it."""
    tied = torch.ones(7, 40)
    pruned = pruned_by(method, tied, Unstructured(sparsity, scope), x=torch.eye(40).repeat(8, 1))
    assert (pruned == 0).sum() == round(sparsity * tied.numel())
    weight = layer(7, 40)
    assert (pruned_by(method, weight, Unstructured(sparsity, scope)) == 0).sum() == round(sparsity * weight.numel())


@every_method
@pytest.mark.parametrize("spec", ["2:4", "4:8", "1:4", "6:8", "5:8", "1:1"])
def test_every_group_of_equal_weights_keeps_n(method, spec):
    pattern = as_pattern(spec)
    pruned = pruned_by(method, torch.ones(7, 40), pattern, x=torch.eye(40).repeat(8, 1))
    assert kept_a_group(pruned, pattern.m).eq(pattern.n).all()


@every_method
def test_a_width_that_m_does_not_divide_is_refused_and_nothing_has_changed(method):
    with pytest.raises(ValueError, match="multiple of"):
        pruned_by(method, layer(3, 10), NM(2, 4))
    model = tiny_models.make("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: pattern 5:7 needs in_features"):
        prune(model, method, "5:7", tiny_models.batches("llama"))
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())


@every_method
@every_pattern
def test_a_pruned_weight_is_zero_and_not_rounding_noise_nor_negative(method, pattern):
    weight = -layer().abs()
    pruned = pruned_by(method, weight, pattern)
    assert (pruned == 0).sum() == round(pattern.sparsity * weight.numel())
    assert not torch.signbit(pruned[pruned == 0]).any()
    packed = Bitmap.pack(pruned)
    assert torch.equal(packed.to_dense(), pruned)
    assert len(packed.values) == weight.numel() - round(pattern.sparsity * weight.numel())
    if pattern == NM(2, 4):
        assert torch.equal(SemiStructured.pack(pruned.bfloat16()).to_dense(), pruned.bfloat16())


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_negative_zero_of_the_model_does_not_survive(method, dtype):
    model = tiny_models.make("llama").to(dtype)
    for _, module in hf.layers(model):
        hf.weight(module)[:, 3] = -0.0
    # fewer than there are zeros: a mask alone would leave some of them as they are
    prune(model, method, 0.01, tiny_models.batches("llama"))
    for _, module in hf.layers(model):
        weight = hf.weight(module)
        assert weight[:, 3].eq(0).all()
        assert not torch.signbit(weight[weight == 0]).any()


@pytest.mark.parametrize("method", REPAIRING, ids=repr)
@every_pattern
def test_the_repair_is_not_thrown_away(method, pattern):
    """The mask alone, on the weights as they were, is what some call SparseGPT."""
    weight, x = layer(), inputs(48)
    stats = statistics(method, weight, x)
    pruned = method.prune(weight, stats, pattern)
    masked = weight.where(pruned != 0, 0.0)
    assert not torch.equal(pruned, masked)
    assert stats.error(weight, pruned) < 0.9 * stats.error(weight, masked)


@every_method
@every_pattern
def test_pruning_again_changes_nothing_whatever_the_tokens(method, pattern):
    weight = layer()
    once = pruned_by(method, weight, pattern)
    assert torch.equal(pruned_by(method, once, pattern, x=inputs(48, seed=1)).to(once.dtype), once)


@every_method
@pytest.mark.parametrize(
    ("first", "then"), [("2:4", "4:8"), ("1:4", "2:4"), ("2:8", "2:4"), ("4:8", 0.5), ("2:4", 0.3)]
)
def test_a_mask_that_satisfies_the_next_pattern_stays(method, first, then):
    once = pruned_by(method, layer(), as_pattern(first))
    if (first, then) == ("2:8", "2:4"):
        # four of four pruned: a group may hold fewer than n, and gets none back
        assert kept_a_group(once, 4).min() < 2
    again = pruned_by(method, once, as_pattern(then))
    assert torch.equal(again, once) or then == 0.5
    assert (again == 0).sum() == (once == 0).sum()


@every_method
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_a_mask_counts_when_more_is_asked_for(method, scope):
    once = pruned_by(method, layer(), Unstructured(0.5, scope))
    more = pruned_by(method, once, Unstructured(0.75, scope))
    assert more[once == 0].eq(0).all()
    assert (more == 0).sum() == round(0.75 * more.numel())


@every_method
@pytest.mark.parametrize("scope", ["row", "block", "layer"])
def test_a_mask_made_by_others_counts(method, scope):
    # each input twice, on both sides of a solver's block: repairing the first must not wake what is pruned in the next
    x, weight = inputs(80).repeat(1, 2) + 0.01 * inputs(160, seed=1), layer(6, 160)
    weight[torch.rand(6, 160, generator=torch.Generator().manual_seed(3)) < 0.25] = 0
    pruned = pruned_by(method, weight, Unstructured(0.5, scope), x=x)
    assert pruned[weight == 0].eq(0).all()
    assert (pruned == 0).sum() == round(0.5 * weight.numel())


@every_method
def test_four_of_eight_is_not_two_of_four(method):
    pruned = pruned_by(method, layer(), as_pattern("4:8"))
    assert kept_a_group(pruned, 8).eq(4).all()
    assert kept_a_group(pruned, 4).ne(2).any()


@every_method
def test_n_is_what_is_kept_everywhere(method):
    pattern = as_pattern("1:4")
    assert pattern.sparsity == 0.75
    assert (pruned_by(method, layer(), pattern) == 0).double().mean() == 0.75
    report = prune(tiny_models.make("llama"), method, pattern, tiny_models.batches("llama"))
    assert report.sparsity == 0.75


@every_method
@pytest.mark.parametrize("shapes", [[(1, 2)], [(1, 5), (3, 17), (2, 9)]], ids=str)
def test_any_number_of_samples_of_any_length_serves(method, shapes):
    # buffers of max_position_embeddings would take terabytes
    model = tiny_models.llama(max_position_embeddings=1 << 40)
    report = prune(model, method, 0.5, [torch.randint(3, tiny_models.VOCABULARY, shape) for shape in shapes])
    assert len(report.layers) == 21
    assert report.sparsity == 0.5


@every_method
@every_pattern
def test_nan_does_not_rank_as_the_largest(method, pattern):
    weight = layer()
    weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="holds 1 NaN"):
        pruned_by(method, weight, pattern)


def test_a_layer_of_more_weights_than_torch_takes_a_quantile_of_is_ranked():
    rows, columns = 4096, 4100
    assert rows * columns > 1 << 24
    mask = Unstructured(0.5, "layer").mask(torch.arange(rows * columns).view(rows, columns) % 1021)
    assert (~mask).sum() == rows * columns // 2


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.needs is not GradSquare])
def test_no_more_than_one_blocks_hessians_are_alive(method, monkeypatch):
    alive, most = weakref.WeakSet(), [0]

    class Counted(Gram):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most[0] = max(most[0], len(alive))

    monkeypatch.setattr("sparsekern.oneshot.Gram", Counted)
    prune(tiny_models.make("llama"), method(), "2:4", tiny_models.batches("llama"))
    # what q, k and v read; o; gate and up; down
    assert most == [4]


UNUSUAL = {
    "zero row": lambda: layer().index_fill_(0, torch.tensor([3]), 0),
    "zero column": lambda: layer().index_fill_(1, torch.tensor([0, 5]), 0),
    "all zero": lambda: torch.zeros(5, 8),
    "constant": lambda: torch.full((5, 8), -0.3),
    "negative zeros": lambda: layer().where(layer(seed=1) > 0, -0.0),
    "subnormal": lambda: layer() * 1e-40,
    "largest fp16": lambda: (layer().sign() * 65504).half(),
    "one row": lambda: layer(1, 48),
    "one column": lambda: layer(12, 1),
    "one weight": lambda: layer(1, 1),
    "prime rows": lambda: layer(13, 8),
    "prime columns": lambda: layer(5, 37),
    "transposed": lambda: layer(48, 12).T,
    "sliced": lambda: layer(24, 96)[::2, 1::2],
    "expanded": lambda: layer(1, 48).expand(12, 48),
    "bfloat16": lambda: layer().bfloat16(),
    "float64": lambda: layer().double(),
}


@every_method
@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_weight_is_pruned_to_the_exact_count_and_not_written_to(method, kind):
    weight = UNUSUAL[kind]()
    before = weight.clone()
    for pattern in [Unstructured(0.5), Unstructured(0.5, "row")] + [NM(2, 4)] * (weight.shape[1] % 4 == 0):
        pruned = pruned_by(method, weight, pattern)
        assert torch.equal(weight, before)
        assert pruned.shape == weight.shape
        assert pruned.isfinite().all()
        assert pruned[weight == 0].eq(0).all()
        zeros, asked = int((pruned == 0).sum()), round(pattern.sparsity * weight.numel())
        assert zeros >= asked
        assert zeros == asked or (weight == 0).any()
        if isinstance(pattern, NM):
            assert kept_a_group(pruned, pattern.m).max() <= pattern.n


@every_method
@every_pattern
@pytest.mark.parametrize("tokens", [1, 7])
def test_fewer_tokens_than_inputs_serve(method, pattern, tokens):
    weight = layer()
    pruned = pruned_by(method, weight, pattern, x=inputs(48, tokens))
    assert pruned.isfinite().all()
    assert (pruned == 0).sum() == round(pattern.sparsity * weight.numel())


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs not in (None, GradSquare)])
@every_pattern
@pytest.mark.parametrize("dead", [[7], [0, 1, 2, 3, 30], list(range(48))], ids=len)
def test_nothing_stays_on_a_dead_input_and_it_counts_as_pruned(name, pattern, dead):
    x, weight, method = inputs(48), layer(), METHODS[name]()
    x[:, dead] = 0
    pruned = pruned_by(method, weight, pattern, x=x)
    assert pruned.isfinite().all()
    assert pruned[:, dead].eq(0).all()
    if pattern == Unstructured(0.5) and len(dead) < 24:
        assert (pruned == 0).sum() == round(0.5 * weight.numel())
    again = pruned_by(method, pruned, pattern, x=x)
    assert torch.equal(again, pruned)
