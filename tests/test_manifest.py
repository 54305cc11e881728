"""manifest: every lie of a compressed checkpoint is refused in words, with hashes and without."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekern as sk
from sparsekern import checkpoint
from sparsekern.manifest import INDEX, SUMS, write_sums

SHARD = "sparsekern-00001-of-00002.safetensors"
SECOND = "sparsekern-00002-of-00002.safetensors"


def model():
    """A bitmap layer "a" with a bias, a 2:4 layer "b" whose last word of metadata has two groups, a dense norm."""
    torch.manual_seed(0)
    made = nn.ModuleDict({"a": nn.Linear(19, 6), "b": nn.Linear(24, 4, bias=False), "norm": nn.LayerNorm(7)})
    with torch.no_grad():
        made["a"].weight[torch.rand(6, 19) < 0.8] = 0
        made["b"].weight[:, ::2] = 0
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "out"
    sk.save(model(), directory, shard_bytes=300, files={"README.md": "# A card\n", "inner.txt": "text"})
    assert sorted(path.name for path in directory.glob("*.safetensors")) == [SHARD, SECOND]
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def change(path, edit):
    """A JSON file after `edit` changed what it holds."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def change_tensors(path, edit):
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def layers(config):
    return config["quantization_config"]["layers"]


def test_what_was_saved_is_true(saved):
    report = checkpoint.verify(saved)
    assert report.layers.keys() == {"a", "b"}
    assert report.sha256.keys() == {"README.md", "inner.txt", "config.json", INDEX, SHARD, SECOND}
    assert report.tensors == 8
    assert "6 files match SHA256SUMS" in str(report)
    assert checkpoint.verify(saved, hashes=False).sha256 == {}
    assert json.loads(json.dumps(report.to_json()))["tensors"] == 8


def test_sha256sum_agrees(saved):
    ran = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=saved, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


CONFIG_LIES = {
    "a newer version": (
        lambda c: c["quantization_config"].update(format_version=2),
        "format_version 2 is newer than 1, the newest that is read here: update sparsekern",
    ),
    "a version of text": (lambda c: c["quantization_config"].update(format_version="1"), "must be a whole number"),
    "a version of truth": (lambda c: c["quantization_config"].update(format_version=True), "must be a whole number"),
    "version 0": (lambda c: c["quantization_config"].update(format_version=0), "must be a whole number from 1, got 0"),
    "another method": (
        lambda c: c["quantization_config"].update(quant_method="gptq"),
        "must have quant_method 'sparsekern', got 'gptq': this is not a compressed checkpoint of sparsekern",
    ),
    "no method": (lambda c: c.pop("quantization_config"), "must have quant_method 'sparsekern', got None"),
    "a config of text": (lambda c: c.update(quantization_config="x"), "must have quant_method 'sparsekern', got None"),
    "layers in a list": (lambda c: c["quantization_config"].update(layers=[]), "must have layers by name"),
    "one layer less": (lambda c: layers(c).pop("a"), "a is stored packed, but quantization_config does not name it"),
    "one layer more": (
        lambda c: layers(c).update(c=layers(c)["a"]),
        "c is packed as bitmap, but c.values is missing",
    ),
    "a layer that is a list": (lambda c: layers(c).update(a=[]), "'a': must have format, shape, pattern and dtype"),
    "a layer with more": (lambda c: layers(c)["a"].update(x=1), "'a': must have format, shape, pattern and dtype"),
    "another format": (lambda c: layers(c)["a"].update(format="2:4", shape=[6, 20]), "a.metadata is missing"),
    "an unknown format": (
        lambda c: layers(c)["a"].update(format="csr"),
        "format must be one of bitmap, 2:4, bitmap_int8, got 'csr'",
    ),
    "a format of numbers": (lambda c: layers(c)["a"].update(format=[1]), "format must be one of"),
    "another dtype": (lambda c: layers(c)["a"].update(dtype="float16"), r"a.values must be \[\d+\] of torch.float16"),
    "an unknown dtype": (lambda c: layers(c)["a"].update(dtype="int8"), "dtype must be one of bfloat16, float16"),
    "more rows": (lambda c: layers(c)["a"].update(shape=[7, 19]), r"a.bitmap must be \[7, 3\] of torch.uint8"),
    "more columns": (lambda c: layers(c)["a"].update(shape=[6, 27]), r"a.bitmap must be \[6, 4\]"),
    "columns within a byte": (lambda c: layers(c)["a"].update(shape=[6, 20]), "a: pattern must be '"),
    "columns below the kept": (lambda c: layers(c)["b"].update(shape=[4, 20]), r"b.values must be \[4, 10\]"),
    "2:4 of odd columns": (lambda c: layers(c)["b"].update(shape=[4, 22]), "must be a multiple of 4"),
    "a shape below zero": (
        lambda c: layers(c)["a"].update(shape=[6, -19]),
        "shape must be out_features and in_features",
    ),
    "a shape of one": (lambda c: layers(c)["a"].update(shape=[6]), "shape must be out_features and in_features"),
    "a huge shape": (lambda c: layers(c)["a"].update(shape=[2**62, 2**62]), "shape must be out_features"),
    "a shape of text": (lambda c: layers(c)["a"].update(shape="6x19"), "shape must be out_features"),
    "another pattern": (lambda c: layers(c)["a"].update(pattern="50.0%"), "a: pattern must be '8.*', got '50.0%'"),
    "a pattern of numbers": (lambda c: layers(c)["a"].update(pattern=50), "pattern must be a text"),
    "a name of control characters": (lambda c: layers(c).update({"\u0007": {}}), "name of a layer must be printable"),
}


