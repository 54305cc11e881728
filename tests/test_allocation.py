"""allocate(): exact sums, the lowest held-out loss wins, and a model that comes back as it was."""

import copy
import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern import allocation, hf
from sparsekern.allocation import OWL, LossAware, Uniform, allocate
from sparsekern.calibrate import Walk
from sparsekern.gradients import mean_loss
from sparsekern.stats import InputNorm
from tests import tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return tiny_models.make("llama")


@pytest.fixture
def batches():
    return tiny_models.batches("llama", 9)


def zeros(model, layers):
    return sum(int((hf.weight(layer) == 0).sum()) for layer in dict(hf.layers(model)).values())


@dataclass(frozen=True)
class Fixed:
    """Proposes what it was told, for layers by the end of their name."""

    sparsities: tuple[tuple[str, float], ...]

    def propose(self, model, layers, pattern, batches):
        told = {name: value for name in layers for end, value in self.sparsities if name.endswith(end)}
        return dict.fromkeys(layers, pattern.sparsity) | told


@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(-0.5, 1.5)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_any_proposal_is_made_to_add_up_exactly(proposed, sparsity):
    sizes = {str(number): size for number, (size, _) in enumerate(proposed)}
    wanted = {str(number): value for number, (_, value) in enumerate(proposed)}
    exact = allocation._exact(wanted, sizes, sk.Unstructured(sparsity))
    # a pattern rounds sparsity * size, and must come to the same count
    counts = {name: sizes[name] - sk.Unstructured(value).kept(sizes[name]) for name, value in exact.items()}
    assert sum(counts.values()) == round(sparsity * sum(sizes.values()))
    assert all(0 <= counts[name] <= size for name, size in sizes.items())


def test_what_adds_up_already_is_rounded_by_one_weight_at_most():
    exact = allocation._exact({"a": 0.4, "b": 0.6}, {"a": 999, "b": 999}, sk.Unstructured(0.5))
    assert abs(exact["a"] * 999 - 0.4 * 999) <= 1
    assert abs(exact["b"] * 999 - 0.6 * 999) <= 1


def test_the_model_comes_back_as_it_was_and_prune_takes_the_patterns(model, batches):
    before = copy.deepcopy(model.state_dict())
    report = allocate(model, sk.SparseGPT(block_size=16), 0.6, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.candidate.partition("(")[0] for p in report.proposals] == ["Uniform", "OWL", "LossAware"]
    sizes = {name: hf.weight(layer).numel() for name, layer in hf.layers(model)}
    for proposal in report.proposals:
        assert sum(round(s * sizes[n]) for n, s in proposal.sparsities.items()) == round(0.6 * sum(sizes.values()))
    pruned = sk.prune(model, sk.SparseGPT(block_size=16), report.patterns, batches)
    assert zeros(model, pruned) == round(0.6 * sum(sizes.values()))
    assert {row.name: row.sparsity for row in pruned.layers} == pytest.approx(report.chosen.sparsities, abs=1e-6)


def test_the_loss_of_a_proposal_is_that_of_the_model_pruned_by_it_on_batches_held_out(model, batches):
    report = allocate(model, sk.Wanda(), 0.5, batches, candidates=[Fixed((("down_proj", 0.3),))])
    (proposal,) = report.proposals
    assert report.held_out_batches == 1
    assert report.dense_loss == pytest.approx(mean_loss(model, batches[-1:]))
    with torch.no_grad():
        assert report.dense_loss == pytest.approx(
            sum(float(model(ids[None], labels=ids[None]).loss) for ids in batches[-1]) / 2, rel=1e-5
        )
    patterns = {name: sk.Unstructured(sparsity) for name, sparsity in proposal.sparsities.items()}
    sk.prune(model, sk.Wanda(), patterns, batches[:-1])
    assert mean_loss(model, batches[-1:]) == pytest.approx(proposal.loss, rel=1e-6)


def test_the_lowest_loss_wins_and_the_first_of_equals(model, batches):
    everything_in_one = Fixed((("o_proj", 1.0), ("v_proj", 1.0)))
    report = allocate(model, sk.Magnitude(), 0.3, batches, candidates=[Uniform(), everything_in_one, Fixed(())])
    losses = [proposal.loss for proposal in report.proposals]
    assert losses[0] == losses[2]
    assert report.chosen is report.proposals[losses.index(min(losses))]
    same = allocate(model, sk.Magnitude(), 0.3, batches, candidates=[Uniform(), Fixed(())])
    assert same.chosen.candidate == "Uniform()"
    assert same.to_json()["chosen"] == "Uniform()"
    assert "chosen for 30%: Uniform()" in str(same)


