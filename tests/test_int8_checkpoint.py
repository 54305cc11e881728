"""int8 layers through the product: in a module, on the disk and back, converted, and refused when they lie."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekern as sk
from sparsekern import checkpoint, grid, hf
from sparsekern.formats import Bitmap, BitmapInt8
from sparsekern.inspect import inspect
from sparsekern.linear import SparseLinear
from sparsekern.manifest import read_manifest
from sparsekern.shards import Reader
from sparsekern.swap import replace_module
from tests import compressed

pytestmark = pytest.mark.usefixtures("one_thread")

SHARD = "sparsekern-00001-of-00001.safetensors"
FIELDS = ("values", "scales", "bitmap", "row_offsets")


def swap(model, group_size=None):
    """`model` with its pruned layers in int8, every other one with a scale a group if there is a group_size."""
    names = [name for name, layer in hf.layers(model) if type(layer) is nn.Linear]
    for number, name in enumerate(names):
        linear = model.get_submodule(name)
        packed = BitmapInt8.pack(linear.weight.detach(), group_size if number % 2 else None)
        replace_module(model, name, SparseLinear(packed, linear.bias))
    return model


def pruned(dtype=torch.float32):
    return compressed.halve(compressed.tiny_models.make("llama")).to(dtype)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def assert_same(packed, other):
    for name in FIELDS:
        assert torch.equal(getattr(packed, name), getattr(other, name)), name
    assert (packed.in_features, packed.group_size, packed.dtype) == (other.in_features, other.group_size, other.dtype)


def logits(model):
    with torch.no_grad():
        return model(compressed.tiny_models.batches("llama", 1)[0]).logits


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def saved(request, tmp_path_factory):
    """An int8 model and where it was saved."""
    model, directory = swap(pruned(request.param), 64), tmp_path_factory.mktemp("int8") / "out"
    sk.save(model, directory)
    return model, directory


def test_the_files_are_the_ones_described_here(tmp_path):
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[254.0, 0, 0, -6], [0, 0, 63.5, 0.5]]))
    model = nn.ModuleDict({"a": SparseLinear(BitmapInt8.pack(layer.weight), layer.bias)})
    report = sk.save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    entry = {"format": "bitmap_int8", "shape": [2, 4], "pattern": "50.0%", "dtype": "float32", "group_size": None}
    assert config["layers"] == {"a": entry} == report.packed
    tensors = load_file(tmp_path / "out" / SHARD)
    assert tensors["a.values"].tolist() == [127, -3, 127, 1]
    assert tensors["a.scales"].tolist() == [[2.0], [0.5]]
    assert tensors["a.bitmap"].tolist() == [[9], [12]]
    assert tensors["a.row_offsets"].tolist() == [0, 2, 4]
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "a.values": torch.int8,
        "a.scales": torch.float32,
        "a.bitmap": torch.uint8,
        "a.row_offsets": torch.int64,
        "a.bias": torch.float32,
    }


def test_what_is_loaded_is_what_was_saved(saved, tmp_path):
    model, directory = saved
    for loaded in (sk.load(directory), sk.load(directory, into=pruned(model.dtype))):
        assert layers(loaded).keys() == layers(model).keys()
        for name, module in layers(loaded).items():
            assert_same(module.packed, model.get_submodule(name).packed)
    if model.dtype == torch.float32:
        # the cast to bfloat16 rounds rotary embeddings, which no file holds
        assert torch.equal(logits(loaded), logits(model))
    sk.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / SHARD).read_bytes() == (directory / SHARD).read_bytes()
    assert "bitmap_int8" in {layer["format"] for layer in checkpoint.verify(directory).layers.values()}
    reports = {report.name.removesuffix(".weight"): report for report in inspect(directory)}
    for name, module in layers(model).items():
        assert reports[name].format == "bitmap_int8"
        assert reports[name].bytes == module.packed.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_loads_it_in_any_dtype_with_the_same_integers_and_scales(saved, dtype):
    model, directory = saved
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    assert loaded.dtype == dtype
    for name, module in layers(loaded).items():
        assert_same(module.packed, model.get_submodule(name).packed.to("cpu", dtype))
    assert logits(loaded).isfinite().all()


def test_a_model_is_cast_without_its_integers_and_scales(saved):
    model, directory = saved
    there = sk.load(directory)
    wanted = {name: module.packed for name, module in layers(there).items()}
    for dtype in (torch.bfloat16, torch.float32, model.dtype, model.dtype):
        there.to(dtype)
        for name, module in layers(there).items():
            assert_same(module.packed, wanted[name].to("cpu", dtype))
            assert module.weight.dtype == dtype
    there.share_memory()
    for name, module in layers(there).items():
        assert_same(module.packed, wanted[name])


def test_densify_and_the_state_dict_give_the_dequantised_weight(saved):
    model, directory = saved
    loaded, dense = sk.load(directory), sk.load(directory)
    sk.densify(dense)
    assert not layers(dense)
    state = loaded.state_dict()
    for name, module in layers(loaded).items():
        wanted = module.packed.dequantised().to(model.dtype)
        assert torch.equal(dense.get_submodule(name).weight, wanted)
        assert torch.equal(state[f"{name}.weight"], wanted)
    # what a layer gave away rounded is not rounded again
    before = {name: module.packed for name, module in layers(loaded).items()}
    loaded.load_state_dict(state)
    for name, module in layers(loaded).items():
        assert_same(module.packed, before[name])
    loaded.load_state_dict({name: tensor * 2 for name, tensor in state.items()})
    for name, module in layers(loaded).items():
        assert module.group_size == before[name].group_size
        assert (module.packed.to_dense() - 2 * before[name].to_dense()).abs().max() <= module.packed.scales.max()


def test_a_layer_that_was_emptied_holds_zeros(saved):
    module = next(iter(layers(sk.load(saved[1])).values()))
    emptied = module.to_empty(device="cpu")
    assert not emptied.packed.values.numel()
    assert emptied.group_size == module.group_size


def test_a_quantised_weight_goes_through_all_of_it_unchanged(tmp_path):
    """As GPTQ leaves it in float32, and of 4 bits in bfloat16."""
    for bits, dtype in ((8, torch.float32), (4, torch.float32), (4, torch.bfloat16)):
        model = pruned()
        for _, layer in hf.layers(model):
            weight = hf.weight(layer)
            scale = grid.best_scale(weight, torch.ones(weight.shape[1]), grid.levels(bits))
            weight.copy_(grid.nearest(weight, scale[:, None], grid.levels(bits)))
        wanted = {name: tensor.to(dtype) + 0.0 for name, tensor in model.state_dict().items()}
        directory = tmp_path / f"{bits}-{dtype}"
        sk.save(swap(model.to(dtype)), directory)
        loaded = sk.load(directory)
        assert layers(loaded)
        sk.densify(loaded)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name


def test_convert_rounds_to_int8_when_asked_and_never_again(tmp_path):
    model = pruned(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    report = checkpoint.convert(tmp_path / "dense", tmp_path / "int8", "bitmap_int8")
    formats = {entry["format"] for entry in report.packed.values()}
    assert formats == {"bitmap_int8"}
    with Reader() as reader:
        manifest = read_manifest(tmp_path / "int8")
        for name in manifest.layers:
            wanted = BitmapInt8.pack(model.get_submodule(name).weight.detach())
            assert_same(manifest.packed(name, reader), wanted)
    # as a bitmap of bfloat16 it is what the int8 layers give as their weight
    unrounded = checkpoint.convert(tmp_path / "int8", tmp_path / "bitmap", "bitmap")
    checkpoint.convert(tmp_path / "int8", tmp_path / "same", "bitmap_int8")
    checkpoint.convert(tmp_path / "bitmap", tmp_path / "plain", "dense")
    checkpoint.convert(tmp_path / "int8", tmp_path / "plain too", "dense")
    assert (tmp_path / "same" / SHARD).read_bytes() == (tmp_path / "int8" / SHARD).read_bytes()
    plain = load_file(tmp_path / "plain/model.safetensors")
    for name, tensor in load_file(tmp_path / "plain too/model.safetensors").items():
        assert torch.equal(tensor, plain[name])
    for name, module in layers(sk.load(tmp_path / "int8")).items():
        assert torch.equal(plain[f"{name}.weight"], module.packed.to_dense())
        assert unrounded.packed[name]["format"] == Bitmap.name
    assert "lm_head" in dict(report.left)


def change(directory, name, value):
    tensors = load_file(directory / SHARD)
    layer = next(name.removesuffix(".scales") for name in sorted(tensors) if name.endswith(".scales"))
    tensors[f"{layer}.{name}"] = value(tensors[f"{layer}.{name}"])
    save_file(tensors, directory / SHARD, metadata={"format": "pt"})


def configure(directory, **changes):
    config = compressed.read(directory, "config.json")
    next(iter(config["quantization_config"]["layers"].values())).update(changes)
    compressed.dump(directory, "config.json", config)


LIES = {
    "-128": (lambda d: change(d, "values", lambda v: v - v - 128), "values must be -127 to 127, got -128"),
    "negative scale": (lambda d: change(d, "scales", lambda s: -1 - s), "scales must be finite and not negative"),
    "nan scale": (
        lambda d: change(d, "scales", lambda s: s / 0 * 0),
        "scales must be finite and not negative, got nan",
    ),
    "bits": (lambda d: change(d, "bitmap", lambda b: b | 1), "bitmap keeps .* weights in row"),
    "offsets": (lambda d: change(d, "row_offsets", lambda o: o + 1), "row_offsets must run from 0 to the"),
    "other groups": (lambda d: configure(d, group_size=8), "scales must be .* by config.json, got"),
    "no group": (lambda d: configure(d, group_size=-1), "group_size must be a whole number from 1, or null, got -1"),
    "a flag": (lambda d: configure(d, group_size=True), "group_size must be a whole number from 1, or null, got True"),
    "unknown": (lambda d: configure(d, zero=0), "must have format, shape, pattern and dtype, and group_size"),
    "other dtype": (lambda d: configure(d, format="bitmap"), "must have format, shape, pattern and dtype"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_not_what_it_says_is_refused_in_words(lie, tmp_path):
    sk.save(swap(pruned()), tmp_path / "out")
    damage, message = LIES[lie]
    damage(tmp_path / "out")
    for read in (
        lambda path: sk.load(path, hashes=False),
        lambda path: checkpoint.verify(path, hashes=False),
        lambda path: checkpoint.convert(path, tmp_path / "other", "dense", hashes=False),
        transformers.AutoModelForCausalLM.from_pretrained,
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "out")
