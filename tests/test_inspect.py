"""inspect(): reads what a checkpoint holds, dense or packed, and says when it cannot."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsekern as sk
from sparsekern import hf
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.inspect import inspect
from sparsekern.pattern import NM, Unstructured
from tests import tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (NM(1, 4), "1:4"),
        (NM(2, 4), "2:4"),
        (NM(4, 8), "4:8"),
        (Unstructured(0.6), "unstructured"),
        (Unstructured(0), "dense"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_finds_the_pattern_and_the_bytes_that_packing_takes(tmp_path, pattern, found, dtype):
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    weight = weight.where(pattern.mask(weight.abs()), 0.0).to(dtype)
    save_file({"a.weight": weight, "a.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    (report,) = inspect(tmp_path)
    assert (report.name, report.shape, report.pattern) == ("a.weight", (24, 64), found)
    assert (report.format, report.transposed) == ("dense", False)
    assert report.sparsity == pytest.approx(pattern.sparsity, abs=1 / weight.numel())
    packed = [Bitmap.pack(weight).nbytes]
    if found in ("1:4", "2:4"):
        packed.append(SemiStructured.pack(weight).nbytes)
    assert report.packed_bytes == min(*packed, weight.nbytes)
    assert report.bytes == weight.nbytes


def test_a_directory_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        inspect(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no safetensors"):
        inspect(tmp_path)


def test_a_broken_file_is_refused_with_its_name(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors' cannot be read"):
        inspect(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "llama4", "mixtral", "llama", "clip"])
def test_n_m_is_found_along_the_inputs_however_the_weight_lies(tmp_path, name):
    model = tiny_models.make(name)
    sk.prune(model, sk.Magnitude(), "2:4")
    hf.save(model, None, tmp_path / "out", {})
    reports = {report.name: report for report in inspect(tmp_path / "out")}
    pruned = {name for name, report in reports.items() if report.pattern == "2:4"}
    assert not any(":" in report.pattern for name, report in reports.items() if name not in pruned)
    # as many weights as the report of pruning says, under whatever names they were saved
    weights = sum(hf.weight(layer).numel() for _, layer in hf.layers(model))
    assert sum(torch.Size(reports[name].shape).numel() for name in pruned) == weights
    assert {reports[name].sparsity for name in pruned} == {0.5}
    transposed = {
        name.rpartition(".")[2] if "experts" in name else "weight" for name in pruned if reports[name].transposed
    }
    assert transposed == {"gpt2": {"weight"}}.get(
        name, {"down_proj", "gate_up_proj"} if name in ("gpt_oss", "llama4") else set()
    )
    for report in reports.values():
        assert len(report.shape) == 2 or "expert" in report.name
        packable = len(report.shape) == 2 and not report.transposed and report.pattern == "2:4"
        assert (report.packed_bytes < report.bytes) == packable


def test_another_prefix_than_the_models_own_hides_nothing(tmp_path):
    """GPT-2 on the hub calls its layers h.0, the model transformer.h.0."""
    model = tiny_models.make("gpt2")
    sk.prune(model, sk.Magnitude(), "2:4")
    hf.save(model, None, tmp_path / "out", {})
    file = tmp_path / "out" / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file)
    reports = {report.name: report for report in inspect(tmp_path / "out")}
    assert reports["h.0.attn.c_attn.weight"].transposed
    assert reports["h.0.attn.c_attn.weight"].pattern == "2:4"
    assert not reports["wte.weight"].transposed


def test_without_a_config_that_can_be_read_inputs_come_last(tmp_path):
    weight = torch.randn(24, 64)
    weight = weight.where(NM(2, 4).mask(weight.abs()), 0.0)
    save_file(
        {"transformer.h.0.attn.c_attn.weight": weight, "conv.weight": torch.ones(2, 3, 4)},
        tmp_path / "model.safetensors",
    )
    for config in (None, "{", "[]", '{"model_type": "no such"}'):
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        (report,) = inspect(tmp_path)
        assert (report.pattern, report.transposed) == ("2:4", False)


@pytest.mark.parametrize("pattern", ["2:4", "60%"])
def test_a_packed_checkpoint_is_listed_with_its_format_and_what_it_takes(tmp_path, pattern):
    model = tiny_models.make("llama").bfloat16()
    sk.prune(model, sk.Magnitude(), pattern)
    hf.save(model, None, tmp_path / "dense", {})
    sk.save(model, tmp_path / "packed")
    dense = {report.name: report for report in inspect(tmp_path / "dense")}
    packed = {report.name: report for report in inspect(tmp_path / "packed")}
    assert packed.keys() == dense.keys()
    stored = {name: report.format for name, report in packed.items() if report.format != "dense"}
    assert set(stored.values()) == {"2:4" if pattern == "2:4" else "bitmap"}
    assert len(stored) == len(hf.layers(model))
    for name, report in packed.items():
        other = dense[name]
        assert (report.shape, report.dtype, report.sparsity) == (other.shape, other.dtype, other.sparsity)
        assert report.pattern == other.pattern
        assert report.bytes == report.packed_bytes == (other.packed_bytes if name in stored else other.bytes)


def test_a_packed_checkpoint_that_lies_is_refused(tmp_path):
    model = tiny_models.make("llama")
    sk.prune(model, sk.Magnitude(), "50%")
    sk.save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.0.mlp.up_proj"]["shape"] = [48, 40]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj"):
        inspect(tmp_path / "out")
