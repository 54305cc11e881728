"""The walk keeps its promises, on a small Llama and on models made to break it."""

import copy
import functools
import weakref

import pytest
import torch
from torch import nn

from sparsekern import experts, hf
from sparsekern.calibrate import Walk
from sparsekern.stats import Gram, InputNorm
from tests import tiny_models
from tests.plain_statistics import EveryToken, assert_same_gram, halve, plain_statistics

pytestmark = pytest.mark.usefixtures("one_thread")


def halve_all(walk):
    for _, layer, _ in walk:
        halve(layer)


def test_a_generator_is_enough():
    model, batches = tiny_models.make("llama"), tiny_models.batches("llama")
    for _, _, stats in Walk(model, (batch for batch in batches), EveryToken):
        assert stats.tokens == sum(batch.numel() for batch in batches)


def test_dropout_is_off_and_every_training_mode_is_as_before():
    model, batches = tiny_models.make("bert"), tiny_models.batches("bert")
    want = plain_statistics(model, batches, hf.layers(model))
    model.train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    for layer_name, _, stats in Walk(model, batches, Gram):
        assert_same_gram(stats, want[layer_name])
        assert [module.training for module in model.modules()] == modes


def test_the_consumer_may_use_the_model_between_two_layers():
    """No hook, no replaced forward, no disabled gradient is left while the consumer has control."""
    model, batches = tiny_models.make("llama"), tiny_models.batches("llama")
    hooks = count_hooks(model)
    want = model(batches[0]).logits
    for _ in Walk(model, batches, InputNorm):
        assert count_hooks(model) == hooks
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert model.config.use_cache
        logits = model(batches[0]).logits
        assert torch.equal(logits, want)
        assert logits.requires_grad


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def fail_at(visits, walk):
    for visit, _ in enumerate(walk, start=1):
        if visit == visits:
            raise ZeroDivisionError


@pytest.mark.parametrize("visits", [1, 9])
def test_nothing_is_left_behind_when_the_consumer_fails(visits):
    model = tiny_models.make("llama").train()
    hooks = count_hooks(model)
    walk = Walk(model, tiny_models.batches("llama"), InputNorm)
    with pytest.raises(ZeroDivisionError):
        fail_at(visits, walk)
    assert count_hooks(model) == hooks
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("bad", [0, 2])
def test_nan_names_the_layer_and_the_batch_and_nothing_has_changed(bad):
    model, batches = tiny_models.make("llama"), tiny_models.batches("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = torch.nan
    batches = [batch.where(batch != 50, 51) for batch in batches]
    batches[bad][1, 3] = 50
    before, hooks = copy.deepcopy(model.state_dict()), count_hooks(model)
    with pytest.raises(ValueError, match=rf"^model\.layers\.0\.self_attn\.q_proj: calibration batch {bad}: .* NaN"):
        halve_all(Walk(model, batches, Gram))
    assert count_hooks(model) == hooks
    assert all(torch.equal(now.nan_to_num(), before[key].nan_to_num()) for key, now in model.state_dict().items())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch, got none"),
        ([torch.zeros(1, 0, dtype=torch.long)], "calibration batch 0 holds no tokens"),
        ([torch.ones(1, 3, dtype=torch.long), {}], "calibration batch 1 holds no tokens"),
        ([torch.ones(3, dtype=torch.long)], r"token ids \[batch, tokens\] or a dict .*, got torch.int64 \[3\]"),
        ([torch.ones(1, 3)], "got torch.float32"),
        (["some text"], "calibration batch 0 must be token ids .*, got str"),
        (
            [{"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.zeros(1, 3, dtype=torch.long)}],
            "nothing but padding",
        ),
    ],
)
def test_batches_that_say_nothing_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        Walk(tiny_models.make("llama"), batches, InputNorm)


def test_a_loader_that_fails_midway_does_so_before_the_walk():
    def loader():
        yield tiny_models.batches("llama")[0]
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        Walk(tiny_models.make("llama"), loader(), InputNorm)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_padding_does_not_count(name, monkeypatch):
    """Padded rows in one batch give the statistics of the same rows without padding, one by one.

    DeepSeek reads some of them as [batch, 1, tokens, in_features].
    """
    monkeypatch.setattr(experts, "ENOUGH", 0)
    model = tiny_models.make(name)
    rows = [batch[:1] for batch in tiny_models.batches(name)]
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows])
    padded = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    want = plain_statistics(model, rows, hf.layers(model), EveryToken)
    for name, _, stats in Walk(model, [padded], EveryToken):
        assert stats.tokens == want[name].tokens
        assert "experts." in name or stats.tokens == 11 + 12 + 13
        torch.testing.assert_close(stats.norm, want[name].norm, rtol=1e-4, atol=1e-5)


def test_no_more_than_one_blocks_statistics_are_alive():
    model, alive, most = tiny_models.make("llama"), weakref.WeakSet(), 0

    class Counted(InputNorm):
        def __init__(self, *args):
            nonlocal most
            super().__init__(*args)
            alive.add(self)
            most = max(most, len(alive))

    for _, layer, stats in Walk(model, tiny_models.batches("llama"), Counted):
        halve(layer)
        del stats
    # q k v, o, gate up, down
    assert most == 4
    assert len(alive) == 0