@pytest.mark.parametrize("lie", CONFIG_LIES)
def test_a_config_that_lies_is_refused(lie, copy):
    edit, message = CONFIG_LIES[lie]
    change(copy / "config.json", edit)
    with pytest.raises(ValueError, match=message):
        checkpoint.verify(copy, hashes=False)
    write_sums(copy)
    with pytest.raises(ValueError, match=message):
        checkpoint.verify(copy)


def leave(where):
    return lambda index: index["weight_map"].update({"a.bias": where})


INDEX_LIES = {
    "a file above": (leave(f"../{SHARD}"), r"'a.bias' must lie in sparsekern-00001-of-0000N.safetensors of this dir"),
    "an absolute file": (leave(f"/tmp/{SHARD}"), "must lie in sparsekern-"),
    "a file below": (leave(f"inner/{SHARD}"), "must lie in sparsekern-"),
    "a file that transformers would take": (leave("model.safetensors"), "must lie in sparsekern-"),
    "a file of numbers": (leave(3), "must lie in sparsekern-"),
    "a line break": (leave(f"{SHARD}\n"), "must lie in sparsekern-"),
    "other digits": (leave("sparsekern-０0001-of-00002.safetensors"), "must lie in sparsekern-|same shards"),
    "a third file": (leave("sparsekern-00003-of-00003.safetensors"), "its own numbering must have the same shards"),
    "the other file": (leave(SECOND), "must have the same tensors, but only .* has 'a.bias'"),
    "one tensor less": (lambda i: i["weight_map"].pop("a.bias"), f"but only {SHARD} has 'a.bias'"),
    "one tensor more": (lambda i: i["weight_map"].update(x=SHARD), f"but only {INDEX} has 'x'"),
    "another size": (lambda i: i["metadata"].update(total_size=1), "total_size must be the .* bytes .*, got 1"),
    "a size of truth": (lambda i: i["metadata"].update(total_size=True), "must have a weight_map and a metadata"),
    "no size": (lambda i: i.pop("metadata"), "must have a weight_map and a metadata"),
    "no map": (lambda i: i.pop("weight_map"), "must have a weight_map and a metadata"),
    "a map in a list": (lambda i: i.update(weight_map=[]), "must have a weight_map and a metadata"),
}


@pytest.mark.parametrize("lie", INDEX_LIES)
def test_an_index_that_lies_is_refused(lie, copy):
    edit, message = INDEX_LIES[lie]
    change(copy / INDEX, edit)
    with pytest.raises(ValueError, match=message):
        checkpoint.verify(copy, hashes=False)


def put(name, place, value):
    def edit(tensors):
        tensors[name].view(-1)[place] = value

    return edit


