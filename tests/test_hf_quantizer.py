"""transformers loads a compressed checkpoint by itself, and refuses one that is not what it says."""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sparsekern as sk
from sparsekern import hf
from sparsekern.formats import Bitmap
from sparsekern.ops import bitmap_rows, compiled
from tests import compressed, tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")

# one layer of each format
UP, GATE = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A sparse model and where it was saved."""
    model, directory = compressed.sparse("llama"), tmp_path_factory.mktemp("llama") / "out"
    sk.save(model, directory)
    return model, directory


@pytest.fixture
def directory(tmp_path):
    """A checkpoint of one's own, to damage."""
    sk.save(compressed.sparse("llama"), tmp_path / "out")
    return tmp_path / "out"


def logits(model, name="llama"):
    batch = tiny_models.batches(name, 1)[0]
    with torch.no_grad():
        return model(**(batch if isinstance(batch, dict) else {"input_ids": batch})).logits


def sparse_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, sk.SparseLinear)}


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_a_loaded_model_computes_what_the_saved_one_did(name, tmp_path):
    model = compressed.sparse(name)
    sk.save(model, tmp_path / "out")
    loaded, found = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()), found
    assert sparse_layers(loaded).keys() == sparse_layers(model).keys()
    assert torch.equal(logits(loaded, name), logits(model, name))
    if name not in ("bert", "albert", "vit"):
        batch = tiny_models.batches(name, 1)[0]
        inputs = batch if isinstance(batch, dict) else {"input_ids": batch}
        settings = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(loaded.generate(**inputs, **settings), model.generate(**inputs, **settings))


@pytest.mark.parametrize(
    ("auto", "part"),
    [
        (transformers.AutoModelForCausalLM, "LlamaForCausalLM"),
        (transformers.AutoModel, "LlamaModel"),
        (transformers.AutoModelForSequenceClassification, "LlamaForSequenceClassification"),
    ],
)
def test_every_auto_class_loads_the_layers_it_has(llama, auto, part):
    model, directory = llama
    loaded = auto.from_pretrained(directory)
    assert type(loaded).__name__ == part
    base = getattr(loaded, "model", loaded)
    assert len(sparse_layers(base)) == len(sparse_layers(model)) == 21
    batch = tiny_models.batches("llama", 1)[0]
    with torch.no_grad():
        assert torch.equal(base(batch).last_hidden_state, model.model(batch).last_hidden_state)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_a_device_map_places_packed_layers(llama, device_map):
    model, directory = llama
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, device_map=device_map)
    assert torch.equal(logits(loaded), logits(model))


def test_a_device_map_to_the_disk_is_refused(llama, tmp_path):
    for way in (
        {"device_map": {"model": "cpu", "lm_head": "disk"}},
        {"device_map": "auto", "max_memory": {"cpu": "30KB"}},
    ):
        with pytest.raises(ValueError, match="device_map must keep packed layers in memory, got a part on the disk"):
            transformers.AutoModelForCausalLM.from_pretrained(llama[1], offload_folder=tmp_path, **way)


@pytest.mark.parametrize("auto", [transformers.AutoModelForCausalLM, transformers.AutoModel])
def test_a_dtype_casts_the_values_and_nothing_else(llama, tmp_path, auto):
    dense = hf.load(llama[1])
    sk.densify(dense)
    half = auto.from_pretrained(llama[1], dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, module in sparse_layers(half).items():
        weight = dense.get_submodule(name if hasattr(half, "lm_head") else f"model.{name}").weight
        assert torch.equal(module.weight, weight.bfloat16())


def test_float32_of_a_bfloat16_checkpoint_holds_the_same_numbers(tmp_path):
    model = compressed.sparse("llama").to(torch.bfloat16)
    sk.save(model, tmp_path / "out")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, module in sparse_layers(model).items():
        assert torch.equal(loaded.get_submodule(name).weight, module.weight.float())


def test_a_layer_that_a_model_keeps_in_float32_stays_in_it(tmp_path):
    sk.save(compressed.sparse("t5"), tmp_path / "out")
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    kinds = {name.rpartition(".")[2]: module.packed.dtype for name, module in sparse_layers(loaded).items()}
    assert (kinds["wo"], kinds["wi"], kinds["q"]) == (torch.float32, torch.float16, torch.float16)


def test_tied_embeddings_stay_tied(tmp_path):
    model = compressed.halve(tiny_models.llama(tie_word_embeddings=True).eval())
    sk.sparsify(model, plan=sk.Unmeasured())
    sk.save(model, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / compressed.SHARD)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


def test_what_was_loaded_compiles_as_one_graph(llama):
    mlp = hf.load(llama[1]).model.layers[1].mlp
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))


