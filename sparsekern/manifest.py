"""manifest: what a compressed checkpoint says it holds, read and checked before any tensor is.

    config.json                            quantization_config names each packed layer: format, shape, pattern, dtype
    sparsekern-00001-of-0000N.safetensors  L.values, L.bitmap, L.row_offsets of a bitmap layer L, L.scales if it is
                                           int8; L.values, L.metadata of a 2:4 one; every other tensor under its
                                           own name, tied ones once
    sparsekern.safetensors.index.json      which shard holds which tensor, as transformers reads it
    SHA256SUMS                             of every other file, as sha256sum writes it

No file is called model*.safetensors: a transformers without this package finds no weights, instead of random ones.
Hidden files are no part of it, and a link may leave the directory only for the blobs of the hub's own cache.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekern.formats import SemiStructured
from sparsekern.packed_layer import CONFIG, FIELDS, Packed, PackedLayer, check_packed, pattern_of, read_layer
from sparsekern.shards import DAMAGED, SHARD_BYTES, Part, Reader, Stored, read_header, read_json, write

QUANT_METHOD = "sparsekern"
FORMAT_VERSION = 1
STEM = "sparsekern"
INDEX = "sparsekern.safetensors.index.json"
SUMS = "SHA256SUMS"
_SHARD = re.compile(rf"{STEM}-(\d{{5}})-of-(\d{{5}})\.safetensors")
_SUM = re.compile(r"([0-9a-f]{64})  ([^\\\n]+)")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """A compressed checkpoint whose files fit together; the contents of its tensors were not looked at.

    config   config.json
    layers   the packed layers, by name
    tensors  where each stored tensor lies, by name: the fields of the packed layers and every other tensor
    """

    directory: Path
    config: dict[str, Any]
    layers: dict[str, PackedLayer]
    tensors: dict[str, Stored]

    def fields(self, name: str) -> dict[str, Stored]:
        """The stored fields of the packed layer `name`, by field."""
        return {field: self.tensors[f"{name}.{field}"] for field in FIELDS[self.layers[name].format]}

    def others(self) -> dict[str, Stored]:
        """The tensors that are no fields of a packed layer."""
        fields = {f"{name}.{field}" for name, layer in self.layers.items() for field in FIELDS[layer.format]}
        return {name: stored for name, stored in self.tensors.items() if name not in fields}

    def packed(self, name: str, reader: Reader) -> Packed:
        """The packed layer `name`, validated, as views of the mapped file.

        Raises ValueError naming the layer and what contradicts in it.
        """
        fields = {field: reader.read(stored) for field, stored in self.fields(name).items()}
        packed = self.layers[name].packed(fields)
        try:
            check_packed(packed)
        except ValueError as error:
            raise ValueError(f"{self.tensors[f'{name}.values'].file.name}: {name}: {error}; {DAMAGED}") from error
        return packed


def quantization_config(layers: Mapping[str, PackedLayer]) -> dict[str, Any]:
    """The entry of config.json."""
    entries = {name: layer.to_json() for name, layer in layers.items()}
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "layers": entries}


def read_manifest(directory: str | Path) -> Manifest:
    """What the compressed checkpoint in `directory` holds, by its config, its index and the headers of its shards.

    Checked are the format's version, every file against the index, every header against its file's length, and the
    dtype and shape of every packed field against config.json. Raises ValueError naming file, tensor, rule and value.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"no such directory: {str(directory)!r}")
    files = set(files_below(directory))
    for needed in (CONFIG, INDEX):
        if needed not in files:
            raise ValueError(f"{str(directory)!r} is not a compressed checkpoint: it holds no {needed}")
    config = read_json(directory / CONFIG)
    layers = read_layers(config)
    weight_map, total_size = _read_index(directory)
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    _same(INDEX, "the directory", "shards", weight_map.values(), shards)
    tensors: dict[str, Stored] = {}
    for shard in shards:
        header = read_header(directory / shard)
        _same(INDEX, shard, "tensors", {n for n, file in weight_map.items() if file == shard}, header)
        tensors |= header
    if (size := sum(stored.nbytes for stored in tensors.values())) != total_size:
        raise ValueError(f"{INDEX}: total_size must be the {size:,} bytes of its tensors, got {total_size}; {DAMAGED}")
    for name, layer in layers.items():
        _check_fields(name, layer, tensors)
    _refuse_unnamed(layers, tensors)
    return Manifest(directory, config, layers, tensors)


