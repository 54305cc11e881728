"""shards: safetensors files of bounded size, written tensor by tensor, and read only where every number is true.

A file is 8 bytes, the little-endian length N of the header; N bytes of JSON, {name: {dtype, shape, data_offsets}}; and
the data. Offsets count from the end of the header, and the data has neither gaps nor overlaps.

Source: https://huggingface.co/docs/safetensors
"""

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 4_000_000_000
# what the safetensors library itself accepts
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 2**63 - 1
DAMAGED = "the file is damaged or was changed: fetch it or save it again"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes start..end of `file`, counted from its beginning."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Part:
    """Tensors that are made together and lie in one shard: the fields of a packed layer, or a single tensor.

    tensors  name -> dtype and shape, known before they are made
    make     returns them by name
    """

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())


def write(directory: Path, stem: str, parts: Iterable[Part], shard_bytes: int) -> dict[str, Any]:
    """Write `parts` to `stem`-00001-of-0000N.safetensors, at most `shard_bytes` a file, or one part where that is more.

    The parts are sorted by name, layers.2 before layers.10, whatever their order. Each is made when its turn comes and
    freed when it is written. Returns the index of the shards, {"metadata":
    {"total_size"}, "weight_map"}, as transformers reads it. Raises ValueError for a limit below one byte, and for a
    name that two parts have.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    shards, size = [[]], 0
    for part in sorted(parts, key=_natural):
        if shards[-1] and size + part.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.nbytes
    # of no part at all there is no shard
    shards = [shard for shard in shards if shard]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        for name in (name for part in shard for name in part.tensors):
            if name in weight_map:
                raise ValueError(f"two tensors are called {name!r}")
            weight_map[name] = file
        write_file(directory / file, shard)
    total = sum(part.nbytes for shard in shards for part in shard)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def write_file(path: Path, parts: Iterable[Part]) -> None:
    """Write one safetensors file, part by part."""
    parts = list(parts)
    declared = [(name, *what) for part in parts for name, what in part.tensors.items()]
    # the widest first, so that every tensor is aligned; sorting keeps the order otherwise
    declared.sort(key=lambda entry: -entry[1].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in declared:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    # a mode that fails where a file is, whatever wrote it
    with open(path, "xb", buffering=0) as file:
        os.truncate(file.fileno(), data + offset)
        _write_at(file.fileno(), len(text).to_bytes(8, "little") + text, 0)
        for part in parts:
            made = part.make()
            for name, (dtype, shape) in part.tensors.items():
                tensor = made[name]
                if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                    raise RuntimeError(
                        f"{name} must be {list(shape)} of {dtype}, got {list(tensor.shape)} of {tensor.dtype}: "
                        "it was changed while it was saved"
                    )
                _write_at(file.fileno(), bytes_of(tensor), data + header[name]["data_offsets"][0])
            # before the next part is made
            del made, tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of `tensor`, row by row; no copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name, in the order in which they lie.

    Raises ValueError naming the file, the tensor, the rule and the value when anything in its header is not true.
    """
    file = path.name
    length = path.stat().st_size
    with path.open("rb") as opened:
        prefix = opened.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{file}: must hold at least the 8 bytes of its header's length, got {length}; {DAMAGED}")
        size = int.from_bytes(prefix, "little")
        if size > min(MAX_HEADER_BYTES, length - 8):
            raise ValueError(
                f"{file}: its header must fit in the file's {length:,} bytes and in {MAX_HEADER_BYTES:,}, "
                f"got a length of {size:,}; {DAMAGED}"
            )
        text = opened.read(size)
    header = parse_json(text, f"{file}: its header")
    metadata = header.pop("__metadata__", {})
    if not _is_texts(metadata):
        raise ValueError(f"{file}: __metadata__ must hold texts, got {_short(metadata)}; {DAMAGED}")
    tensors = {name: _stored(path, name, entry, 8 + size, length) for name, entry in header.items()}
    # of two that begin at one byte, the empty one lies first
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    at, before = 8 + size, "the header"
    for name, stored in tensors.items():
        if stored.start != at:
            what = "overlap" if stored.start < at else "leave a gap"
            raise ValueError(
                f"{file}: tensors must lie end to end, but {name} and {before} {what}: data_offsets begin at "
                f"{stored.start - 8 - size}, expected {at - 8 - size}; {DAMAGED}"
            )
        at, before = stored.end, name
    if at != length:
        raise ValueError(
            f"{file}: must end with its last tensor at byte {at:,}, got {length:,} bytes: "
            f"{'cut short' if length < at else 'it has more'}; {DAMAGED}"
        )
    return tensors


