"""Gradual pruning: the cubic schedule by hand, counts on the way, and where it ends."""

import io

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

from sparsekern import hf
from sparsekern.gradual import CubicSchedule, GradualMagnitude
from sparsekern.pattern import NM, Unstructured, as_pattern
from tests import tiny_models

PATTERNS = ["2:4", "1:4", "4:8", 0.37, Unstructured(0.7, "row"), Unstructured(0.9, "model")]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def trained(model: nn.Module, gradual: GradualMagnitude, optimizer: torch.optim.Optimizer, steps: int, after=None):
    """Train on noise, `after` called after every step."""
    for step in range(gradual.steps, gradual.steps + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 16, generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x), torch.randint(8, (4,), generator=generator)).backward()
        optimizer.step()
        gradual.step()
        if after:
            after()


def pruned(model: nn.Module) -> list[int]:
    return [int((parameter == 0).sum()) for parameter in model.parameters() if parameter.dim() > 1]


def test_the_schedule_is_the_papers():
    schedule = CubicSchedule(begin=10, end=50, every=10, initial=0.2)
    # s_f + (s_i - s_f) (1 - t')^3 with t' = 0, 1/4, 1/2, 3/4, 1
    by_hand = [0.2, 0.8 - 0.6 * 27 / 64, 0.8 - 0.6 / 8, 0.8 - 0.6 / 64, 0.8]
    assert [schedule.sparsity(step, 0.8) for step in range(10, 51, 10)] == pytest.approx(by_hand)
    assert [schedule.sparsity(step, 0.8) for step in (0, 9, 51, 999)] == [0, 0, 0.8, 0.8]
    assert [step for step in range(60) if schedule.prunes_at(step)] == [10, 20, 30, 40, 50]


def test_the_last_pruning_is_at_the_end_even_where_the_interval_does_not_reach_it():
    assert [step for step in range(99) if CubicSchedule(3, 12, every=4).prunes_at(step)] == [3, 7, 11, 12]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((5, 5), "0 <= begin < end, got begin 5 and end 5"),
        ((-1, 5), "0 <= begin < end, got begin -1"),
        ((0, 5, 0), "every must be at least 1 step, got 0"),
        ((0, 5, 1, 1.5), "initial sparsity must lie in 0..1, got 1.5"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        CubicSchedule(*settings)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_without_training_it_ends_where_magnitude_pruning_does(pattern):
    """The rule by which a pattern is grown into reaches the pattern itself."""
    model, wanted = plain(), as_pattern(pattern).with_scope("layer")
    weights = {"0.weight": model[0].weight.detach().clone(), "2.weight": model[2].weight.detach().clone()}
    saliencies = {name: weight.abs() for name, weight in weights.items()}
    patterns = dict.fromkeys(weights, wanted)
    if getattr(wanted, "scope", None) == "model":
        patterns = wanted.spread(saliencies)
    gradual = GradualMagnitude(model, pattern, CubicSchedule(0, 20, every=3))
    gradual.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in range(20):
        gradual.step()
    for name, parameter in model.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name].where(patterns[name].mask(saliencies[name]), 0.0))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_counts_are_exact_on_the_way_and_masks_are_nested(pattern):
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    schedule = CubicSchedule(0, 20, every=3, initial=0.1)
    gradual = GradualMagnitude(model, pattern, schedule).attach(optimizer)
    seen = [gradual.masks]
    wanted = as_pattern(pattern)

    def check():
        masks, before = gradual.masks, seen[-1]
        assert not any((masks[name] & ~before[name]).any() for name in masks)
        for name, parameter in model.named_parameters():
            if name in masks:
                assert (parameter[~masks[name]] == 0).all()
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert (optimizer.state[parameter][moment][~masks[name]] == 0).all()
        if schedule.prunes_at(gradual.steps):
            sizes = [masks[name].numel() for name in masks]
            sizes = [sum(sizes)] if getattr(wanted, "scope", None) == "model" else sizes
            count = sum(round(schedule.sparsity(gradual.steps, wanted.sparsity) * size) for size in sizes)
            assert sum(int((~mask).sum()) for mask in masks.values()) == count
        seen.append(masks)

    trained(model, gradual, optimizer, 25, check)
    assert gradual.finished
    assert torch.equal(seen[-1]["0.weight"], seen[21]["0.weight"])
    if isinstance(wanted, NM):
        for mask in gradual.masks.values():
            assert (mask.view(-1, wanted.m).sum(1) == wanted.n).all()


