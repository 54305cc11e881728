"""The comparison with others' kernels: what runs anywhere runs here, and what cannot run hurts nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments):
    command = [sys.executable, str(ROOT / "bench/peers"), "--tiny", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, json.loads(ran.stdout.splitlines()[-1])


def test_the_peers_that_are_here_are_compared_and_those_that_are_not_are_named(tmp_path):
    shown, result = run("--also", "scipy_csr,openvino_sparse", "--plot", tmp_path / "peers.png")
    assert [row["tokens"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert {"torch eager", "torch CSR float32", "SciPy CSR float32"} <= row["peers"].keys()
        # the same file in a process of its own
        assert row["peers"]["SciPy CSR float32, apart"]["own_process"]
        assert not row["peers"]["SciPy CSR float32"]["own_process"]
        assert all(each["error"] < 0.05 and each["median"] > 0 for each in row["peers"].values())
        absent = {"OpenVINO bf16", "OpenVINO int8", "OpenVINO int8 sparse"} - row["peers"].keys()
        assert absent == {name for name in row["failed"] if name.startswith("OpenVINO")}
    assert "SparAMX: needs AMX" in shown
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench/peers")
    import importlib.util

    spec = importlib.util.spec_from_file_location("peers_main", ROOT / "bench/peers/__main__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peers_main", module)
    spec.loader.exec_module(module)
    return module


def test_every_file_of_a_peer_says_its_names(peers):
    others = {"__main__", "worker", "onnx_models"}
    files = {path.stem for path in (ROOT / "bench/peers").glob("*.py")} - others
    assert files > set(peers.WITHIN)
    names = [name for file in files for name in peers.names_of(file)]
    assert len(names) == len(set(names)) >= 14


def test_a_result_that_is_wrong_is_not_timed(peers, monkeypatch):
    import scipy_csr

    build = scipy_csr.build

    def spoiled(*setting):
        run, read = build(*setting)
        return run, lambda y: 1.1 * read(y)

    monkeypatch.setattr(scipy_csr, "build", spoiled)
    found = [each for each in peers.peers([]) if each[0] in ("torch eager", "SciPy CSR float32")]
    row = peers.measure((32, 64), 2, 0.5, found, 1, 8, 0, 1 << 16)
    assert row["failed"] == {"SciPy CSR float32": "its result is wrong by 10.0%"}
    assert list(row["peers"]) == ["torch eager"]


def test_a_python_that_is_not_there_is_a_reason(peers):
    eager = next(each for each in peers.peers([]) if each[0] == "torch eager")
    found = [eager, ("DeepSparse int8", "deepsparse_engine", "/nowhere/python", [])]
    row = peers.measure((32, 64), 1, 0.5, found, 1, 8, 0, 1 << 16)
    assert "/nowhere/python" in row["failed"]["DeepSparse int8"]
