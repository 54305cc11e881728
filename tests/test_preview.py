"""preview(): what it announces is what prune() then does."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekern as sk
from sparsekern.preview import preview
from tests import tiny_models


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def test_it_announces_what_prune_does_and_changes_nothing(model):
    before = copy.deepcopy(model)
    planned = preview(model, sk.as_pattern("2:4"), ["*.down_proj"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    report = sk.prune(model, sk.Magnitude(), "2:4", skip=["*.down_proj"])
    assert [name for name, *_ in planned.layers] == [layer.name for layer in report.layers]
    for name, shape, zeros in planned.layers:
        assert model.get_submodule(name).weight.shape == shape
        assert (model.get_submodule(name).weight == 0).sum() == zeros
    assert planned.skipped == report.skipped


def test_the_ceiling_is_the_ratio_of_the_bytes(model):
    # float32: 32 bits dense, half of them and one bit for the bitmap
    assert preview(model, sk.as_pattern(0.5)).decode_ceiling == pytest.approx(32 / 17)
    assert preview(model.bfloat16(), sk.as_pattern(0.5)).decode_ceiling == pytest.approx(16 / 9)


def test_what_cannot_be_packed_promises_nothing():
    planned = preview(tiny_models.make("gpt2"), sk.as_pattern(0.5))
    assert (planned.decode_ceiling, planned.packed_bytes) == (1.0, planned.output_bytes)


def test_statistics_are_those_of_one_block(model):
    # six inputs of 32 and one of 64, two float32 matrices each
    assert preview(model, sk.as_pattern(0.5)).statistics_bytes == 2 * 4 * (6 * 32**2 + 64**2)


def test_gradients_take_one_number_a_weight(model):
    planned = preview(model, sk.as_pattern(0.5), ["*.down_proj"], sk.OBD())
    assert planned.statistics_bytes == 4 * 2 * (4 * 32 * 32 + 2 * 32 * 64)


def test_a_layer_too_wide_for_the_method_is_named(model):
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(1025, 32)
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj: OBS .* got 1025; SparseGPT\(\) approximates it"):
        preview(model, sk.as_pattern(0.5), method=sk.OBS())
    assert len(preview(model, sk.as_pattern(0.5), ["*.1.mlp.down_proj"], sk.OBS()).layers) == 13


def test_it_refuses_what_prune_refuses(model):
    with pytest.raises(ValueError, match=r"q_proj: pattern 5:7 needs in_features to be a multiple of 7"):
        preview(model, sk.as_pattern("5:7"))
