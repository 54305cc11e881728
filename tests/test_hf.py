"""Where a model's blocks and layers are."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from sparsekern import hf
from tests import tiny_models


@pytest.fixture
def model():
    return tiny_models.make("llama")


@pytest.mark.parametrize(
    ("name", "blocks", "layers_a_block"),
    [
        ("llama", ["model.layers.0", "model.layers.1", "model.layers.2"], 7),
        ("gpt2", ["transformer.h.0", "transformer.h.1", "transformer.h.2"], 4),
        ("mixtral", ["model.layers.0", "model.layers.1", "model.layers.2"], 4 + 2 * 4),
        ("t5", ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"], None),
    ],
)
def test_blocks_and_their_layers_are_found_by_structure(name, blocks, layers_a_block):
    model = tiny_models.make(name)
    assert [block for block, _ in hf.blocks(model)] == blocks
    for block in blocks:
        inside = [layer for layer, _ in hf.layers(model) if layer.startswith(f"{block}.")]
        assert layers_a_block is None or len(inside) == layers_a_block
    assert all(any(layer.startswith(f"{block}.") for block in blocks) for layer, _ in hf.layers(model))


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_every_matrix_is_either_a_layer_or_skipped_with_a_reason(name):
    model = tiny_models.make(name)
    layers, skipped = [layer for layer, _ in hf.layers(model)], dict(hf.skipped(model))
    assert not set(layers) & set(skipped)
    assert len(set(layers)) == len(layers)
    for parameter_name, parameter in model.named_parameters():
        matrix = parameter_name.removesuffix(".weight")
        experts = [f"{matrix}.{index}" for index in range(len(parameter))] if parameter.dim() == 3 else [matrix]
        assert parameter.dim() < 2 or set(experts) <= set(layers) or skipped[matrix], parameter_name


@pytest.mark.parametrize(
    ("name", "matrix", "reason"),
    [
        ("llama", "lm_head", "output embeddings"),
        ("llama", "model.embed_tokens", "embedding"),
        ("whisper", "proj_out", "output embeddings"),
        ("whisper", "model.encoder.conv1", "Conv1d, not a linear layer"),
        ("bert", "cls.predictions.transform.dense", "outside the blocks"),
        ("vit", "classifier", "outside the blocks"),
        ("opt", "model.decoder.project_in", "outside the blocks"),
        ("mixtral", "model.layers.1.mlp.gate", "router of experts"),
        ("qwen3_moe", "model.layers.0.mlp.gate", "router of experts"),
        ("deepseek_v3", "model.layers.2.mlp.gate", "router of experts"),
        ("gpt_oss", "model.layers.0.mlp.router", "router of experts"),
        ("llama4", "model.layers.0.feed_forward.router", "router of experts"),
        ("jetmoe", "model.layers.0.mlp.router.layer", "router of experts"),
        ("gemma3n", "model.layers.0.altup.modality_router", "router of experts"),
        ("gemma3n", "model.altup_projections.0", "outside the blocks"),
    ],
)
def test_a_skipped_matrix_has_its_reason(name, matrix, reason):
    assert dict(hf.skipped(tiny_models.make(name)))[matrix] == reason


class Block(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def of(**modules):
    """A model of one block that holds these and one layer that can be pruned."""
    model = Block(blocks=nn.ModuleList([Block(good=nn.Linear(4, 4), **modules)]))
    assert "blocks.0.good" in dict(hf.layers(model))
    return model


class Int8Linear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.1


def integers():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def patched():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


def lora():
    return Block(base_layer=nn.Linear(4, 4), lora_A=nn.ModuleDict({"default": nn.Linear(4, 2)}))


@pytest.mark.parametrize(
    ("modules", "matrix", "reason"),
    [
        ({"x": Int8Linear(4, 4)}, "x", "Int8Linear does not compute what Linear does"),
        ({"x": integers()}, "x", "its weight is torch.int8"),
        ({"x": patched()}, "x", "its forward was replaced"),
        ({"x": parametrizations.weight_norm(nn.Linear(4, 4))}, "x", "parametrised: its weight is computed from others"),
        ({"x": lora()}, "x.base_layer", "wrapped by Block: merge the adapter first"),
        ({"x": lora()}, "x.lora_A.default", "wrapped by Block: merge the adapter first"),
        ({"gate": nn.Linear(4, 2), "experts": nn.ModuleList([nn.Linear(4, 4)])}, "gate", "router of experts"),
        ({"router": Block(layer=nn.Linear(4, 2))}, "router.layer", "router of experts"),
    ],
)
def test_a_layer_whose_output_is_not_its_own_weights_is_skipped(modules, matrix, reason):
    assert dict(hf.skipped(of(**modules)))[f"blocks.0.{matrix}"] == reason


def test_a_gate_without_experts_is_a_layer():
    assert "blocks.0.gate" in dict(hf.layers(of(gate=nn.Linear(4, 4))))


def test_tied_weights_are_skipped_wherever_they_are():
    tied = nn.Linear(4, 4)
    model = of(tied=tied)
    model.head = nn.Linear(4, 4)
    model.head.weight = tied.weight
    skipped = dict(hf.skipped(model))
    assert skipped["blocks.0.tied"] == skipped["head"] == "tied: its weight belongs to another module as well"
    llama = tiny_models.llama(tie_word_embeddings=True)
    assert dict(hf.skipped(llama))["lm_head"] == "output embeddings"


def test_a_module_that_two_blocks_share_is_one_layer_of_the_first():
    shared = nn.Linear(4, 4)
    model = Block(blocks=nn.ModuleList([Block(a=shared), Block(a=shared, b=nn.Linear(4, 4))]))
    assert [name for name, _ in hf.layers(model)] == ["blocks.0.a", "blocks.1.b"]


def test_lists_of_lists_and_bare_layers_are_not_blocks():
    stages = nn.ModuleList([nn.ModuleList([Block(a=nn.Linear(4, 4))]), nn.ModuleList([Block(a=nn.Linear(4, 4))])])
    model = Block(stages=stages, heads=nn.ModuleList([nn.Linear(4, 4)]))
    assert [name for name, _ in hf.blocks(model)] == ["stages.0.0", "stages.1.0"]
    assert dict(hf.skipped(model)) == {"heads.0": "outside the blocks"}


def test_a_model_without_blocks_is_a_type_error_with_its_class():
    with pytest.raises(TypeError, match="^Sequential has no blocks"):
        hf.blocks(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("layer", [nn.Linear(3, 5), Conv1D(5, 3)], ids=["Linear", "Conv1D"])
def test_weight_is_a_view_that_takes_out_features_to_in_features(layer):
    w = hf.weight(layer)
    assert w.shape == (5, 3)
    new, x = torch.randn(5, 3), torch.randn(2, 3)
    w.copy_(new)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, new, layer.bias))


def test_facts_count_tied_parameters_once(model):
    tied = tiny_models.llama(tie_word_embeddings=True)
    assert hf.facts(model)["parameters"] - hf.facts(tied)["parameters"] == tied.lm_head.weight.numel()
    assert hf.facts(model)["architecture"] == "LlamaForCausalLM"
    assert hf.facts(model)["dtype"] == "float32"


def test_positions_are_what_the_config_says_and_none_where_it_says_nothing(model):
    assert hf.positions(model) == model.config.max_position_embeddings
    assert hf.positions(tiny_models.make("mamba2")) is None
