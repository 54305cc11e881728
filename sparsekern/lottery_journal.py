"""lottery_journal: the rounds of a search for a ticket in a directory, so that a killed one goes on where it was.

    journal.json              settings, and each finished round with its counts and metrics
    theta.safetensors         what is rewound to
    round-NN.safetensors      the trained weights of a round, and for each pruned weight the round that it went before

A file is written under another name, synced and renamed, and only then does the journal name it with its sha256: what
the journal names is whole, and what it does not name is written again. No pickle.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsekern.publish import lock

FORMAT_VERSION = 1
NAME = "journal.json"


class Journal:
    """The record of one run; `rounds` holds what each finished round was recorded with."""

    def __init__(self, directory: Path, content: dict[str, Any]):
        self._directory, self._content = directory, content

    @classmethod
    @contextmanager
    def open(cls, directory: str | Path, settings: Mapping[str, Any]) -> Iterator["Journal"]:
        """The journal of `directory`, begun if there is none; while it is open no other process writes there.

        settings  all that decides the result, as JSON has it

        Raises ValueError when it was begun with other settings, or by another version, or is no journal; RuntimeError
        when another process has it open.
        """
        directory, settings = Path(directory), json.loads(json.dumps(settings))
        with lock(directory):
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / NAME
            if not path.exists():
                journal = cls(directory, {"format_version": FORMAT_VERSION, "settings": settings, "rounds": []})
                journal._write()
            else:
                journal = cls(directory, _read(path))
                _compare(directory, journal._content["settings"], settings)
            yield journal

    @classmethod
    def read(cls, directory: str | Path) -> "Journal":
        """The journal of `directory` as it is, to look at. Raises ValueError when there is none."""
        path = Path(directory) / NAME
        if not path.is_file():
            raise ValueError(f"{str(directory)!r} holds no {NAME}: no search was recorded there")
        return cls(path.parent, _read(path))

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return self._content["rounds"]

    def record(self, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Append a round."""
        file = f"round-{len(self.rounds):02}.safetensors"
        self.rounds.append({**entry, "file": file, "sha256": self._save(file, tensors)})
        self._write()

    def tensors(self, number: int) -> dict[str, Tensor]:
        """What round `number` was recorded with. Raises ValueError when the file is not the one that was written."""
        entry = self.rounds[number]
        return self._load(entry["file"], entry["sha256"])

    def record_theta(self, theta: Mapping[str, Tensor]) -> None:
        """What is rewound to."""
        self._content["theta"] = {"file": "theta.safetensors", "sha256": self._save("theta.safetensors", theta)}
        self._write()

    def theta(self) -> dict[str, Tensor] | None:
        """None before it was recorded. Raises ValueError as `tensors` does."""
        entry = self._content.get("theta")
        return None if entry is None else self._load(entry["file"], entry["sha256"])

    def _save(self, file: str, tensors: Mapping[str, Tensor]) -> str:
        # tied tensors share memory, which safetensors refuses: each is written for itself
        data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
        replace_file(self._directory / file, data)
        return hashlib.sha256(data).hexdigest()

    def _load(self, file: str, sha256: str) -> dict[str, Tensor]:
        path = self._directory / file
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is gone, and {NAME} names it; remove the directory and begin anew")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(
                f"{str(path)!r} is not the file that {NAME} names: its sha256 differs; remove the directory and begin "
                "anew"
            )
        try:
            return load(data)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no safetensors file: {error}") from error

    def _write(self) -> None:
        replace_file(self._directory / NAME, (json.dumps(self._content, indent=1) + "\n").encode())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("rounds"), list) or "settings" not in content:
        raise ValueError(f"{str(path)!r} is no journal of a search for a ticket; choose another directory")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format_version {content.get('format_version')!r}, this version reads {FORMAT_VERSION}"
        )
    return content


def _compare(directory: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in dict.fromkeys([*begun, *now]):
        if begun.get(name) != now.get(name):
            raise ValueError(
                f"{str(directory)!r} was begun with {name} = {begun.get(name)!r}, now it is {now.get(name)!r}; choose "
                "another directory, or go on with the same settings"
            )


def replace_file(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, also after a power cut."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