def read_layers(config: Mapping[str, Any]) -> dict[str, PackedLayer]:
    """The packed layers of a config.json. Raises ValueError when it is no compressed checkpoint's, or a newer one's."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if type(quantization) is dict else None
    if method != QUANT_METHOD:
        raise ValueError(
            f"{CONFIG}: quantization_config must have quant_method {QUANT_METHOD!r}, got {method!r}: "
            "this is not a compressed checkpoint of sparsekern"
        )
    version = quantization.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{CONFIG}: format_version must be a whole number from 1, got {version!r}; {DAMAGED}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{CONFIG}: format_version {version} is newer than {FORMAT_VERSION}, the newest that is read here: "
            "update sparsekern"
        )
    entries = quantization.get("layers")
    if type(entries) is not dict:
        raise ValueError(f"{CONFIG}: quantization_config must have layers by name, got {entries!r:.80}; {DAMAGED}")
    return {name: read_layer(name, entry) for name, entry in entries.items()}


def write_compressed(
    directory: Path, layers: Mapping[str, PackedLayer], parts: Iterable[Part], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the shards and their index, complete config.json, and sum every file that is there: the last step.

    Raises ValueError for what could be written and not be read again, such as a name with a line break.
    """
    index = write(directory, STEM, parts, shard_bytes)
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = read_json(directory / CONFIG) | {"quantization_config": quantization_config(layers)}
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    try:
        read_manifest(directory)
    except ValueError as error:
        raise ValueError(f"cannot be stored: {str(error).removesuffix(f'; {DAMAGED}')}") from error
    write_sums(directory)


def write_sums(directory: Path) -> None:
    """Write SHA256SUMS over every other file of `directory`."""
    names = sorted(files_below(directory))
    if strange := [name for name in names if not _SUM.fullmatch(f"{'0' * 64}  {name}")]:
        raise ValueError(f"the names of files must have no backslash and no line break, got {strange[0]!r}")
    sums = "".join(f"{digest}  {name}\n" for name, digest in sha256(directory, names).items())
    (directory / SUMS).write_text(sums, encoding="utf-8")


def check_sums(directory: Path) -> dict[str, str]:
    """The sha256 of every file of `directory` but SHA256SUMS, which must say the same.

    Raises ValueError naming the first file that differs, is missing, or is not listed.
    """
    if SUMS not in os.listdir(directory):
        raise ValueError(
            f"{str(directory)!r} holds no {SUMS}, so nothing says whether its files are whole: fetch it, or pass "
            "hashes=False to go without"
        )
    # also refuses a link that leaves the directory
    regular(directory, SUMS)
    listed: dict[str, str] = {}
    text = (directory / SUMS).read_bytes().decode(errors="replace")
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        matched = _SUM.fullmatch(line)
        if not matched or matched[2] in listed:
            raise ValueError(f"{SUMS}: line {number} must be a sha256, two spaces and a new name; {DAMAGED}")
        listed[matched[2]] = matched[1]
    if not text.endswith("\n"):
        raise ValueError(f"{SUMS}: must end with a line break; {DAMAGED}")
    there = set(files_below(directory))
    _same(SUMS, "the directory", "files", listed, there & listed.keys())
    if added := sorted(there - listed.keys()):
        more = f" and {len(added) - 1} more" if len(added) > 1 else ""
        raise ValueError(
            f"{SUMS} must list every file, but only the directory has {added[0]!r:.80}{more}: added since it was "
            "written; remove it, give sparsekern.save the tokenizer and files, or pass hashes=False to go without"
        )
    digests = sha256(directory, sorted(listed))
    if changed := [name for name in sorted(listed) if digests[name] != listed[name]]:
        more = f" ({len(changed)} files like this)" if len(changed) > 1 else ""
        raise ValueError(
            f"{changed[0]}: sha256 must be {listed[changed[0]]}, got {digests[changed[0]]}{more}; {DAMAGED}"
        )
    return digests


def sha256(directory: Path, names: list[str]) -> dict[str, str]:
    """The sha256 of each of `names` in `directory`, several at a time."""
    with ThreadPoolExecutor(min(len(names), os.cpu_count() or 1) or 1) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(directory / name), names), strict=True))


