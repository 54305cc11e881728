"""Checkpoints written and read back, and models without weights."""

import json
from contextlib import contextmanager

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from sparsekern import demo, hf, text
from tests import tiny_models


@pytest.fixture
def model():
    return tiny_models.make("llama")


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


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_a_skeleton_lacks_nothing_but_the_weights(name, tmp_path):
    tiny_models.make(name).save_pretrained(tmp_path)
    model, skeleton = hf.load(tmp_path), hf.skeleton(tmp_path)
    assert (type(skeleton), skeleton.training) == (type(model), False)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert [(n, p.shape, p.dtype) for n, p in skeleton.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in model.named_parameters()
    ]
    assert hf.blocks(skeleton)[0][0] == hf.blocks(model)[0][0]
    for key, tensor in model.state_dict().items():
        place, _, own = key.rpartition(".")
        module = skeleton.get_submodule(place)
        is_parameter = own in module._parameters
        setattr(module, own, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    batch = tiny_models.batches(name, 1)[0]
    inputs = batch if isinstance(batch, dict) else {"input_ids": batch}
    with torch.no_grad():
        assert torch.equal(skeleton(**inputs).logits, model(**inputs).logits)


def test_a_skeleton_needs_no_more_than_a_config(tmp_path):
    tiny_models.llama(tie_word_embeddings=True, dtype="bfloat16").config.save_pretrained(tmp_path)
    skeleton = hf.skeleton(tmp_path)
    assert (type(skeleton).__name__, skeleton.dtype) == ("LlamaForCausalLM", torch.bfloat16)
    assert hf.skeleton(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    for broken in ('{"model_type": "no-such-model"}', '{"model_type": "llama", "dtype": []}'):
        (tmp_path / "config.json").write_text(broken)
        with refused("^cannot load model '/"):
            hf.skeleton(tmp_path)


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_never_opened(tmp_path):
    tiny_models.llama().config.save_pretrained(tmp_path)
    torch.save({"model.embed_tokens.weight": Planted(tmp_path / "opened")}, tmp_path / "pytorch_model.bin")
    with refused("^cannot load model '/"):
        hf.load(tmp_path)
    assert not (tmp_path / "opened").exists()


def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(tmp_path):
    (tmp_path / "planted.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import LlamaConfig as Config\n"
    )
    auto = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model", "AutoTokenizer": "planted.Tokens"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model", "auto_map": auto}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["planted.Tokens", None]}})
    )
    for load in (hf.load, hf.skeleton, hf.tokenizer):
        with pytest.raises(ValueError, match="^cannot load (model|tokenizer) '/"):
            load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_untrained_model_has_the_architecture_of_a_checkpoint_other_sizes_and_the_seeds_weights():
    torch.manual_seed(0)
    first = hf.untrained(demo.MODEL, hidden_size=32, num_hidden_layers=1, intermediate_size=48)
    assert type(first) is type(hf.load(demo.MODEL))
    assert first.dtype == torch.float32
    assert first.model.layers[0].mlp.up_proj.weight.shape == (48, 32)
    torch.manual_seed(0)
    again = hf.untrained(demo.MODEL, hidden_size=32, num_hidden_layers=1, intermediate_size=48)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="LlamaConfig has no entry 'hiden_size'"):
        hf.untrained(demo.MODEL, hiden_size=32)
