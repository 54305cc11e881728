"""Ctrl-C, and two runs at once: one line, and nothing half-written."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sparsekern import hf, publish
from sparsekern.cli import app
from sparsekern.demo import MODEL
from sparsekern.methods import Wanda

pytestmark = pytest.mark.usefixtures("one_thread", "listening")

SMALL = ("--method", "wanda", "--samples", "2", "--seqlen", "64", "--json", "--skip", "model.layers.[123].*")


def prune(output, *flags):
    arguments = ("prune", MODEL, "--calibration", MODEL / "calibration.txt", "-o", output, *SMALL, *flags)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tensors(directory):
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def listening():
    """A shell starts what runs in the background deaf to Ctrl-C, and tests with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupted_in_a_layer(monkeypatch):
    """The third layer is interrupted, the first time."""
    layers, whole = [], Wanda.prune

    def prune_layer(self, *args):
        layers.append(args)
        if len(layers) == 3:
            interrupt()
        return whole(self, *args)

    monkeypatch.setattr(Wanda, "prune", prune_layer)


@pytest.fixture
def interrupted_while_saving(monkeypatch):
    """The first time, after files have been written."""
    times, whole = [], publish._sync_below

    def sync(directory):
        times.append(directory)
        if len(times) == 1:
            assert list(directory.iterdir())
            interrupt()
        whole(directory)

    monkeypatch.setattr(publish, "_sync_below", sync)


@pytest.mark.parametrize("where", ["interrupted_in_a_layer", "interrupted_while_saving"])
def test_an_interrupted_run_says_so_in_one_line_leaves_no_output_and_can_be_run_again(tmp_path, request, where):
    request.getfixturevalue(where)
    output = tmp_path / "out"
    result = prune(output)
    assert result.exit_code == 130
    kept = {"interrupted_in_a_layer": "nothing was kept", "interrupted_while_saving": "the same call goes on"}
    assert result.stderr.startswith("interrupted: ")
    assert result.stderr.endswith(f"{kept[where]}\n")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not output.exists()
    # what a streaming run keeps to go on with is hidden
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    again = prune(output)
    assert again.exit_code == 0, again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    prune(tmp_path / "other")
    first, second = (tensors(tmp_path / name) for name in ("out", "other"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("flags", [(), ("--permute",)], ids=["a block at a time", "in memory"])
def test_two_runs_on_one_directory_are_refused_before_the_work(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(Wanda, "prune", None)
    with publish.lock(tmp_path / "out"):
        result = prune(tmp_path / "out", *flags)
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert f"is being written by process {os.getpid()}: wait until it ends, or choose another" in line
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_in_the_api_leaves_the_layer_it_came_in_whole(interrupted_in_a_layer):
    """Layers that were done are pruned, the others as they were."""
    import sparsekern as sk

    model = hf.load(MODEL)
    before = {name: hf.weight(layer).clone() for name, layer in hf.layers(model)}
    with pytest.raises(KeyboardInterrupt):
        sk.prune(model, sk.Wanda(), "2:4", [torch.ones(1, 8, dtype=torch.long)])
    states = [torch.equal(hf.weight(layer), before[name]) for name, layer in hf.layers(model)]
    assert states == [False, False] + [True] * (len(states) - 2)
    for name, layer in hf.layers(model)[:2]:
        assert ((hf.weight(layer) == 0).unflatten(1, (-1, 4)).sum(dim=2) == 2).all(), name
