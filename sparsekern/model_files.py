"""model_files: the files of a dense checkpoint, model*.safetensors, read and written for some of its tensors at a time.

Tensors are read into memory of their own and never mapped: a mapped file counts as memory as far as it was touched, and
as address space as far as it reaches.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparsekern.shards import Part, Stored, read_header, read_json, write_file

INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 1 << 24


class UnreadableError(ValueError):
    """A checkpoint that may be loaded, but not a block at a time."""


def tensors_of(directory: Path) -> dict[str, Stored]:
    """The tensors of model.safetensors, or of the shards that its index names.

    Raises UnreadableError when there is neither, or when two shards hold one tensor; ValueError, naming the file, for
    anything in them that is not true.
    """
    single, index = directory / "model.safetensors", directory / INDEX
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise UnreadableError(f"{str(directory)!r} holds neither {single.name} nor {index.name}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{INDEX}: weight_map must name a file for every tensor")
    found: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not (directory / file).is_file():
            raise ValueError(f"{INDEX}: names {file!r}, which is no file of {str(directory)!r}")
        header = read_header(directory / file)
        if twice := sorted(found.keys() & header.keys()):
            # transformers takes one of them
            raise UnreadableError(f"{file}: holds {twice[0]}, which {found[twice[0]].file.name} holds too")
        found |= header
    if lost := sorted(places.keys() - found.keys()):
        raise ValueError(f"{INDEX}: names {lost[0]}, which {places[lost[0]]} does not hold")
    return found


def read(stored: Stored) -> Tensor:
    """The tensor. Raises OSError when its file has become shorter."""
    octets = torch.empty(stored.nbytes, dtype=torch.uint8)
    rest = memoryview(octets.numpy())
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.start)
        while rest:
            got = file.readinto(rest[:CHUNK_BYTES])
            if not got:
                raise OSError(
                    f"{str(stored.file)!r} ends {len(rest)} bytes too early: it has changed since the run began"
                )
            rest = rest[got:]
    return octets.view(stored.dtype).reshape(stored.shape)


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file and sync it, instead of one that may be there; returns its sha256."""
    path.unlink(missing_ok=True)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())}
    write_file(path, [Part(shapes, lambda: tensors)])
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
    return digest(path)


def digest(path: Path) -> str:
    """The sha256 of a file."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()