class Reader:
    """Tensors of validated headers, as views of the mapped files; use it as a context manager.

    A view is valid while the reader is open: what stays must be copied. `forget` gives its pages back. A file that
    another process cuts short meanwhile ends this one by a bus error, as it does with the safetensors library.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        # closing a map is an error while a view of it lives; without a reference it goes with its last view
        self._maps.clear()

    def read(self, stored: Stored) -> Tensor:
        """The tensor as it is stored."""
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=stored.dtype)
        if stored.file not in self._maps:
            with stored.file.open("rb") as file:
                # a private copy, because torch has no read-only tensors; nothing is ever written to it
                self._maps[stored.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped = self._maps[stored.file]
        if stored.end > len(mapped):
            raise ValueError(f"{stored.file.name}: was cut short while it was read, to {len(mapped):,} bytes")
        data = torch.frombuffer(mapped, dtype=torch.uint8, count=stored.nbytes, offset=stored.start)
        if stored.start % stored.dtype.itemsize:
            # a view must be aligned
            data = data.clone()
        return data.view(stored.dtype).view(stored.shape)

    def forget(self) -> None:
        """Give back the memory of what `read` returned so far; where it is used again it is read again."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file for anything else, and for a huge one."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path.name}: must have at most {MAX_JSON_BYTES:,} bytes, got {size:,}; {DAMAGED}")
    return parse_json(path.read_bytes(), path.name)


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object whose keys are unique, at every depth. Raises ValueError, beginning with `where`."""
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}; {DAMAGED}") from error
    if type(parsed) is not dict:
        raise ValueError(f"{where} must be a JSON object, got {_short(parsed)}; {DAMAGED}")
    return parsed


def shape_of(value: Any) -> tuple[int, ...] | None:
    """A JSON list of sizes as a shape; None when it is none that a tensor can have."""
    if type(value) is not list or len(value) > MAX_DIMENSIONS:
        return None
    if any(type(size) is not int or size < 0 for size in value):
        return None
    # zeros do not make the others small
    return tuple(value) if math.prod(size or 1 for size in value) <= MAX_ELEMENTS else None


def _stored(path: Path, name: str, entry: Any, data: int, length: int) -> Stored:
    def refuse(rule: str, value: Any) -> ValueError:
        return ValueError(f"{path.name}: {name}: {rule}, got {_short(value)}; {DAMAGED}")

    if not name.isprintable() or not name:
        raise ValueError(f"{path.name}: names must be printable, got {_short(name)}; {DAMAGED}")
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("must have dtype, shape and data_offsets", entry)
    if type(entry["dtype"]) is not str or entry["dtype"] not in DTYPES:
        raise refuse(f"dtype must be one of {', '.join(DTYPES)}", entry["dtype"])
    dtype, shape, offsets = DTYPES[entry["dtype"]], shape_of(entry["shape"]), entry["data_offsets"]
    if shape is None:
        raise refuse("shape must be sizes of a tensor", entry["shape"])
    if type(offsets) is not list or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise refuse("data_offsets must be two whole numbers", offsets)
    if not 0 <= offsets[0] <= offsets[1] <= length - data:
        raise refuse(f"data_offsets must ascend within the file's {length - data:,} bytes of data", offsets)
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise refuse(f"data_offsets must span the {expected:,} bytes of {list(shape)} {entry['dtype']}", offsets)
    return Stored(path, dtype, shape, data + offsets[0], data + offsets[1])


def _natural(part: Part) -> list[tuple[str, int]]:
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", next(iter(part.tensors)))]


def _write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        # one call writes at most 2 GB
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice!r} is there twice")
    return made


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _is_texts(value: Any) -> bool:
    return type(value) is dict and all(type(entry) is str for entry in value.values())


def _short(value: Any) -> str:
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def in_order(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, Stored]]:
    """Tensors as they lie on the disk, file by file."""
    yield from sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start, item[1].end))
