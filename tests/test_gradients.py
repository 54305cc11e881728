"""squared_gradients against torch.autograd.grad, one sequence at a time; the model comes back as it was."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import hf
from sparsekern.gradients import squared_gradients
from sparsekern.stats import GradSquare
from tests import tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, out_features):
        super().__init__()
        self.used, self.unused = nn.Linear(6, out_features), nn.Linear(6, out_features)

    def forward(self, x):
        return self.used(x).tanh()


class Plain(nn.Module):
    """Two blocks, each with a layer that takes no part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(6), Block(5)])

    def forward(self, x, labels):
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(loss=(x - labels).square().mean())


def with_labels(name):
    """Keyword batches for the model `name`, with labels."""
    labelled = []
    for batch in tiny_models.batches(name, count=2):
        keywords = dict(batch) if isinstance(batch, dict) else {"input_ids": batch}
        ids = keywords.get("decoder_input_ids", keywords.get("input_ids"))
        labelled.append(keywords | {"labels": torch.tensor([0, 1]) if ids is None else ids.clone()})
    return labelled


def by_hand(model, batches):
    """The mean squared gradient by name, from batches of keywords cut into sequences of one."""
    layers = hf.layers(model)
    sums = {name: torch.zeros_like(hf.weight(layer)) for name, layer in layers}
    sequences = [{key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(2)]
    for sequence in sequences:
        loss = model(**sequence).loss
        gradients = torch.autograd.grad(loss, [hf.parameter(layer) for _, layer in layers], allow_unused=True)
        for (name, layer), gradient in zip(layers, gradients, strict=True):
            if gradient is not None:
                square = gradient[layer.index].square() if isinstance(layer, hf.Expert) else gradient.square()
                # Conv1D and some experts keep their weight transposed
                straight = not layer.transposed if isinstance(layer, hf.Expert) else isinstance(layer, nn.Linear)
                sums[name] += square if straight else square.T
    return {name: total / len(sequences) for name, total in sums.items()}


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_they_are_those_of_the_models_own_loss(name):
    if why := tiny_models.why_two_answers(name):
        pytest.skip(f"{name}: {why}")
    model = tiny_models.make(name)
    want = by_hand(model, with_labels(name))
    got = {layer: stats for layer, _, stats in squared_gradients(model, with_labels(name))}
    # a gradient may be there and be zero
    assert got.keys() >= {layer for layer, square in want.items() if square.any()}
    for layer, stats in got.items():
        scale = want[layer].max().item()
        torch.testing.assert_close(stats.mean_square, want[layer], rtol=1e-4, atol=1e-6 * scale)
        assert stats.samples == 4


def test_token_ids_are_their_own_labels():
    model = tiny_models.make("gpt2")
    tokens = {name: stats for name, _, stats in squared_gradients(model, tiny_models.batches("gpt2", count=2))}
    for name, _, stats in squared_gradients(model, with_labels("gpt2")):
        assert torch.equal(stats.mean_square, tokens[name].mean_square)


def test_a_plain_module_with_a_loss_serves_and_what_the_loss_ignores_is_left_out():
    model = Plain()
    batches = [{"x": torch.randn(2, 6), "labels": torch.randn(2, 5)} for _ in range(3)]
    want = by_hand(model, batches)
    got = {name: stats.mean_square for name, _, stats in squared_gradients(model, batches)}
    assert list(got) == ["blocks.0.used", "blocks.1.used"]
    for name, square in got.items():
        torch.testing.assert_close(square, want[name])


def test_a_sequence_that_does_not_reach_a_layer_counts_as_a_gradient_of_zero():
    model = Plain()
    model.blocks[0].forward = lambda x: (model.blocks[0].unused if x[0, 0] > 0 else model.blocks[0].used)(x)
    batch = {"x": torch.randn(2, 6), "labels": torch.randn(2, 5)}
    batch["x"][:, 0] = torch.tensor([1.0, -1.0])
    want = by_hand(model, [batch])
    got = {name: stats for name, _, stats in squared_gradients(model, [batch])}
    assert list(got) == ["blocks.0.used", "blocks.0.unused", "blocks.1.used"]
    for name, stats in got.items():
        assert stats.samples == 2
        torch.testing.assert_close(stats.mean_square, want[name])


def test_only_the_wanted_layers_are_differentiated_and_progress_counts_sequences():
    model, told = tiny_models.make("llama"), []
    name = "model.layers.1.mlp.up_proj"
    visits = squared_gradients(
        model, tiny_models.batches("llama"), {name}, lambda done, total: told.append((done, total))
    )
    assert [layer for layer, _, _ in visits] == [name]
    assert told == [(done, 6) for done in range(1, 7)]


def test_no_two_gradients_are_alive_at_once(monkeypatch):
    model, alive = tiny_models.make("llama"), []

    class Counting(GradSquare):
        def add(self, gradient):
            alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
            super().add(gradient)

    monkeypatch.setattr("sparsekern.gradients.GradSquare", Counting)
    list(squared_gradients(model, tiny_models.batches("llama")))
    assert set(alive) == {1}


def test_activations_of_one_block_are_alive_at_once():
    """A tensor that backward saved must be gone when the next block runs forward."""
    model, alive = tiny_models.make("llama"), [0]
    seen = []

    def pack(tensor):
        alive[0] += tensor.numel()
        return tensor

    batch = tiny_models.batches("llama", count=1)
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: seen.append(alive[0]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next(squared_gradients(model, batch))
    # of what a block's own operations would save not one tensor: no more than its inputs and the model's embedding
    hidden = 11 * 32
    assert seen[2] - seen[1] <= 2 * hidden


def test_a_frozen_model_in_train_mode_comes_back_as_it_was():
    model = tiny_models.make("llama").requires_grad_(False).train()
    model.model.norm.weight.requires_grad_(True)
    model.model.norm.weight.grad = kept = torch.ones(32)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    for _ in squared_gradients(model, tiny_models.batches("llama")):
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
        assert model.model.norm.weight.grad is kept
        assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
        assert all(module.training for module in model.modules())
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        assert model.config.use_cache
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())


def test_nothing_is_left_behind_when_a_gradient_is_not_finite():
    model = tiny_models.make("llama").train()
    # the loss stays finite: only its derivative is not
    model.model.layers[1].mlp.act_fn = NotDifferentiable()
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.mlp\.gate_proj: calibration batch 0: gradient holds .* NaN"
    ):
        next(squared_gradients(model, tiny_models.batches("llama")))
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(module.training for module in model.modules())


