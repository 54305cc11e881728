"""Where a model's blocks and layers are, and checkpoints written and read back."""

import json
from contextlib import contextmanager

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from sparsekern import hf, text
from tests import tiny_models


@pytest.fixture
def model():
    return tiny_models.make("llama")


@pytest.fixture
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(["<unk>", "the", "cat", "sat"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


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


def test_a_saved_model_loads_with_the_same_bits_and_its_zeros(model, tokenizer, tmp_path):
    for _, layer in hf.layers(model):
        hf.weight(layer)[:, ::2] = 0
    target = tmp_path / "new" / "out"
    hf.save(model, tokenizer, target, {"README.md": "# A card\n", "report.json": "{}"})
    assert (target / "README.md").read_text() == "# A card\n"
    assert (target / "report.json").read_text() == "{}"
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(target)
    loaded = hf.load(target)
    assert type(loaded) is type(model)
    assert not loaded.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
        assert torch.equal(weight, plain.state_dict()[name]), name
    assert text.tokenize(hf.tokenizer(target), "the cat sat").tolist() == [1, 2, 3]
    assert (target / "generation_config.json").is_file()


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "t5", "whisper", "mixtral"])
def test_a_model_of_another_kind_loads_as_the_class_that_was_saved(name, tmp_path):
    model = tiny_models.make(name)
    hf.save(model, None, tmp_path / "out", {})
    loaded = hf.load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert all(torch.equal(weight, loaded.state_dict()[key]) for key, weight in model.state_dict().items())


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model = tiny_models.llama(tie_word_embeddings=True)
    hf.save(model, None, tmp_path / "out", {})
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    loaded = hf.load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_checkpoints_dtype_is_kept_unless_another_is_asked_for(model, tmp_path):
    hf.save(model.bfloat16(), None, tmp_path / "out", {})
    assert hf.load(tmp_path / "out").dtype == torch.bfloat16
    assert hf.load(tmp_path / "out", dtype=torch.float32).dtype == torch.float32


def test_save_overwrites_nothing(model, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match=r"out' exists already; remove it or choose another directory"):
        hf.save(model, None, tmp_path / "out", {})
    assert list((tmp_path / "out").iterdir()) == []


def test_a_save_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    def full(directory):
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        hf.save(model, None, tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


@contextmanager
def refused(pattern):
    """A ValueError of one line that matches."""
    with pytest.raises(ValueError, match=pattern) as error:
        yield
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [hf.load, hf.tokenizer])
def test_what_is_no_checkpoint_is_refused_in_one_line(load, tmp_path):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, pattern in (
        (tmp_path / "missing", "no such directory: '/"),
        (str(tmp_path / "missing"), "no such directory: '/"),
        ("./missing", r"no such directory: '\./missing'"),
        (tmp_path / "file.txt", "is a file; give the checkpoint's directory"),
        (tmp_path / "empty", r"is not a checkpoint: it holds no config\.json"),
    ):
        with refused(pattern):
            load(path)


def test_no_network_is_said_in_one_line_with_the_remedy(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with refused("cannot load model 'somebody/some-model': We couldn't connect .*; give a local directory, or"):
        hf.load("somebody/some-model")


def test_a_checkpoint_that_lacks_weights_is_refused(model, tmp_path):
    """transformers would only warn, and go on with random numbers."""
    hf.save(model, None, tmp_path / "out", {})
    weights = load_file(tmp_path / "out" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no fitting weights for model\.layers\.1\.mlp\.up_proj\.weight, which Llama"):
        hf.load(tmp_path / "out")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing", "unknown type", "no json", "wrong shape"])
def test_a_damaged_checkpoint_is_refused_in_one_line(model, tmp_path, damage):
    hf.save(model, None, tmp_path / "out", {})
    weights, config = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbage":
        weights.write_bytes(b"\xff" * 200)
    elif damage == "missing":
        weights.unlink()
    elif damage == "unknown type":
        config.write_text('{"model_type": "no-such-model"}')
    elif damage == "no json":
        config.write_text("{")
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 40}))
    with refused("^cannot load model '/"):
        hf.load(tmp_path / "out")


def test_a_missing_tokenizer_is_refused_in_one_line(model, tmp_path):
    hf.save(model, None, tmp_path / "out", {})
    with refused("^cannot load tokenizer '/"):
        hf.tokenizer(tmp_path / "out")


def test_a_fingerprint_changes_with_any_bit_that_counts(model, tokenizer, tmp_path):
    hf.save(model, tokenizer, tmp_path / "out", {})
    first = hf.fingerprint(tmp_path / "out")
    assert list(first) == ["model.safetensors", "config.json", "tokenizer.json"]
    (tmp_path / "out" / "README.md").write_text("another card")
    assert hf.fingerprint(tmp_path / "out") == first
    weights = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(weights)
    assert hf.fingerprint(tmp_path / "out") != first
    with pytest.raises(ValueError, match="holds no safetensors"):
        hf.fingerprint(tmp_path)


def test_facts_count_tied_parameters_once(model):
    tied = tiny_models.llama(tie_word_embeddings=True)
    assert hf.facts(model)["parameters"] - hf.facts(tied)["parameters"] == tied.lm_head.weight.numel()
    assert hf.facts(model)["architecture"] == "LlamaForCausalLM"
    assert hf.facts(model)["dtype"] == "float32"


def test_positions_are_what_the_config_says_and_none_where_it_says_nothing(model):
    assert hf.positions(model) == model.config.max_position_embeddings
    assert hf.positions(tiny_models.make("mamba2")) is None
