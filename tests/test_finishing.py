"""Finishing a block: its output comes closer to the dense one, zeros stay, and what does not help is undone."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import hf
from sparsekern.finishing import Call, Finish
from tests import tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, scale=1.0):
        return x + self.down(torch.relu(self.up(x))) * scale, "not a tensor"


@pytest.fixture
def problem():
    """A pruned block, its layers by name, and calls that aim at the dense one."""
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    inputs = torch.randn(16, 3, 5, 16)
    calls = [Call((x,), {"scale": 0.5}, block(x, scale=0.5)[0], lambda t: t.reshape(-1, 16)) for x in inputs]
    layers = {"up": block.up, "down": block.down}
    for layer in layers.values():
        layer.weight.data *= sk.as_pattern("2:4").mask(layer.weight.abs())
    return block, layers, calls


def test_the_output_comes_closer_and_zeros_stay(problem):
    block, layers, calls = problem
    masks = {name: layer.weight != 0 for name, layer in layers.items()}
    with torch.no_grad():
        report = Finish(epochs=10, learning_rate=0.05).fit("block", block, layers, calls)
    assert report.kept
    assert report.after < 0.8 * report.before
    for name, layer in layers.items():
        assert torch.equal(layer.weight != 0, masks[name])
        assert not torch.signbit(layer.weight[~masks[name]]).any()
        assert not layer.weight.requires_grad
        assert layer.weight.grad is None


def test_only_the_layers_named_change(problem):
    block, layers, calls = problem
    before = copy.deepcopy(block)
    Finish().fit("block", block, {"up": layers["up"]}, calls)
    changed = {name for name, p in block.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {"up.weight"}


def test_an_expert_that_is_left_dense_stays_as_it_is():
    """It shares its parameter with experts that are finished."""
    model = tiny_models.make("mixtral")
    names = [name for name, _ in hf.layers(model) if ".experts." in name]
    before = hf.weight(dict(hf.layers(model))[names[0]]).clone()
    others = hf.parameter(dict(hf.layers(model))[names[0]]).clone()
    batches = tiny_models.batches("mixtral")
    report = sk.prune(model, sk.Wanda(), 0.5, batches, skip=[names[0]], finish=Finish(learning_rate=1e-3))
    assert report.blocks[0].kept
    assert torch.equal(hf.weight(dict(hf.layers(model))[names[0]]), before)
    assert not torch.equal(hf.parameter(dict(hf.layers(model))[names[0]]), others)


def test_a_batch_that_goes_past_the_layers_says_nothing_of_them(problem):
    block, layers, calls = problem

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x, scale):
            return self.block(x, scale) if scale else x

    past = Call(calls[0].args, {"scale": 0.0}, calls[0].args[0] + 1, calls[0].counts)
    report = Finish(epochs=10, learning_rate=0.05).fit("block", Gate(), layers, [past, *calls])
    assert report.kept


def test_a_batch_of_nothing_but_padding_does_not_decide():
    ids = torch.randint(3, tiny_models.VOCABULARY, (5, 2, 9), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": some, "attention_mask": torch.ones_like(some)} for some in ids]
    batches[-1]["attention_mask"][:] = 0
    report = sk.prune(tiny_models.make("llama"), sk.Wanda(), 0.5, batches, finish=Finish())
    assert all(block.before > 0 for block in report.blocks)


def test_what_does_not_lower_the_held_out_error_is_undone(problem):
    block, layers, calls = problem
    before = copy.deepcopy(block.state_dict())
    report = Finish(epochs=3, learning_rate=50.0).fit("block", block, layers, calls)
    assert not report.kept
    assert report.after > report.before
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_the_decision_is_taken_on_batches_that_were_not_fitted(problem):
    block, layers, calls = problem
    noise = [Call(c.args, c.kwargs, torch.randn_like(c.target) * 100, c.counts) for c in calls[-2:]]
    report = Finish(epochs=2).fit("block", block, layers, calls[:-2] + noise)
    assert report.before == pytest.approx(1, abs=0.1)


def test_padding_is_not_fitted(problem):
    block, _, calls = problem
    target = calls[0].target.clone()
    target[:, 3:] = 1e6
    padded = Call(calls[0].args, calls[0].kwargs, target, lambda t: t[:, :3].reshape(-1, 16))
    away, size = padded.errors(block, {})
    whole = block(*padded.args, **padded.kwargs)[0]
    torch.testing.assert_close(away, (whole - target)[:, :3].square().sum())
    torch.testing.assert_close(size, target[:, :3].square().sum())


def test_a_finished_model_is_closer_to_the_dense_one():
    dense = tiny_models.make("llama")
    batches = tiny_models.batches("llama")
    plain, finished = copy.deepcopy(dense), copy.deepcopy(dense)
    sk.prune(plain, sk.SparseGPT(block_size=16), 0.6, batches)
    report = sk.prune(finished, sk.SparseGPT(block_size=16), 0.6, batches, finish=Finish(epochs=20))
    assert any(block.kept for block in report.blocks)
    assert "blocks finished" in str(report)
    # the last block aims at what the dense model puts out there
    last = report.blocks[-1]
    assert last.after < last.before
    for name, layer in hf.layers(plain):
        assert int((hf.weight(layer) == 0).sum()) == int((hf.weight(dict(hf.layers(finished))[name]) == 0).sum())


@pytest.mark.parametrize("name", tiny_models.MODELS | tiny_models.MULTIMODAL)
def test_blocks_of_every_architecture_can_be_finished(name):
    model = tiny_models.make(name)
    report = sk.prune(model, sk.Wanda(), 0.5, tiny_models.batches(name), finish=Finish(epochs=1))
    finished = {block.name for block in report.blocks}
    unfinished = {name for name, reason in report.skipped if reason.startswith("not finished")}
    assert finished | unfinished == {name for name, _ in hf.blocks(model)} - {
        block for block, _ in hf.blocks(model) if not any(row.name.startswith(f"{block}.") for row in report.layers)
    }
    for row in report.layers:
        weight = hf.weight(dict(hf.layers(model))[row.name])
        assert float((weight == 0).float().mean()) == pytest.approx(row.sparsity)
    assert all(p.grad is None for p in model.parameters())


def test_one_batch_is_refused_before_anything_changes():
    model = tiny_models.make("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="finishing a block needs two calibration batches at least"):
        sk.prune(model, sk.Wanda(), 0.5, tiny_models.batches("llama")[:1], finish=Finish())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_on_a_grid_are_not_finished():
    model = tiny_models.make("llama")
    with pytest.raises(ValueError, match="finish would move weights off the 4-bit grid"):
        sk.prune(model, sk.SparseGPT(bits=4), 0.5, tiny_models.batches("llama"), finish=Finish())


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"learning_rate": 0.0}], ids=str)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must"):
        Finish(**settings)
