"""The walk over every architecture of tiny_models against plain forward hooks over ordinary forwards."""

import copy
from collections import defaultdict
from itertools import groupby

import pytest
import torch

from sparsekern import experts, hf
from sparsekern.calibrate import Walk
from sparsekern.stats import Gram, InputNorm
from tests import tiny_models
from tests.plain_statistics import EveryToken, assert_same_gram, halve, plain_statistics

# what replay cannot do, and how the walk puts it
PREFIX = {"gemma3n": "does not get its inputs when replayed", "albert": "runs 3 times in one forward"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def nobody_borrows(monkeypatch):
    """Experts keep to their own tokens, few as these are."""
    monkeypatch.setattr(experts, "ENOUGH", 0)


@pytest.mark.usefixtures("nobody_borrows")
@pytest.mark.parametrize("name", tiny_models.MODELS | tiny_models.MULTIMODAL)
def test_the_statistics_are_those_of_an_ordinary_forward(name):
    model, batches = tiny_models.make(name), tiny_models.batches(name)
    before = copy.deepcopy(model.state_dict())
    want = plain_statistics(model, batches, hf.layers(model))
    walk = Walk(model, batches, Gram)
    got = {layer_name: stats for layer_name, _, stats in walk}
    # in the order the blocks run, which is not everywhere the one they stand in
    assert set(got) == set(walk.layers) == set(want)
    assert walk.never_called == []
    for layer_name, stats in got.items():
        assert_same_gram(stats, want[layer_name])
    # transformers before 5.17 forgets gemma3n's shared keys and values without a cache, and then replay is right
    if name in PREFIX and (name, walk.how) != ("gemma3n", "replay"):
        assert walk.how == "prefix"
        assert PREFIX[name] in walk.why
    else:
        assert (walk.how, walk.why) == ("replay", None)
    assert all(torch.equal(now, before[key]) for key, now in model.state_dict().items())


@pytest.mark.usefixtures("nobody_borrows")
@pytest.mark.parametrize("name", tiny_models.MODELS | tiny_models.MULTIMODAL)
def test_a_block_sees_what_the_changed_blocks_before_it_put_out(name):
    model, batches = tiny_models.make(name), tiny_models.batches(name)
    changed = copy.deepcopy(model)
    layers = dict(hf.layers(changed))
    for block, visited in groupby(Walk(model, batches, Gram), key=lambda visit: block_of(model, visit[0])):
        inside = [(layer_name, layer) for layer_name, layer in layers.items() if layer_name.startswith(f"{block}.")]
        want = plain_statistics(changed, batches, inside)
        for layer_name, layer, stats in visited:
            assert_same_gram(stats, want.pop(layer_name))
            halve(layer)
            halve(layers.pop(layer_name))
        assert not want
    assert not layers


def block_of(model, layer_name):
    return next(block for block, _ in hf.blocks(model) if layer_name.startswith(f"{block}."))


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("llama", {"self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"}),
        ("phi", {"self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1"}),
        ("gpt2", set()),
        ("opt", {"self_attn.k_proj self_attn.v_proj self_attn.q_proj"}),
        (
            "whisper",
            {
                "self_attn.k_proj self_attn.v_proj self_attn.q_proj",
                "encoder_attn.k_proj encoder_attn.v_proj",
            },
        ),
    ],
)
def test_layers_that_read_the_same_tensor_share_one_statistic(name, shared):
    model = tiny_models.make(name)
    last, _ = hf.blocks(model)[-1]
    groups = defaultdict(list)
    for layer_name, _, stats in list(Walk(model, tiny_models.batches(name), InputNorm)):
        if layer_name.startswith(f"{last}."):
            groups[id(stats)].append(layer_name.removeprefix(f"{last}."))
    assert {" ".join(group) for group in groups.values() if len(group) > 1} == shared


def test_a_decoder_counts_its_own_tokens_and_its_cross_attention_the_encoders():
    model = tiny_models.make("t5")
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 10))
    # of one shape, so that the shape cannot tell them apart
    encoder, decoder = torch.ones(2, 10, dtype=torch.long), torch.ones(2, 10, dtype=torch.long)
    encoder[0, 7:], decoder[1, 4:] = 0, 0
    batch = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": encoder, "decoder_attention_mask": decoder}
    for name, _, stats in Walk(model, [batch], EveryToken):
        reads_encoder = name.startswith("encoder") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert stats.tokens == (17 if reads_encoder else 14), name