def test_owl_keeps_blocks_with_outliers_denser(model, batches):
    with torch.no_grad():
        # a few large weights in the second block, and only there
        model.model.layers[1].mlp.up_proj.weight[:4, :4] *= 50
    layers = dict(hf.layers(model))
    sparsities = OWL().propose(model, layers, sk.Unstructured(0.6), batches)
    # the definition, block by block
    ratios = []
    visits = [(name, hf.weight(layer).abs() * stats.norm) for name, layer, stats in Walk(model, batches, InputNorm)]
    for block in range(3):
        saliency = torch.cat([s.flatten() for name, s in visits if f"layers.{block}." in name])
        ratios.append(float((saliency > 5 * saliency.mean()).float().mean()))
    assert ratios[1] != ratios[0]
    by_block = [sparsities[f"model.layers.{block}.mlp.up_proj"] for block in range(3)]
    assert sorted(range(3), key=ratios.__getitem__) == sorted(range(3), key=by_block.__getitem__, reverse=True)
    assert max(by_block) - min(by_block) == pytest.approx(0.16)
    assert sum(by_block) / 3 == pytest.approx(0.6)
    assert len({sparsities[name] for name in layers if "layers.1." in name}) == 1


def test_the_price_finds_the_cheapest_sum():
    """Against every combination of a coarse grid."""
    grid = torch.linspace(0.3, 0.7, 5, dtype=torch.float64)
    sizes = {"a": 10, "b": 10, "c": 20}
    curves = {name: scale * (6 * grid).exp() for name, scale in (("a", 1.0), ("b", 9.0), ("c", 3.0))}
    found = allocation._cheapest(curves, sizes, grid, 0.5)

    def cost(places):
        return sum(float(curves[name][place]) for name, place in zip(sizes, places, strict=True))

    def pruned(places):
        return sum(size * float(grid[place]) for size, place in zip(sizes.values(), places, strict=True))

    places = [int((grid - found[name]).abs().argmin()) for name in sizes]
    assert pruned(places) >= 0.5 * 40 - 1e-9
    # no other choice prunes as much for less
    rivals = [rival for rival in itertools.product(range(5), repeat=3) if pruned(rival) >= pruned(places) - 1e-9]
    assert cost(places) <= min(map(cost, rivals)) + 1e-9


def test_a_layer_that_the_loss_does_not_feel_is_pruned_most(model, batches):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e-4
    layers = dict(hf.layers(model))
    sparsities = LossAware(solver=sk.SparseGPT(block_size=16)).propose(model, layers, sk.Unstructured(0.5), batches)
    assert all(0.35 <= value <= 0.65 for value in sparsities.values())
    # what feeds the weak layer hardly matters either
    assert sparsities["model.layers.1.mlp.up_proj"] == pytest.approx(0.65)
    assert min(sparsities.values()) == pytest.approx(0.35)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "falcon_h1"])
def test_other_architectures_are_allocated_too(name):
    model, batches = tiny_models.make(name), tiny_models.batches(name, 4)
    layers = dict(hf.layers(model))
    report = allocate(model, sk.SparseGPT(block_size=16), 0.5, batches)
    assert len(report.proposals) == 3
    assert set(report.patterns) == set(layers)


def test_layers_that_are_skipped_stay_out_of_the_sum(model, batches):
    report = allocate(model, sk.Magnitude(), 0.5, batches, candidates=[Uniform()], skip="*.down_proj")
    assert not [name for name in report.patterns if name.endswith("down_proj")]


def test_the_weights_are_put_back_when_pruning_fails(model, batches):
    @dataclass(frozen=True)
    class Failing:
        needs: ClassVar[None] = None

        def prune(self, weight, stats, pattern):
            if weight.shape[0] == 48:
                raise RuntimeError("planted")
            return torch.zeros_like(weight)

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"gate_proj: planted"):
        allocate(model, Failing(), 0.5, batches, candidates=[Uniform()])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_allocated_is_refused(model, batches):
    with pytest.raises(ValueError, match="pattern 2:4 gives every layer the same sparsity"):
        allocate(model, sk.Wanda(), "2:4", batches)
    with pytest.raises(ValueError, match='scope "model" chooses the sparsity of each layer itself'):
        allocate(model, sk.Magnitude(), sk.Unstructured(0.5, "model"), batches)
    with pytest.raises(ValueError, match="at least two calibration batches"):
        allocate(model, sk.Wanda(), 0.5, batches[:1])
    with pytest.raises(ValueError, match="at least one candidate"):
        allocate(model, sk.Wanda(), 0.5, batches, candidates=[])
    vit = tiny_models.make("vit")
    with pytest.raises(ValueError, match="holds no labels"):
        allocate(vit, sk.Wanda(), 0.5, tiny_models.batches("vit"))
