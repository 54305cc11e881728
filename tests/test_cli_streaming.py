"""sparsekern prune on a local checkpoint: it goes on where it was interrupted, and says why where it cannot."""

import errno

import pytest
from typer.testing import CliRunner

from sparsekern.cli import app
from sparsekern.demo import MODEL
from tests.killed import stop_after
from tests.pruned_directories import shards

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--method", "wanda", "--pattern", "50%", "--samples", "2", "--seqlen", "64")


def prune(output, *more):
    arguments = ("prune", MODEL, "--calibration", MODEL / "calibration.txt", "-o", output, *SMALL, *more)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """An output of which two blocks are done."""
    stop_after(monkeypatch, blocks=2)
    result = prune(tmp_path / "out")
    monkeypatch.undo()
    assert result.exit_code == 130
    assert "interrupted: 2 of 4 blocks are kept in" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    return tmp_path / "out"


def test_the_same_command_goes_on_and_writes_what_one_run_would(interrupted, tmp_path):
    result = prune(interrupted)
    assert result.exit_code == 0, result.stderr
    assert "28 layers, sparsity 50.00%" in result.stdout
    assert prune(tmp_path / "other").exit_code == 0
    assert shards(interrupted) == shards(tmp_path / "other")
    names = [{path.name for path in output.iterdir()} for output in (interrupted, tmp_path / "other")]
    assert names[0] == names[1] >= {"README.md", "sparsekern.json", "config.json", "tokenizer.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


def test_another_setting_is_refused_until_it_is_told_to_start_over(interrupted):
    result = prune(interrupted, "--seed", "1")
    assert result.exit_code == 2
    assert "cannot go on, because calibration, sha256 was" in result.stderr
    assert "(--restart)" in result.stderr
    assert prune(interrupted, "--seed", "1", "--restart").exit_code == 0


def test_perplexity_is_that_of_what_is_on_the_disk(interrupted, tmp_path):
    text = tmp_path / "heldout.txt"
    text.write_text((MODEL / "heldout.txt").read_text()[:4000])
    result = prune(interrupted, "--heldout", text)
    assert result.exit_code == 0, result.stderr
    perplexity = next(line for line in result.stdout.splitlines() if line.startswith("perplexity"))
    before, after = (part.split()[0] for part in perplexity.removeprefix("perplexity").split("->"))
    for directory, figure in ((MODEL, before), (interrupted, after)):
        measured = CliRunner().invoke(app, ["eval", str(directory), "--text", str(text), "--seqlen", "64"])
        assert measured.stdout.split()[1] == figure


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--pattern", "2:4", "--permute"), "--permute moves channels of all layers"),
        (("--method", "magnitude", "--scope", "model"), 'scope "model" ranks the weights of all layers at once'),
    ],
    ids=["permute", "scope"],
)
def test_what_needs_the_whole_model_says_so(more, words, tmp_path):
    result = prune(tmp_path / "out", *more)
    assert result.exit_code == 0, result.stderr
    assert f"the whole model is in memory, and a run that is killed starts over: {words}" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_full_disk_is_one_line_and_the_command_goes_on_when_there_is_room(tmp_path, monkeypatch):
    stop_after(monkeypatch, blocks=1, error=OSError(errno.ENOSPC, "No space left on device"))
    result = prune(tmp_path / "out")
    monkeypatch.undo()
    assert result.exit_code == 2
    assert "No space left on device: 1 of 4 blocks are kept in" in result.stderr
    assert prune(tmp_path / "out").exit_code == 0


def test_a_run_without_writing_leaves_nothing(tmp_path):
    result = prune(tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "nothing was written" in result.stdout
    assert list(tmp_path.iterdir()) == []