class Blocks(nn.Module):
    """A chain of blocks of width 8, with what its subclasses do between them."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.embed = nn.Embedding(50, 8)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def ids(*lengths):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 50, (2, n), generator=generator) for n in lengths]


class ReadsTheFirst(Blocks):
    """The last block reads what the first one put out."""

    def forward(self, ids):
        first = x = self.blocks[0](self.embed(ids))
        for block in self.blocks[1:-1]:
            x = block(x)
        return self.blocks[-1](x + first)


class WritesInPlace(Blocks):
    """Somebody writes to what a block has put out."""

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
            x += 1
        return x


class AddsOutside(Blocks):
    """The residual stream is the model's, not the block's."""

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(
    ("kind", "how"), [(Blocks, "replay"), (WritesInPlace, "replay"), (ReadsTheFirst, "prefix"), (AddsOutside, "prefix")]
)
def test_a_plain_module_is_walked_right_whatever_it_does_between_its_blocks(kind, how):
    torch.manual_seed(0)
    model = kind(*(Residual() for _ in range(4)))
    changed, batches = copy.deepcopy(model), ids(5, 7)
    walk = Walk(model, batches, Gram)
    for name, layer, stats in walk:
        twin = changed.get_submodule(name)
        if name.endswith("up"):
            want = plain_statistics(changed, batches, [(name, twin)])
            assert_same_gram(stats, want[name])
        halve(layer)
        halve(twin)
    assert walk.how == how
    assert how == "replay" or "does not get its inputs" in walk.why


def test_layers_that_share_an_input_only_at_first_do_not_share_statistics():
    class Parting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) + self.b(x if x.shape[1] == 5 else x * 2)

    torch.manual_seed(0)
    model, batches = Blocks(Parting(), Parting()), ids(5, 6)
    want = plain_statistics(model, batches, hf.layers(model))
    for name, _, stats in Walk(model, batches, Gram):
        assert_same_gram(stats, want[name])


def test_a_tensor_written_to_between_two_layers_is_not_the_same_input():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.mul_(3))

    torch.manual_seed(0)
    model, batches = Blocks(Writing()), ids(5, 6)
    want = plain_statistics(model, batches, hf.layers(model))
    for name, _, stats in Walk(model, batches, Gram):
        assert_same_gram(stats, want[name])


def test_a_layer_used_twice_counts_both_and_one_never_called_is_listed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(self.used(x))

    class LeavesOneOut(Blocks):
        def forward(self, ids):
            return self.blocks[0](self.embed(ids))

    torch.manual_seed(0)
    model, batches = LeavesOneOut(Twice(), Residual()), ids(5, 6)
    walk = Walk(model, batches, EveryToken)
    want = plain_statistics(model, batches, hf.layers(model), EveryToken)
    got = {name: stats for name, _, stats in walk}
    assert list(got) == ["blocks.0.used"]
    torch.testing.assert_close(got["blocks.0.used"].norm, want["blocks.0.used"].norm)
    assert got["blocks.0.used"].tokens == 2 * (2 * 5 + 2 * 6)
    assert sorted(walk.never_called) == ["blocks.0.unused", "blocks.1.down", "blocks.1.up"]


def test_a_layer_that_two_blocks_share_counts_what_it_reads_in_the_first():
    class Both(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared, self.own = shared, nn.Linear(8, 8)

        def forward(self, x):
            return self.shared(x) + self.own(x)

    shared = nn.Linear(8, 8)
    got = {name: stats for name, _, stats in Walk(Blocks(Both(shared), Both(shared)), ids(5), EveryToken)}
    assert list(got) == ["blocks.0.shared", "blocks.0.own", "blocks.1.own"]
    assert got["blocks.0.shared"] is got["blocks.0.own"]
    assert got["blocks.0.shared"].tokens == 2 * 5


def test_a_forward_that_others_put_into_a_block_stays():
    """accelerate does so to move a block's inputs to its device."""
    model = Blocks(Residual(), Residual())
    theirs = functools.partial(Residual.forward, model.blocks[0])
    model.blocks[0].forward = theirs
    walk = Walk(model, ids(5), InputNorm)
    assert len(list(walk)) == 4
    assert walk.how == "replay"
    assert model.blocks[0].forward is theirs


def test_blocks_are_walked_in_the_order_they_run():
    class Backwards(Blocks):
        def forward(self, ids):
            x = self.embed(ids)
            for block in reversed(self.blocks):
                x = block(x)
            return x

    walk = Walk(Backwards(Residual(), Residual()), ids(5), InputNorm)
    assert [name for name, _, _ in walk] == ["blocks.1.up", "blocks.1.down", "blocks.0.up", "blocks.0.down"]
    assert walk.how == "replay"


def test_it_works_in_inference_mode():
    model, batches = tiny_models.make("llama"), tiny_models.batches("llama")
    want = plain_statistics(model, batches, hf.layers(model))
    with torch.inference_mode():
        walk = Walk(model, batches, Gram)
        for name, _, stats in walk:
            assert_same_gram(stats, want[name])
    assert walk.how == "replay"


def test_weights_on_the_meta_device_are_refused():
    model = tiny_models.make("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .* meta device; load .* without device_map"):
        Walk(model, tiny_models.batches("llama"), InputNorm)


def test_a_model_with_nothing_to_prune_is_refused_with_the_reasons():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(ValueError, match=r"Blocks has no layer to prune \(blocks\.0\.0: Odd does not compute"):
        Walk(Blocks(nn.Sequential(Odd(8, 8))), ids(5), InputNorm)
    with pytest.raises(TypeError, match="Linear has no blocks"):
        Walk(nn.Linear(8, 8), ids(5), InputNorm)