def test_no_dense_weight_is_ever_made_of_a_bitmap(tmp_path, monkeypatch):
    """Loading takes the memory of the packed model; of a 2:4 layer a dense weight is made, one at a time."""
    model = tiny_models.make("llama")
    for _, layer in hf.layers(model):
        hf.weight(layer)[:, : layer.in_features // 2] = 0
    sk.save(model, tmp_path / "out")

    def refuse(*_):
        raise AssertionError("a dense weight was made")

    monkeypatch.setattr(Bitmap, "to_dense", refuse)
    monkeypatch.setattr(bitmap_rows, "to_dense", refuse)
    monkeypatch.setattr(sk.SparseLinear, "_dense", refuse)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if any(layer.kernel.name == "reference" for layer in sparse_layers(loaded).values()):
        pytest.skip(f"no compiled kernel: {compiled.why_not('cpu')}")
    assert {layer.format for layer in sparse_layers(loaded).values()} == {Bitmap}
    torch.testing.assert_close(logits(loaded), logits(model))


def test_the_config_says_nothing_of_where_the_weights_were(llama):
    assert not hasattr(hf.load(llama[1]).config, "transformers_weights")


def change(directory, what):
    """Damage the checkpoint in one way, so that all its files still can be read."""
    file = directory / compressed.SHARD
    tensors, config = load_file(file), compressed.read(directory, "config.json")
    index, entry = compressed.read(directory, compressed.INDEX), config["quantization_config"]
    what(tensors, entry, index["weight_map"], config)
    index["metadata"]["total_size"] = sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, file, metadata={"format": "pt"})
    compressed.dump(directory, "config.json", config)
    compressed.dump(directory, compressed.INDEX, index)


def lose(name):
    def damage(tensors, entry, weight_map, config):
        del tensors[name], weight_map[name]

    return damage


def add(name, tensor):
    def damage(tensors, entry, weight_map, config):
        tensors[name], weight_map[name] = tensor, compressed.SHARD

    return damage


def set_entry(**changed):
    return lambda tensors, entry, weight_map, config: entry["layers"][UP].update(changed)


def append_layer(tensors, entry, weight_map, config):
    entry["layers"]["model.layers.7.mlp.up_proj"] = entry["layers"][UP]
    for field in compressed.TENSORS["bitmap"]:
        add(f"model.layers.7.mlp.up_proj.{field}", tensors[f"{UP}.{field}"].clone())(tensors, entry, weight_map, config)


