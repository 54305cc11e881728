"""convert: every way between dense, 2:4 and bitmap and back, the same bits, and what is refused."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekern as sk
from sparsekern import checkpoint, hf
from sparsekern.checkpoint import convert
from tests import tiny_models


def pruned(pattern, **changed):
    """A model of which every layer but the first is pruned."""
    torch.manual_seed(0)
    model = tiny_models.llama(**changed).bfloat16()
    for _, layer in hf.layers(model)[1:]:
        weight = hf.weight(layer)
        if pattern == "2:4":
            weight.view(-1, 4)[:, [0, 3]] = 0
        else:
            weight.masked_fill_(torch.rand(weight.shape) < 0.7, 0)
    return model


def tensors_of(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_files(first, second):
    assert sorted(os.listdir(first)) == sorted(os.listdir(second))
    for name in os.listdir(first):
        if name.endswith(".safetensors"):
            assert_same_tensors(load_file(first / name), load_file(second / name))
        elif (first / name).is_file():
            assert (first / name).read_text() == (second / name).read_text(), name


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), second[name].view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_bytes", [10_000, 4_000_000_000])
def test_from_dense_to_bitmap_to_24_to_bitmap_to_dense_is_the_same_bits(tie, shard_bytes, tmp_path):
    model = pruned("2:4", tie_word_embeddings=tie)
    hf.save(model, None, tmp_path / "0", {"README.md": "# A card\n"})
    (tmp_path / "0" / "inner").mkdir()
    (tmp_path / "0" / "inner" / "template.jinja").write_text("{{ a }}")
    (tmp_path / "0" / "pytorch_model.bin").write_text("a pickle")
    report = convert(tmp_path / "0", tmp_path / "1", "bitmap", shard_bytes=shard_bytes)
    assert len(report.packed) == 3 * 7 - 1
    why = dict(report.left)
    assert why["model.layers.0.self_attn.q_proj"].startswith("as bitmap it would take")
    convert(tmp_path / "1", tmp_path / "2", "2:4")
    convert(tmp_path / "2", tmp_path / "3", "bitmap", shard_bytes=shard_bytes)
    assert_same_files(tmp_path / "1", tmp_path / "3")
    for name in "12":
        checkpoint.verify(tmp_path / name)
        assert (tmp_path / name / "README.md").read_text() == "# A card\n"
        assert (tmp_path / name / "inner" / "template.jinja").read_text() == "{{ a }}"
        assert not (tmp_path / name / "pytorch_model.bin").exists()
    convert(tmp_path / "3", tmp_path / "4", "dense", shard_bytes=shard_bytes)
    assert_same_tensors(tensors_of(tmp_path / "0"), tensors_of(tmp_path / "4"))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in "04")
    assert before == after
    # one file is called as transformers calls it
    assert (tmp_path / "4" / "model.safetensors").exists() == (shard_bytes > 10_000)
    loaded = hf.load(tmp_path / "4")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_the_checkpoint_is_the_one_that_save_writes(tmp_path):
    model = pruned("2:4")
    hf.save(model, None, tmp_path / "dense", {})
    sk.save(model, tmp_path / "saved")
    convert(tmp_path / "dense", tmp_path / "converted", "2:4")
    assert_same_tensors(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "converted"))
    saved, converted = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("saved", "converted"))
    assert saved["quantization_config"] == converted["quantization_config"]


def test_layers_that_do_not_hold_the_format_stay_as_they_are_with_the_reason(tmp_path):
    model = pruned("50%")
    _, last = hf.layers(model)[-1]
    hf.weight(last).zero_()
    hf.weight(last)[:, 1::2] = 1
    sk.save(model, tmp_path / "1")
    report = convert(tmp_path / "1", tmp_path / "2", "2:4")
    formats = [layer["format"] for layer in report.packed.values()]
    assert (formats.count("2:4"), formats.count("bitmap")) == (1, 19)
    assert dict(report.left)["model.layers.1.mlp.up_proj"] == "it is not 2:4"
    loaded = sk.load(tmp_path / "2", into=hf.skeleton(tmp_path / "2"))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_a_layer_whose_bias_has_another_dtype_stays_dense_because_no_sparse_layer_takes_it(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    for layer in model.values():
        layer.weight.data = torch.eye(64, dtype=torch.bfloat16)
    model["b"].bias.data = model["b"].bias.data.bfloat16()
    saved = sk.save(model, tmp_path / "1")
    converted = convert(tmp_path / "1", tmp_path / "2", "bitmap", layers=["a", "b"])
    for report, name in ((saved, "1"), (converted, "2")):
        assert dict(report.left) == {"a": "its bias is torch.float32, its weight torch.bfloat16"}
        assert list(report.packed) == ["b"]
        loaded = sk.load(tmp_path / name, into=nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}))
        assert (loaded["a"].weight.dtype, loaded["a"].bias.dtype) == (torch.bfloat16, torch.float32)


def test_a_plain_module_goes_round_when_its_layers_are_named(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(16, 4), "b": nn.Embedding(4, 16)})
    model["a"].weight.data[:, ::2] = 0
    model["b"].weight.data.zero_()
    sk.save(model, tmp_path / "1")
    convert(tmp_path / "1", tmp_path / "2", "bitmap")
    convert(tmp_path / "2", tmp_path / "3", "dense")
    assert tensors_of(tmp_path / "3").keys() == {"a.weight", "a.bias", "b.weight"}
    with pytest.raises(ValueError, match="config.json names no model of transformers: say with layers= which layers"):
        convert(tmp_path / "3", tmp_path / "4", "2:4")
    convert(tmp_path / "3", tmp_path / "4", "2:4", layers=["a"])
    assert_same_tensors(tensors_of(tmp_path / "1"), tensors_of(tmp_path / "4"))


def test_minus_zero_becomes_zero_when_it_is_packed(tmp_path):
    model = pruned("2:4")
    weight = hf.weight(hf.layers(model)[1][1])
    weight[weight == 0] = -0.0
    hf.save(model, None, tmp_path / "1", {})
    convert(tmp_path / "1", tmp_path / "2", "bitmap")
    convert(tmp_path / "2", tmp_path / "3", "dense")
    weight.add_(0.0)
    assert_same_tensors(
        tensors_of(tmp_path / "3"), {k: v for k, v in model.state_dict().items() if k in tensors_of(tmp_path / "3")}
    )


def test_what_cannot_be_converted_is_refused_and_nothing_is_left(tmp_path):
    dense = tmp_path / "dense"
    hf.save(tiny_models.llama(), None, dense, {})
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_text("{}")
    (tmp_path / "pickle" / "pytorch_model.bin").write_text("")
    before = sorted(os.listdir(tmp_path))
    for source, to, message in (
        (dense, "csr", "to must be one of dense, bitmap, 2:4, bitmap_int8, got 'csr'"),
        (dense, "bitmap", "dense' has no linear layer to pack as bitmap, such as .* as bitmap it would take"),
        (dense, "2:4", "has no linear layer to pack as 2:4, such as .*: it is not 2:4"),
        (tmp_path / "nothing", "dense", "no such directory"),
        (tmp_path / "empty", "dense", "is not a checkpoint: it holds no config.json"),
        (tmp_path / "pickle", "dense", "holds neither model.safetensors nor model.safetensors.index.json"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "out", to)
        assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(FileExistsError, match="exists already"):
        convert(dense, dense, "dense")


def test_a_source_that_lies_is_refused(tmp_path):
    sk.save(pruned("2:4"), tmp_path / "ours")
    (tmp_path / "ours" / "README.md").write_text("more")
    with pytest.raises(ValueError, match="only the directory has 'README.md'"):
        convert(tmp_path / "ours", tmp_path / "out", "dense")
    convert(tmp_path / "ours", tmp_path / "out", "dense", hashes=False)
    hf.save(pruned("2:4"), None, tmp_path / "one", {})
    split = tmp_path / "split"
    shutil.copytree(tmp_path / "one", split)
    tensors = load_file(split / "model.safetensors")
    (split / "model.safetensors").unlink()
    save_file(tensors, split / "a.safetensors")
    whole = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    for weight_map, message in (
        ({**whole["weight_map"], "x": "a.safetensors"}, "names x, which a.safetensors does not hold"),
        (
            {**whole["weight_map"], "x": "../one/model.safetensors"},
            "names '../one/model.safetensors', which is no file",
        ),
        ({**whole["weight_map"], "x": "b.safetensors"}, "names 'b.safetensors', which is no file of"),
        ([], "weight_map must name a file for every tensor"),
    ):
        (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            convert(split, tmp_path / "out2", "dense")
    (split / "model.safetensors.index.json").write_text(json.dumps(whole))
    convert(split, tmp_path / "out2", "dense")
    assert_same_tensors(tensors_of(tmp_path / "out2"), tensors)
    first = min(tensors)
    save_file({"y": torch.zeros(1), first: tensors[first] + 1}, split / "b.safetensors")
    dump = json.dumps({"weight_map": {**whole["weight_map"], "y": "b.safetensors"}})
    (split / "model.safetensors.index.json").write_text(dump)
    with pytest.raises(ValueError, match=f"b.safetensors: holds {first}, which a.safetensors holds too"):
        convert(split, tmp_path / "out3", "dense")
    (split / "model.safetensors.index.json").write_text(json.dumps(whole))
    (split / "a.safetensors").unlink()
    (split / "a.safetensors").symlink_to(tmp_path / "one" / "model.safetensors")
    with pytest.raises(ValueError, match="'a.safetensors' must not leave the directory"):
        convert(split, tmp_path / "out3", "dense")
