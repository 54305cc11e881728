"""sparsekern convert, verify and inspect: tables, JSON, and one line for what cannot be done."""

import json

import pytest
from typer.testing import CliRunner

from sparsekern import hf
from sparsekern.cli import app
from tests import tiny_models


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "dense"
    model = tiny_models.llama().bfloat16()
    for _, layer in hf.layers(model):
        hf.weight(layer).view(-1, 4)[:, [0, 2]] = 0
    hf.save(model, None, directory, {})
    return directory


def test_a_checkpoint_is_packed_verified_inspected_and_unpacked(dense, tmp_path):
    output = run("convert", dense, tmp_path / "packed", "--to", "2:4").output
    assert "21 linear layers packed, 1 left as they were: 58,944 ->" in " ".join(output.split())
    assert "lm_head" in output
    assert "it is not 2:4" in output
    output = run("verify", tmp_path / "packed").output
    assert "model.layers.0.mlp.down_proj and 20 more" in output
    assert "4 files match SHA256SUMS" in " ".join(output.split())
    assert run("inspect", tmp_path / "packed").output.count(" 2:4 ") == 42
    assert "no layer is packed" in run("convert", tmp_path / "packed", tmp_path / "again", "--to", "dense").output
    assert (tmp_path / "again" / "model.safetensors").read_bytes()


def test_json_is_all_there_is(dense, tmp_path):
    converted = json.loads(run("convert", dense, tmp_path / "packed", "--to", "bitmap", "--json").output)
    assert converted["packed"]["model.layers.0.mlp.up_proj"]["pattern"] == "50.0%"
    verified = json.loads(run("verify", tmp_path / "packed", "--no-hashes", "--json").output)
    assert verified["layers"] == converted["packed"]
    assert verified["sha256"] == {}


def test_a_file_that_changed_is_one_line_and_exit_code_2(dense, tmp_path):
    run("convert", dense, tmp_path / "packed", "--to", "bitmap")
    (tmp_path / "packed" / "generation_config.json").write_text("{}")
    output = run("verify", tmp_path / "packed", code=2).output
    assert output.startswith("error: generation_config.json: sha256 must be ")
    assert output.count("\n") == 1
    run("verify", tmp_path / "packed", "--no-hashes")
    assert "to must be one of dense" in run("convert", dense, tmp_path / "x", "--to", "csr", code=2).output
    assert "exists already" in run("convert", dense, tmp_path / "packed", "--to", "2:4", code=2).output
    assert "not a compressed checkpoint" in run("verify", dense, code=2).output