DAMAGE = {
    "a bitmap is lost": (lose(f"{UP}.bitmap"), rf"{UP}\.bitmap is missing"),
    "a norm is lost": (lose("model.norm.weight"), r"model\.norm\.weight: is in none of the files"),
    "the index has more": (lambda t, e, w, c: w.update(more=compressed.SHARD), "only .* has 'more'"),
    "the file has more": (lambda t, e, w, c: t.update(more=torch.ones(1)), "only .* has 'more'"),
    "the config names one layer less": (lambda t, e, w, c: e["layers"].pop(UP), f"{UP} is stored packed"),
    "the model has one layer less": (append_layer, "7.mlp.up_proj: is packed, but LlamaForCausalLM has no such layer"),
    "a norm is larger": (
        lambda t, e, w, c: t.update({"model.norm.weight": torch.ones(33)}),
        r"model\.norm\.weight: must be \[32\] by the model's config, got \[33\]",
    ),
    "the config is smaller": (lambda t, e, w, c: c.update(intermediate_size=40), r"must be \[40, 32\] by .*, got \[48"),
    "a shape lies": (set_entry(shape=[32, 48]), rf"{UP}\.bitmap must be \[32, 6\]"),
    "a dtype lies": (set_entry(dtype="bfloat16"), rf"{UP}\.values must be"),
    "a format lies": (set_entry(format="2:4", pattern="2:4"), rf"{UP} is packed as 2:4, but {UP}\.metadata is missing"),
    "a format is unknown": (set_entry(format="csr"), "format must be one of bitmap, 2:4, bitmap_int8, got 'csr'"),
    "an offset lies": (lambda t, e, w, c: t[f"{UP}.row_offsets"][3:4].add_(1), f"{UP}: bitmap keeps"),
    "a bit too many": (
        lambda t, e, w, c: t[f"{UP}.bitmap"][0, 0].fill_(255),
        f"{UP}: bitmap keeps 24 weights in row 0",
    ),
    "a value too few": (lambda t, e, w, c: t.update({f"{UP}.values": t[f"{UP}.values"][:-1].clone()}), UP),
    "a position lies": (
        lambda t, e, w, c: t[f"{GATE}.metadata"][2, 0].fill_(0),
        f"{GATE}: positions must ascend: row 2",
    ),
    "a value is NaN": (lambda t, e, w, c: t[f"{UP}.values"][5:6].fill_(torch.nan), f"{UP}: values must be finite"),
    "the version is newer": (lambda t, e, w, c: e.update(format_version=2), "format_version 2 is newer than 1"),
    "the version is no number": (lambda t, e, w, c: e.update(format_version="1"), "format_version must be"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_what_it_says_is_refused_by_name(directory, damage):
    what, pattern = DAMAGE[damage]
    change(directory, what)
    with pytest.raises(ValueError, match=pattern):
        transformers.AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(ValueError, match="^cannot load model '/") as error:
        hf.load(directory)
    assert "\n" not in str(error.value)


def test_a_tied_weight_cannot_be_packed_as_well(tmp_path):
    model = tiny_models.make("llama")
    model.lm_head.weight.data[:, ::2] = 0
    sk.save(model, tmp_path / "out")
    config = compressed.read(tmp_path / "out", "config.json")
    assert "lm_head" in config["quantization_config"]["layers"]
    compressed.dump(tmp_path / "out", "config.json", config | {"tie_word_embeddings": True})
    with pytest.raises(ValueError, match="lm_head: is packed, but LlamaForCausalLM ties its weight to another"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_index_that_leaves_the_directory_is_refused(directory):
    (directory / compressed.SHARD).rename(directory.parent / compressed.SHARD)
    index = compressed.read(directory, compressed.INDEX)
    index["weight_map"] = dict.fromkeys(index["weight_map"], f"../{compressed.SHARD}")
    compressed.dump(directory, compressed.INDEX, index)
    with pytest.raises(ValueError, match="must lie in sparsekern-00001-of-0000N.safetensors of this directory"):
        transformers.AutoModelForCausalLM.from_pretrained(directory)


def test_nothing_is_packed_while_a_dense_checkpoint_is_read(tmp_path):
    tiny_models.make("llama").save_pretrained(tmp_path)
    config = sk.hf_quantizer.SparsekernConfig(format_version=1, layers={})
    with pytest.raises(ValueError, match=r"load it without quantization_config, then sparsify\(model\)"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def run(code, *arguments):
    """What a fresh interpreter prints, which imports nothing but what `code` does."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_sparsekern_the_load_fails_loudly(llama):
    """It must not go on with random weights and a warning."""
    done = run("import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])", llama[1])
    assert done.returncode == 1
    assert re.search(r"OSError: .*no file named model\.safetensors", done.stderr)


def test_importing_sparsekern_is_all_that_a_pipeline_needs(llama, tokenizer, tmp_path):
    model, directory = llama[0], tmp_path / "out"
    sk.save(model, directory, tokenizer)
    code = """
import sys, sparsekern, torch, transformers
written = transformers.pipeline("text-generation", sys.argv[1])("the cat", max_new_tokens=3, do_sample=False)
base = transformers.AutoModel.from_pretrained(sys.argv[1])
print(written[0]["generated_text"], sum(type(m).__name__ == "SparseLinear" for m in base.modules()), sep="|")
"""
    done = run(code, directory)
    text, count = done.stdout.strip().splitlines()[-1].split("|")
    assert int(count) == 21, done.stderr
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert text == tokenizer.decode(written[0], skip_special_tokens=True)


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def same_shards(first, second):
    """The weights, their index and what config.json says of them have the same bytes."""
    for directory in (first, second):
        assert sk.checkpoint.verify(directory)
    shard = {name: content for name, content in files(first).items() if "safetensors" in name}
    assert shard.items() <= files(second).items()
    said = [compressed.read(directory, "config.json")["quantization_config"] for directory in (first, second)]
    return said[0] == said[1]


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
def test_save_pretrained_of_a_loaded_model_writes_the_same_tensors(name, tmp_path):
    model = compressed.sparse(name)
    sk.save(model, tmp_path / "out")
    loaded = hf.load(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    assert same_shards(tmp_path / "out", tmp_path / "again")
    assert torch.equal(logits(hf.load(tmp_path / "again"), name), logits(model, name))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(llama, tmp_path, duplicate):
    loaded = hf.load(llama[1])
    copied = duplicate(loaded)
    copied.model.norm.weight.data.zero_()
    (tmp_path / "copy").mkdir()
    copied.save_pretrained(tmp_path / "copy", max_shard_size="10KB")
    assert not hf.load(tmp_path / "copy").model.norm.weight.any()
    loaded.save_pretrained(tmp_path / "original")
    assert same_shards(llama[1], tmp_path / "original")


def test_what_would_change_the_save_is_refused(llama, tmp_path):
    loaded = hf.load(llama[1])
    for setting in ({"state_dict": {"a": torch.ones(1)}}, {"push_to_hub": True}, {"variant": "fp16"}):
        with pytest.raises(ValueError, match=f"has no {next(iter(setting))}; sparsekern.densify"):
            loaded.save_pretrained(tmp_path / "out", **setting)
    with pytest.raises(ValueError, match="max_shard_size must be a number of bytes or like \"5GB\", got 'many'"):
        loaded.save_pretrained(tmp_path / "out", max_shard_size="many")
    loaded.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="exists already"):
        loaded.save_pretrained(llama[1])


def test_densified_it_is_saved_as_any_other_model(llama, tmp_path):
    model, directory = llama
    loaded = hf.load(directory)
    with pytest.raises(
        ValueError, match=r"loaded with packed weights; model\.dequantize\(\) first, or .*sparsekern\.save"
    ):
        hf.save(loaded, None, tmp_path / "dense", {})
    sk.densify(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in compressed.read(tmp_path / "dense", "config.json")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not sparse_layers(plain)
    torch.testing.assert_close(logits(plain), logits(model))
    hf.save(loaded, None, tmp_path / "saved", {})
    assert (tmp_path / "saved" / "model.safetensors").is_file()
