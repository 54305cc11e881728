"""README: its Python runs as it stands, on the shipped model in place of one from the hub."""

import re
from pathlib import Path

from sparsekern.cli import app
from sparsekern.demo import MODEL

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    # enough for a few windows
    (tmp_path / "heldout.txt").write_text((MODEL / "heldout.txt").read_text()[:20_000])
    changes = {
        "meta-llama/Llama-3.2-1B": str(MODEL),
        '"calibration.txt"': repr(str(MODEL / "calibration.txt")),
        '"heldout.txt"': repr(str(tmp_path / "heldout.txt")),
        "seqlen=2048, count=128": "seqlen=64, count=4",
        "max_steps=200": "max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True",
    }
    for written, here in changes.items():
        assert written in code
        code = code.replace(written, here)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "ADMM 2:4: 28 layers, sparsity 50.00%" in shown
    assert "perplexity" in shown
    assert (tmp_path / "pruned/model.safetensors").exists()
    assert (tmp_path / "packed/sparsekern-00001-of-00001.safetensors").exists()
    assert (tmp_path / "tuned/checkpoint-2/model.safetensors").exists()


def test_every_command_that_it_names_is_there():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"(?:^ {4}|  |`)sparsekern ([a-z]+)", README, re.MULTILINE))
    assert len(named) >= 5
    assert named <= commands
