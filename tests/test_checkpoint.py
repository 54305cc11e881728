"""checkpoint: the files by hand, the round trips, sizes and memory, and what is refused on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sparsekern as sk
from sparsekern import checkpoint, hf, manifest
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.linear import SparseLinear
from tests import tiny_models

ROOT = Path(__file__).parents[1]


class Plain(nn.Module):
    """A module that transformers does not know: two layers to pack, one to leave, a buffer, a tied weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 5)
        self.second = nn.Linear(8, 6, bias=False)
        self.full = nn.Linear(8, 3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.first(x), self.second(x), self.full(x), self.head(x) * self.scale


def plain(seed=0):
    torch.manual_seed(seed)
    return Plain()


@pytest.fixture
def pruned():
    model = plain()
    with torch.no_grad():
        model.first.weight[torch.rand(5, 8) < 0.7] = 0
        model.second.weight[:, ::2] = 0
    return model


def prune(model, fraction=0.6):
    """Zeros in every layer that can be pruned, every other one 2:4."""
    for i, (_, layer) in enumerate(hf.layers(model)):
        weight = hf.weight(layer)
        if i % 2 and weight.shape[1] % 4 == 0:
            weight[:, ::2] = 0
        else:
            weight.masked_fill_(torch.rand(weight.shape) < fraction, 0)
    return model


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def test_the_files_are_the_ones_described_here(tmp_path):
    layer = nn.Linear(8, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0, 5, 6, 7, 0, 0, 0, 0], [-0.0, 0, 0, 0, 0, 0, 0, 8]]))
        layer.bias.copy_(torch.tensor([1, 2]))
    report = sk.save(nn.ModuleDict({"a": layer}), tmp_path / "out", files={"README.md": "# A card\n"})
    names = ["README.md", "SHA256SUMS", "config.json", "sparsekern-00001-of-00001.safetensors"]
    assert sorted(os.listdir(tmp_path / "out")) == [*names, "sparsekern.safetensors.index.json"]
    stored = load_file(tmp_path / "out" / names[3])
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {
        "a.values": [5, 6, 7, 8],
        "a.bitmap": [[0b1110], [0b10000000]],
        "a.row_offsets": [0, 3, 4],
        "a.bias": [1, 2],
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "architectures": ["ModuleDict"],
        "quantization_config": {
            "quant_method": "sparsekern",
            "format_version": 1,
            "layers": {"a": {"format": "bitmap", "shape": [2, 8], "pattern": "75.0%", "dtype": "float32"}},
        },
    }
    index = json.loads((tmp_path / "out" / "sparsekern.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 16 + 2 + 24 + 8}, "weight_map": dict.fromkeys(sorted(stored), names[3])}
    assert (report.bytes, report.dense_bytes, report.left) == (50, 72, [])
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True, text=True)
    assert checked.returncode == 0
    assert checked.stdout.count(": OK\n") == 4


def test_a_plain_module_comes_back_with_the_same_bits(pruned, tmp_path):
    report = sk.save(pruned, tmp_path / "out")
    assert {name: layer["format"] for name, layer in report.packed.items()} == {"first": "bitmap", "second": "2:4"}
    assert dict(report.left) == {
        "full": "as bitmap it would take 131 bytes, dense 96",
        "head": "its weight is tied",
    }
    model = plain(1)
    optimizer = torch.optim.SGD(model.parameters())
    assert sk.load(tmp_path / "out", into=model) is model
    assert_same(pruned, model)
    assert isinstance(model.first, SparseLinear)
    assert isinstance(model.second, SparseLinear)
    assert model.head.weight is model.embedding.weight
    # an optimizer goes on with the parameters that it knows
    assert any(parameter is model.full.weight for parameter in optimizer.param_groups[0]["params"])
    tokens = torch.arange(11)
    for y, expected in zip(model(tokens), pruned(tokens), strict=True):
        torch.testing.assert_close(y, expected)


def test_a_module_on_the_meta_device_is_filled(pruned, tmp_path):
    sk.save(pruned, tmp_path / "out")
    with torch.device("meta"):
        model = Plain()
    model.cache = torch.zeros(3)
    sk.load(tmp_path / "out", into=model)
    assert_same(pruned, model)
    assert model.head.weight is model.embedding.weight


def test_what_was_loaded_lives_on_when_the_files_are_gone(pruned, tmp_path):
    sk.save(pruned, tmp_path / "out")
    model = sk.load(tmp_path / "out", into=plain(1))
    for file in (tmp_path / "out").iterdir():
        # in place, so that a mapped page would change
        file.write_bytes(b"\xff" * file.stat().st_size)
    assert_same(pruned, model)


def test_saving_what_was_loaded_gives_the_same_bits(pruned, tmp_path):
    with torch.no_grad():
        # a 2:4 layer is served as a bitmap on a CPU
        pruned.second.weight[0, 0] = pruned.second.weight[0, 2] = 1.0
    sk.save(pruned, tmp_path / "out")
    sk.save(sk.load(tmp_path / "out", into=plain(1)), tmp_path / "again")
    for name in os.listdir(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize("format", [Bitmap, SemiStructured], ids=lambda format: format.name)
def test_a_sparse_layer_is_saved_in_its_own_format(format, pruned, tmp_path):
    pruned.second = SparseLinear.from_linear(pruned.second, format)
    assert sk.save(pruned, tmp_path / "out").packed["second"]["format"] == format.name


def test_a_module_in_two_places_is_stored_once_and_replaced_in_both(tmp_path):
    def shared():
        layer = nn.Linear(16, 16)
        nn.init.eye_(layer.weight)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = shared()
    sk.save(model, tmp_path / "out")
    loaded = sk.load(tmp_path / "out", into=shared())
    assert loaded[0] is loaded[2]
    assert_same(model, loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_transformers_model_is_read_into_a_skeleton(dtype, tmp_path):
    model = prune(tiny_models.llama(tie_word_embeddings=True)).to(dtype)
    sk.save(model, tmp_path / "out", shard_bytes=5_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert (tmp_path / "out" / "generation_config.json").is_file()
    loaded = sk.load(tmp_path / "out", into=hf.skeleton(tmp_path / "out"))
    assert_same(model, loaded)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = torch.arange(1, 8)[None]
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "whisper", "mixtral", "vit", "opt", "gemma3n"])
def test_models_of_every_kind_come_back(name, tmp_path):
    model = prune(tiny_models.make(name))
    sk.save(model, tmp_path / "out")
    loaded = sk.load(tmp_path / "out", into=hf.skeleton(tmp_path / "out"))
    assert_same(model, loaded)


def test_what_cannot_be_packed_is_stored_as_it_is(tmp_path):
    model = nn.ModuleDict({"nan": nn.Linear(16, 16), "wide": nn.Linear(16, 16).double(), "norm": nn.BatchNorm1d(3)})
    with torch.no_grad():
        model["nan"].weight.fill_(torch.nan)
        model["wide"].weight.zero_()
    report = sk.save(model, tmp_path / "out")
    assert dict(report.left) == {"nan": "it holds NaN or infinite values", "wide": "it is float64"}
    loaded = sk.load(
        tmp_path / "out",
        into=nn.ModuleDict({"nan": nn.Linear(16, 16), "wide": nn.Linear(16, 16), "norm": nn.BatchNorm1d(3)}),
    )
    assert loaded["nan"].weight.isnan().all()
    assert loaded["wide"].weight.dtype == torch.float64


def test_minus_zero_comes_back_as_zero_and_every_other_bit_stays(tmp_path):
    model = nn.Sequential(nn.Linear(64, 3, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        # a subnormal, the largest, the smallest, and -0.0
        model[0].weight[0, :4] = torch.tensor([1e-45, torch.finfo(torch.float32).max, -1e-38, -0.0])
    sk.save(model, tmp_path / "out")
    loaded = sk.load(tmp_path / "out", into=nn.Sequential(nn.Linear(64, 3, bias=False)))
    bits = (model[0].weight + 0.0).view(torch.int32)
    assert torch.equal(loaded[0].weight.view(torch.int32), bits)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_the_size_is_the_formats_arithmetic(sparsity, tmp_path):
    model = nn.Sequential(nn.Linear(1024, 512, bias=False)).bfloat16()
    weight = model[0].weight.data
    weight[torch.rand(weight.shape).argsort(dim=1) < 1024 * sparsity] = 0
    sk.save(model, tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    # kept values, one bit a weight, eight bytes a row
    by_hand = 2 * (512 * 1024 - 512 * int(1024 * sparsity + 0.999)) + 512 * 1024 // 8 + 8 * 513
    assert by_hand <= size <= 1.02 * by_hand
    model[0].weight.data.view(-1, 4)[:, ::2] = 0
    model[0].weight.data.view(-1, 4)[:, 1::2] = 1
    sk.save(model, tmp_path / "24")
    size = sum(path.stat().st_size for path in (tmp_path / "24").glob("*.safetensors"))
    assert 1.125 * 512 * 1024 <= size <= 1.02 * 1.125 * 512 * 1024


def test_a_save_that_fails_leaves_nothing(pruned, tmp_path, monkeypatch):
    def full(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_sums", full)
    with pytest.raises(OSError, match="No space left"):
        sk.save(pruned, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_save_overwrites_nothing(pruned, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out' exists already"):
        sk.save(pruned, tmp_path / "out")


class Stateful(nn.Module):
    def get_extra_state(self):
        return {"a": 1}


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(4, 4)


def test_models_that_cannot_be_stored_are_refused_before_anything_is_written(tmp_path):
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(4, 4))
    for model, message in (
        (meta, "0.weight is on the meta device; load the model without offloading"),
        (nn.Linear(4, 4), "model is one layer, which has no name"),
        (SparseLinear.from_linear(nn.Linear(4, 4)), "model is one layer"),
        (nn.Sequential(Stateful()), "0: Stateful keeps state that is no parameter or buffer: it has get_extra_state"),
        (nn.Sequential(Adapted()), r"0: wrapped by Adapted: merge the adapter first, with merge_and_unload\(\)"),
        (nn.ParameterDict({"a": torch.zeros(2, dtype=torch.complex128)}), "a must be a plain tensor of BOOL, .*128"),
    ):
        with pytest.raises(ValueError, match=message):
            sk.save(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def without(model, name):
    setattr(model, name, nn.Identity())
    return model


def test_a_module_that_does_not_fit_is_refused_before_anything_in_it_changes(pruned, tmp_path):
    sk.save(pruned, tmp_path / "out")
    more = plain(1)
    more.more = nn.Linear(2, 2)
    untied = plain(1)
    untied.head.weight = nn.Parameter(untied.head.weight.clone())
    other = plain(1)
    other.full = nn.Linear(7, 3)
    wide = plain(1)
    wide.first = nn.Linear(9, 5)
    bare = plain(1)
    bare.first = nn.Linear(8, 5, bias=False)
    for model, message in (
        (without(plain(1), "first"), "first is packed in .*, so Plain must have an nn.Linear there, got Identity"),
        (without(plain(1), "full"), "full.bias and 1 more of .*out' has no place in Plain"),
        (more, "more.weight of Plain is stored 0 times"),
        (untied, "head.weight of Plain is stored 0 times"),
        (other, r"full.weight: must be \[3, 8\] as stored, got \[3, 7\] in Plain"),
        (wide, r"first: must be \[5, 8\], got \[5, 9\]"),
        (bare, "first.bias of .* has no place in Plain"),
    ):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            sk.load(tmp_path / "out", into=model)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert not any(isinstance(module, SparseLinear) for module in model.modules())


PEAK = """
import os, resource, sys
import torch
from torch import nn
import sparsekern as sk
from sparsekern import checkpoint
torch.set_num_threads(1)
def peak():
    # VmHWM falls back to what is resident when it is reset
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024
def reset():
    open("/proc/self/clear_refs", "w").write("5")
    return peak()
if sys.argv[1] == "save":
    weight = torch.randn(1024, 1024) * (torch.rand(1024, 1024) < 0.5)
    made = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, device="meta") for _ in range(96)))
    for layer in made:
        layer.weight = nn.Parameter(weight.bfloat16())
    # what the first use of everything takes
    sk.save(made[:1], sys.argv[2] + "-first")
    before = reset()
    sk.save(made, sys.argv[2])
else:
    checkpoint.verify(sys.argv[2] + "-first")
    before = reset()
    checkpoint.verify(sys.argv[2])
print(peak() - before)
"""


def test_saving_and_verifying_take_the_memory_of_a_few_tensors_and_not_of_the_model(tmp_path):
    dense = 96 * 1024 * 1024 * 2
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for step in ("save", "verify"):
        command = [sys.executable, "-c", PEAK, step, str(tmp_path / "out")]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert ran.returncode == 0, ran.stderr
        # one tensor is a ninety-sixth; what the libraries load when they are first used counts as well
        assert int(ran.stdout) < dense / 6, step


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral", "vit", "whisper"])
def test_verify_compares_with_the_model_of_the_config(name, tmp_path):
    model = prune(tiny_models.make(name))
    sk.save(model, tmp_path / "out")
    assert checkpoint.verify(tmp_path / "out").model == f"all that {type(model).__name__} needs"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 40}, r"LlamaForCausalLM needs .*weight to be .*40.*, got .*32.*not of one model"),
        (
            {"num_hidden_layers": 4},
            "LlamaForCausalLM needs model.layers.3.self_attn.q_proj.weight, which is not",
        ),
        ({"num_hidden_layers": "x"}, "cannot load model"),
        ({"model_type": "nothing"}, "cannot load model"),
    ],
)
def test_a_config_of_another_model_is_refused(changed, message, tmp_path):
    sk.save(prune(tiny_models.llama()), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.verify(tmp_path / "out", hashes=False)
    assert "\n" not in str(error.value)


def test_names_that_no_model_has_are_said_not_to_be_compared(tmp_path):
    sk.save(prune(tiny_models.llama()), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    report = checkpoint.verify(tmp_path / "out", hashes=False)
    assert "not compared with LlamaForCausalLM as a whole: it has no model.layers.2." in report.model
    sk.save(plain(), tmp_path / "plain")
    assert "config.json names none of transformers' own" in checkpoint.verify(tmp_path / "plain").model