class NotDifferentiable(nn.Module):
    def forward(self, x):
        return x + (x - x).sqrt()


def test_a_loss_that_is_not_finite_names_the_batch():
    model, batches = tiny_models.make("llama"), tiny_models.batches("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = torch.nan
    batches = [batch.where(batch != 50, 51) for batch in batches]
    batches[1][1, 3] = 50
    with pytest.raises(ValueError, match="calibration batch 1: the loss is nan"):
        next(squared_gradients(model, batches))


def test_what_has_no_loss_is_refused():
    model = tiny_models.make("llama")
    with pytest.raises(ValueError, match="calibration batch 0 holds no labels"):
        next(squared_gradients(model, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]))
    with pytest.raises(TypeError, match="LlamaModel has no loss to differentiate: its forward returns"):
        next(squared_gradients(model.model, tiny_models.batches("llama")))
    bare = nn.Sequential()
    bare.blocks = nn.ModuleList([Block(5)])
    with pytest.raises(TypeError, match="Sequential has no loss to differentiate: its forward takes no labels"):
        next(squared_gradients(bare, tiny_models.batches("llama")))


def test_what_cannot_be_differentiated_is_refused_with_its_name_and_the_remedy():
    model, batches = tiny_models.make("llama"), tiny_models.batches("llama")
    with pytest.raises(ValueError, match=r"^model\.layers\.0\..*float16 underflow; load the model in bfloat16"):
        next(squared_gradients(model.half(), batches))
    with pytest.raises(ValueError, match=r"^model\.layers\.0\..*meta device; load"):
        next(squared_gradients(model.float().to("meta"), batches))


def test_pruning_a_model_by_them_removes_what_the_dense_models_loss_feels_least():
    model = tiny_models.make("llama")
    stats = {name: stats for name, _, stats in squared_gradients(model, tiny_models.batches("llama"))}
    before = {name: hf.weight(layer).clone() for name, layer in hf.layers(model)}
    report = sk.prune(model, sk.OBD(), 0.5, tiny_models.batches("llama"))
    for name, layer in hf.layers(model):
        assert torch.equal(hf.weight(layer), sk.OBD().prune(before[name], stats[name], sk.Unstructured(0.5)))
    assert report.calibration == "gradients"
    assert {(row.error, row.held_out_error, row.damping) for row in report.layers} == {(None, None, None)}


def test_a_layer_that_the_loss_ignores_stays_dense_and_is_listed():
    model, batches = Plain(), [{"x": torch.randn(2, 6), "labels": torch.randn(2, 5)}]
    report = sk.prune(model, sk.OBD(), 0.5, batches)
    assert [row.name for row in report.layers] == ["blocks.0.used", "blocks.1.used"]
    assert ("blocks.0.unused", "never called on the calibration batches") in report.skipped
    assert model.blocks[0].unused.weight.all()