TENSOR_LIES = {
    "a bit more": (put("a.bitmap", 0, 0xFF), r"a: bitmap keeps \d+ weights in row 0, row_offsets say"),
    "bits after the inputs": (put("a.bitmap", 2, 0xF0), "a: bitmap must be 0 after input 18, got ones in row 0"),
    "offsets that fall": (put("a.row_offsets", 2, -5), "a: row_offsets must not fall"),
    "offsets that leave": (put("a.row_offsets", 1, 2**40), "a: row_offsets must not fall"),
    "offsets that begin late": (put("a.row_offsets", 0, 1), r"a: row_offsets must run from 0 to the \d+ values"),
    "offsets that end early": (put("a.row_offsets", 6, 1), "a: row_offsets must run from 0"),
    "NaN": (put("a.values", 0, torch.nan), "a: values must be finite as torch.float32, got 1 NaN or infinite ones"),
    "inf": (put("b.values", 0, -torch.inf), "b: values must be finite"),
    "positions that fall": (put("b.metadata", 0, 0b0001), "b: positions must ascend: row 0, columns 0..3 have 1, 0"),
    "positions after the inputs": (put("b.metadata", 1, 0x4844), "b: positions after input 23 must be"),
}


@pytest.mark.parametrize("lie", TENSOR_LIES)
def test_a_packed_layer_that_lies_is_refused(lie, copy):
    edit, message = TENSOR_LIES[lie]
    name = {"a": SHARD, "b": SECOND}[message[0]]
    change_tensors(copy / name, edit)
    for check in (lambda: checkpoint.verify(copy, hashes=False), lambda: sk.load(copy, into=model(), hashes=False)):
        with pytest.raises(ValueError, match=rf"^{name}: {message}"):
            check()


def test_a_packed_layer_with_a_dense_weight_or_a_wrong_bias_is_refused(copy):
    change_tensors(copy / SHARD, lambda tensors: tensors.update({"a.bias": torch.zeros(7)}))
    change(copy / INDEX, lambda index: index["metadata"].update(total_size=index["metadata"]["total_size"] + 4))
    with pytest.raises(ValueError, match=r"a.bias must be \[6\], got \[7\]"):
        checkpoint.verify(copy, hashes=False)
    change_tensors(copy / SHARD, lambda tensors: tensors.update({"a.weight": torch.zeros(1)}))
    change(copy / INDEX, lambda index: index["weight_map"].update({"a.weight": SHARD}))
    change(copy / INDEX, lambda index: index["metadata"].update(total_size=index["metadata"]["total_size"] + 4))
    with pytest.raises(ValueError, match="a is packed, so a.weight must not be there"):
        checkpoint.verify(copy, hashes=False)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD, SUMS, "README.md"])
def test_a_missing_file_is_refused(name, copy):
    (copy / name).unlink()
    with pytest.raises(ValueError, match=name):
        checkpoint.verify(copy)


def test_another_file_is_refused_unless_it_is_hidden(copy):
    (copy / ".gitattributes").write_text("x")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "file").write_text("x")
    checkpoint.verify(copy)
    (copy / "more").mkdir()
    (copy / "more" / "pickle.bin").write_text("x")
    with pytest.raises(ValueError, match="SHA256SUMS must list every file, .* 'more/pickle.bin': added since"):
        checkpoint.verify(copy)
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{INDEX} and the directory must have the same shards, .*'model.safetensors'"):
        checkpoint.verify(copy, hashes=False)


@pytest.mark.parametrize("name", [SHARD, "config.json", SUMS])
def test_a_link_that_leaves_the_directory_is_refused_and_one_that_stays_is_not(name, copy):
    os.rename(copy / name, copy / ".kept")
    (copy / name).symlink_to(".kept")
    checkpoint.verify(copy)
    os.rename(copy / ".kept", copy.parent / "outside")
    (copy / name).unlink()
    (copy / name).symlink_to("../outside")
    with pytest.raises(ValueError, match=rf"'{name}' must not leave the directory, got a link to '.*outside'"):
        checkpoint.verify(copy)


