"""Runs of prune_streaming() on tiny models, and what they leave, to be compared byte by byte."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsekern.streaming import prune_streaming
from tests import tiny_models


def saved(name: str, directory: Path) -> Path:
    """The tiny model `name` as a checkpoint."""
    tiny_models.make(name).save_pretrained(directory)
    return directory


def streaming_run(name: str, source: Path, output: Path, **settings: Any) -> Callable[[], Any]:
    """A call of prune_streaming() as the command line makes it, with a README.md and a report in JSON."""
    settings = {"calibration": tiny_models.batches(name)} | settings

    def run():
        return prune_streaming(source, output, files=_files, **settings)

    return run


def contents(directory: Path) -> dict[str, Any]:
    """Every file of a directory by name: its bytes, and of a report everything but its seconds."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if path.name == "sparsekern.json":
            found[path.name] = without_seconds(json.loads(path.read_text()))
        elif path.is_file():
            found[str(path.relative_to(directory))] = path.read_bytes()
    return found


def without_seconds(report: dict[str, Any]) -> dict[str, Any]:
    layers = [{key: value for key, value in layer.items() if key != "seconds"} for layer in report["layers"]]
    return {key: value for key, value in report.items() if key != "seconds"} | {"layers": layers}


def _files(report) -> dict[str, str]:
    return {"README.md": "# pruned\n", "sparsekern.json": json.dumps(report.to_json())}


def shards(directory: Path) -> dict[str, bytes]:
    """The files of weights by name."""
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}
