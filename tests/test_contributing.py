"""CONTRIBUTING.md: the files that it shows work as they are written there, and their tests pass."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOWN = dict(
    re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the package with the shown files in their places."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(
        ROOT / "sparsekern", tree / "sparsekern", ignore=shutil.ignore_patterns("__pycache__", "demo_model")
    )
    for name, source in SHOWN.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(source)
    return tree


def test_the_shown_tests_pass(tree):
    tests = [name for name in SHOWN if name.startswith("tests/")]
    assert len(tests) == 3
    # the copy, not the installed package
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=.", *tests]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
def test_the_shown_files_are_formatted(tree):
    config = ["--config", ROOT / "pyproject.toml"]
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, *config, *SHOWN], cwd=tree, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_the_paths_in_the_text_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:csrc|tests|sparsekern|\.ci)/[\w./]+)`", text)) - SHOWN.keys()
    assert not [name for name in named if not (ROOT / name).exists() and "linear_24.cpp" not in name]