def _digest(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()


def files_below(directory: Path) -> Iterator[str]:
    """Every regular file below `directory` but SHA256SUMS and what is hidden, as its path from there."""
    for folder, inner, names in os.walk(directory):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in [*names, *(name for name in inner if os.path.islink(os.path.join(folder, name)))]:
            path = os.path.relpath(os.path.join(folder, name), directory)
            if not name.startswith(".") and path != SUMS:
                regular(directory, path)
                yield path


def regular(directory: Path, name: str) -> None:
    """Raises ValueError for what is no file, and for a link that leaves the directory."""
    path = directory / name
    # Path.resolve() raises RuntimeError for a link to itself, up to Python 3.12
    real, root = Path(os.path.realpath(path)), directory.resolve()
    # the hub keeps a snapshot's files beside it, under their hashes
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if not real.is_relative_to(root) and real.parent != blobs:
        raise ValueError(f"{name!r} must not leave the directory, got a link to {str(real)!r}")
    if not real.exists() or not stat.S_ISREG(real.stat().st_mode):
        raise ValueError(f"{name!r} must be a file, got {'something else' if real.exists() else 'a dangling link'}")


def _read_index(directory: Path) -> tuple[dict[str, str], int]:
    index = read_json(directory / INDEX)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if type(weight_map) is not dict or type(metadata) is not dict or type(metadata.get("total_size")) is not int:
        raise ValueError(f"{INDEX}: must have a weight_map and a metadata with total_size; {DAMAGED}")
    files = set()
    for name, file in weight_map.items():
        if type(file) is not str or not _SHARD.fullmatch(file):
            raise ValueError(
                f"{INDEX}: {name!r:.80} must lie in {STEM}-00001-of-0000N.safetensors of this directory, "
                f"got {file!r:.80}; {DAMAGED}"
            )
        files.add(file)
    expected = {f"{STEM}-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)}
    _same(INDEX, "its own numbering", "shards", files, expected)
    return weight_map, metadata["total_size"]


def _check_fields(name: str, layer: PackedLayer, tensors: Mapping[str, Stored]) -> None:
    """Raises ValueError when the stored fields of `layer` are not what config.json says."""
    for field in FIELDS[layer.format]:
        if f"{name}.{field}" not in tensors:
            raise ValueError(
                f"{INDEX}: {name} is packed as {layer.format.name}, but {name}.{field} is missing; {DAMAGED}"
            )
    if f"{name}.weight" in tensors:
        raise ValueError(f"{INDEX}: {name} is packed, so {name}.weight must not be there; {DAMAGED}")
    values = tensors[f"{name}.values"]
    kept = values.shape[0] if len(values.shape) == 1 else 0
    for field, (dtype, shape) in layer.tensors(kept).items():
        stored = tensors[f"{name}.{field}"]
        if stored.dtype != dtype or stored.shape != shape:
            raise ValueError(
                f"{stored.file.name}: {name}.{field} must be {list(shape)} of {dtype} by {CONFIG}, "
                f"got {list(stored.shape)} of {stored.dtype}; {DAMAGED}"
            )
    if layer.format is not SemiStructured and kept > layer.shape[0] * layer.shape[1]:
        raise ValueError(f"{CONFIG}: {name}: shape {list(layer.shape)} cannot hold {kept:,} values; {DAMAGED}")
    if layer.pattern != (expected := pattern_of(layer.format, layer.shape, kept)):
        raise ValueError(f"{CONFIG}: {name}: pattern must be {expected!r}, got {layer.pattern!r:.80}; {DAMAGED}")
    bias = tensors.get(f"{name}.bias")
    if bias is not None and bias.shape != layer.shape[:1]:
        raise ValueError(f"{bias.file.name}: {name}.bias must be {[layer.shape[0]]}, got {list(bias.shape)}; {DAMAGED}")


def _refuse_unnamed(layers: Mapping[str, PackedLayer], tensors: Mapping[str, Stored]) -> None:
    """Raises ValueError for a packed layer that config.json does not name."""
    for name in tensors:
        layer, _, field = name.rpartition(".")
        if field == "values" and layer not in layers and {f"{layer}.bitmap", f"{layer}.metadata"} & tensors.keys():
            raise ValueError(f"{CONFIG}: {layer} is stored packed, but quantization_config does not name it; {DAMAGED}")


def _same(first_place: str, second_place: str, what: str, first: Iterable[str], second: Iterable[str]) -> None:
    """Raises ValueError naming what only one of two places has."""
    first, second = set(first), set(second)
    for place, only in ((first_place, first - second), (second_place, second - first)):
        if only:
            more = f" and {len(only) - 1} more" if len(only) > 1 else ""
            raise ValueError(
                f"{first_place} and {second_place} must have the same {what}, but only {place} has "
                f"{min(only)!r:.80}{more}; {DAMAGED}"
            )