def test_every_pruned_magnitude_was_below_every_kept_one_of_its_layer():
    model = plain()
    gradual = GradualMagnitude(model, 0.8, CubicSchedule(0, 10)).attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in range(10):
        sizes = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
        gradual.step()
        for name, mask in gradual.masks.items():
            assert sizes[name][~mask].max() <= sizes[name][mask].min()


def test_a_group_never_loses_more_than_the_pattern_prunes_of_it():
    model = plain()
    gradual = GradualMagnitude(model, "2:4", CubicSchedule(0, 30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradual.attach(optimizer)

    def check():
        assert all((mask.view(-1, 4).sum(1) >= 2).all() for mask in gradual.masks.values())

    trained(model, gradual, optimizer, 30, check)
    assert gradual.sparsity == 0.5


def test_several_optimizers_of_one_model_are_masked_to_the_end():
    model = plain()
    gradual = GradualMagnitude(model, 0.5, CubicSchedule(0, 6))
    first, last = (torch.optim.Adam(layer.parameters(), 0.01) for layer in (model[0], model[2]))
    gradual.attach(first).attach(last).attach(first)
    for _ in range(9):
        model(torch.randn(4, 16)).square().sum().backward()
        # the one that was attached first has the last word
        last.step(), first.step()
        gradual.check()
        gradual.step()
    assert pruned(model) == [24 * 16 // 2, 8 * 24 // 2]
    gradual.detach()
    model(torch.randn(4, 16)).square().sum().backward()
    first.step(), last.step()
    assert sum(pruned(model)) < (24 * 16 + 8 * 24) // 2


def test_a_saved_state_goes_on_bit_for_bit():
    def fresh():
        model = plain()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, GradualMagnitude(model, Unstructured(0.8, "model"), CubicSchedule(2, 20, every=3))

    model, optimizer, gradual = fresh()
    gradual.attach(optimizer)
    trained(model, gradual, optimizer, 9)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), gradual.state_dict()], file)
    trained(model, gradual, optimizer, 13)

    file.seek(0)
    again, its_optimizer, its_gradual = fresh()
    for part, state in zip((again, its_optimizer, its_gradual), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    its_gradual.attach(its_optimizer)
    trained(again, its_gradual, its_optimizer, 13)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert its_gradual.steps == gradual.steps == 22


def test_the_state_of_another_pattern_or_schedule_is_refused():
    state = GradualMagnitude(plain(), "2:4", CubicSchedule(0, 9)).state_dict()
    with pytest.raises(ValueError, match="saved with patterns .*NM.* go on with the same"):
        GradualMagnitude(plain(), 0.5, CubicSchedule(0, 9)).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with schedule .*'end': 9.*'end': 8"):
        GradualMagnitude(plain(), "2:4", CubicSchedule(0, 8)).load_state_dict(state)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert"])
def test_of_a_transformers_model_it_takes_what_prune_takes(name):
    model = tiny_models.make(name)
    gradual = GradualMagnitude(model, 0.5, CubicSchedule(0, 1)).attach(torch.optim.SGD(model.parameters(), lr=0.0))
    before = {id(p): int((p == 0).sum()) for p in model.parameters()}
    gradual.step()
    assert all((hf.weight(layer) == 0).float().mean() == 0.5 for _, layer in hf.layers(model))
    taken = {id(hf.parameter(layer)) for _, layer in hf.layers(model)}
    assert all(int((p == 0).sum()) == before[id(p)] for p in model.parameters() if id(p) not in taken)


def test_of_another_model_it_takes_linear_layers_and_convolutions():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),
            "norm": nn.BatchNorm2d(8),
            "embedding": nn.Embedding(5, 8),
            "computed": parametrizations.weight_norm(nn.Linear(8, 8)),
            "linear": nn.Linear(8, 10),
        }
    )
    gradual = GradualMagnitude(model, 0.75, CubicSchedule(0, 1)).attach(torch.optim.SGD(model.parameters(), lr=0.0))
    gradual.step()
    assert gradual.masks.keys() == {"conv.weight", "linear.weight"}
    assert [int((model[name].weight == 0).sum()) for name in ("conv", "linear")] == [162, 60]