def test_a_directory_that_is_a_link_is_refused_as_are_dangling_links_and_pipes(copy):
    (copy / "more").symlink_to(copy.parent)
    with pytest.raises(ValueError, match="'more' must not leave the directory"):
        checkpoint.verify(copy)
    (copy / "more").unlink()
    (copy / "more").symlink_to("nothing")
    with pytest.raises(ValueError, match="'more' must be a file, got a dangling link"):
        checkpoint.verify(copy)
    (copy / "more").unlink()
    (copy / "more").symlink_to("more")
    with pytest.raises(ValueError, match="'more' must be a file, got a dangling link"):
        checkpoint.verify(copy)
    (copy / "more").unlink()
    os.mkfifo(copy / "more")
    with pytest.raises(ValueError, match="'more' must be a file, got something else"):
        checkpoint.verify(copy)


def test_the_hubs_own_cache_is_read(saved, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(saved.iterdir()):
        shutil.copy(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    checkpoint.verify(snapshot)
    sk.load(snapshot, into=model())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("  ", " *"), "line 1 must be a sha256, two spaces and a new name"),
        (lambda text: text.upper(), "line 1 must be a sha256"),
        (lambda text: text + text, "line 7 must be a sha256, two spaces and a new name"),
        (lambda text: text.removesuffix("\n"), "must end with a line break"),
        (lambda text: "", "SHA256SUMS: must end with a line break|only the directory has"),
        (lambda text: text.splitlines(keepends=True)[0], "only the directory has"),
        (lambda text: text.replace("README.md", "../README.md"), "only SHA256SUMS has '../README.md'"),
        (lambda text: text.replace("a", "b"), "sha256 must be .*, got|must have the same files"),
    ],
)
def test_sums_that_are_not_what_sha256sum_writes_are_refused(edit, message, copy):
    (copy / SUMS).write_text(edit((copy / SUMS).read_text()))
    with pytest.raises(ValueError, match=message):
        checkpoint.verify(copy)


def test_sums_in_another_order_are_as_good(copy):
    lines = (copy / SUMS).read_text().splitlines(keepends=True)
    (copy / SUMS).write_text("".join(reversed(lines)))
    checkpoint.verify(copy)


def test_what_is_no_directory_and_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such directory: '.*nothing'"):
        checkpoint.verify(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is not a compressed checkpoint: it holds no config.json"):
        checkpoint.verify(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"it holds no {INDEX}"):
        checkpoint.verify(tmp_path)


def mutate(path, chance):
    """Flip a bit, cut, repeat, swap, or lengthen, somewhere."""
    data = bytearray(path.read_bytes())
    kind = chance.randrange(8)
    if kind < 4:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 4:
        del data[chance.randrange(len(data)) :]
    elif kind == 5:
        data += bytes(chance.randrange(1, 9))
    elif kind == 6:
        start, other = sorted(chance.randrange(len(data)) for _ in range(2))
        if data[start] == data[other]:
            return False
        data[start], data[other] = data[other], data[start]
    else:
        place = chance.randrange(len(data))
        data[place : place + 1] = b"9" if data[place : place + 1] != b"9" else b"0"
    path.write_bytes(data)
    return True


def test_no_mutated_file_is_accepted_and_none_is_a_crash(copy):
    chance = random.Random(0)
    files = sorted(Path(copy).iterdir())
    refused = 0
    for _ in range(250):
        file = chance.choice(files)
        whole = file.read_bytes()
        if mutate(file, chance):
            with pytest.raises(ValueError, match=".") as error:
                checkpoint.verify(copy)
            assert len(str(error.value)) < 600
            refused += 1
            try:
                # without hashes a changed value is another value; nothing else passes
                sk.load(copy, into=model(), hashes=False)
            except ValueError:
                pass
        file.write_bytes(whole)
    assert refused > 220
    checkpoint.verify(copy)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a\nb"], "^cannot be stored: .*names must be printable, got 'a.nb'$"),
        (
            ["a.values", "a.metadata"],
            "^cannot be stored: .*a is stored packed, but quantization_config does not name it$",
        ),
    ],
)
def test_what_could_not_be_read_again_is_not_written(names, message, tmp_path):
    model = nn.Module()
    model.a = nn.Module()
    for name in names:
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._parameters[own] = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        checkpoint.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