def test_one_pattern_a_layer_leaves_the_others_dense():
    model = plain()
    gradual = GradualMagnitude(model, {"2": "1:4"}, CubicSchedule(0, 1))
    gradual.attach(torch.optim.SGD(model.parameters(), lr=0.0)).step()
    assert pruned(model) == [0, 144]
    assert gradual.sparsity == 0.75


def test_skipped_layers_stay_dense():
    model = plain()
    GradualMagnitude(model, 0.5, CubicSchedule(0, 1), skip="0").attach(
        torch.optim.SGD(model.parameters(), lr=0.0)
    ).step()
    assert pruned(model) == [0, 96]


def test_nothing_changes_until_it_is_attached():
    model = plain()
    gradual = GradualMagnitude(model, 0.5, CubicSchedule(0, 9, initial=0.3))
    assert sum(pruned(model)) < (24 * 16 + 8 * 24) // 2
    gradual.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    assert pruned(model) == [round(0.3 * 384), round(0.3 * 192)]


def test_zeros_that_are_there_stay():
    model = plain()
    with torch.no_grad():
        # the largest weights, which magnitude would not choose
        model[0].weight[model[0].weight.abs() > 0.2] = 0
    there = model[0].weight == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    gradual = GradualMagnitude(model, 0.5, CubicSchedule(0, 10)).attach(optimizer)
    trained(model, gradual, optimizer, 10, lambda: None)
    assert 50 < there.sum() < 192
    assert (model[0].weight[there] == 0).all()
    assert pruned(model) == [192, 96]


def test_a_model_with_more_zeros_than_asked_is_refused():
    model = plain()
    model[0].weight.data[:, :10] = 0
    with pytest.raises(ValueError, match="0: 240 weights are zero already, and 50% prunes 192; ask for more, or leave"):
        GradualMagnitude(model, 0.5, CubicSchedule(0, 9))


def test_what_cannot_be_grown_into_is_refused_by_name():
    schedule = CubicSchedule(0, 9)
    with pytest.raises(ValueError, match="0: pattern 3:7 needs in_features to be a multiple of 7, got 16; leave"):
        GradualMagnitude(plain(), "3:7", schedule)
    with pytest.raises(
        ValueError, match="0: pattern 2:4 is of a linear layer's inputs, and this is a Conv1d; use skip"
    ):
        GradualMagnitude(nn.Sequential(nn.Conv1d(4, 4, 1)), "2:4", schedule)
    with pytest.raises(ValueError, match='0: scope "block" is for solvers'):
        GradualMagnitude(plain(), Unstructured(0.5, "block"), schedule)
    with pytest.raises(ValueError, match="0: a schedule from 60% cannot end at pattern 2:4"):
        GradualMagnitude(plain(), "2:4", CubicSchedule(0, 9, initial=0.6))
    with pytest.raises(ValueError, match="0: weight is on the meta device"):
        GradualMagnitude(plain().to("meta"), 0.5, schedule)
    with pytest.raises(ValueError, match="skip 'fc' names no layer; the first one is 0"):
        GradualMagnitude(plain(), 0.5, schedule, skip=["fc"])
    with pytest.raises(ValueError, match="pattern names 'fc', which is no layer; the first one is 0"):
        GradualMagnitude(plain(), {"fc": 0.5}, schedule)
    with pytest.raises(ValueError, match="Embedding has no layer to prune"):
        GradualMagnitude(nn.Embedding(4, 4), 0.5, schedule)
    with pytest.raises(ValueError, match='scope "model" is one pattern for all layers'):
        GradualMagnitude(plain(), {"0": Unstructured(0.5, "model"), "2": 0.5}, schedule)


def test_a_weight_that_became_nan_is_named():
    model = plain()
    gradual = GradualMagnitude(model, 0.5, CubicSchedule(0, 9)).attach(torch.optim.SGD(model.parameters(), lr=0.0))
    model[2].weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="2: weight holds 1 NaN values"):
        gradual.step()
