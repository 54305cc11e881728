"""convert: a checkpoint on the disk packed, repacked or unpacked, a tensor at a time; no model is built.

Every bit of every weight stays, but for -0.0 in a weight that is packed, which becomes +0.0, and for bitmap_int8, which
rounds.
"""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import nn

from sparsekern import hf
from sparsekern.formats import BitmapInt8
from sparsekern.manifest import QUANT_METHOD, files_below, write_compressed
from sparsekern.model_files import INDEX
from sparsekern.packed_layer import CONFIG, FORMATS, Packed, PackedLayer
from sparsekern.packing import PackReport, choose, pack, part_of
from sparsekern.publish import publish
from sparsekern.shards import SHARD_BYTES, Part, Reader, Stored, write
from sparsekern.sources import Source, SourceLayer, open_source

T = TypeVar("T")
DENSE, DENSE_FILE = "dense", "model.safetensors"
# other copies of the weights, which would be those of before; and pickles, which are never passed on
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl")


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    layers: Iterable[str] | None = None,
    hashes: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> PackReport:
    """Write the checkpoint in `source` to `target` in another form; tokenizer and configs come along.

    source  a compressed checkpoint, sparse-24-bitmask or sparse-bitmask of compressed-tensors, or dense safetensors
    to      "dense" for a checkpoint that plain transformers loads; "2:4" or "bitmap" for a compressed one, in which the
            linear layers are packed so that hold that format and where that pays, and the others stay as they were;
            "bitmap_int8" rounds the kept weights to 8 bits with a scale a row
    layers  the names of the nn.Linear layers; None asks transformers for the model that config.json names
    hashes  check the source's files against its SHA256SUMS, where it has them

    `target` appears by one rename, complete or not at all. Raises FileExistsError when it exists already, and
    ValueError for another `to`, for a source that is none of these or whose files lie, and where no layer holds it.
    """
    if to not in (DENSE, *FORMATS):
        raise ValueError(f"to must be one of {DENSE}, {', '.join(FORMATS)}, got {to!r}")
    with Reader() as reader, publish(target) as unfinished:
        opened = open_source(source, reader, hashes)
        _copy_rest(opened.directory, unfinished)
        (unfinished / CONFIG).write_text(json.dumps(opened.config, indent=2) + "\n", encoding="utf-8")
        tied = _tied_layers(opened, unfinished)
        if to == DENSE:
            parts, report = _unpacked(opened, tied, reader)
            _write_dense(unfinished, parts, shard_bytes)
        else:
            linear = _linear_layers(opened, unfinished) if layers is None else set(layers)
            packed, parts, report = _packed(opened, FORMATS[to], linear, tied, reader)
            write_compressed(unfinished, packed, parts, shard_bytes)
    return report


def _unpacked(source: Source, tied: set[str], reader: Reader) -> tuple[list[Part], PackReport]:
    parts, report = [], PackReport()
    for name, layer in source.layers.items():
        if name in tied:
            # as densify() does: what it was rounded from is there
            report.left.append((name, "the model ties it to the input embedding, which keeps its bits"))
        else:
            parts.append(_dense_part(name, layer, reader))
    parts += [_same_part(name, stored, reader) for name, stored in source.others.items()]
    report.bytes = report.dense_bytes = sum(part.nbytes for part in parts)
    return parts, report


def _packed(
    source: Source, format: type[Packed], linear: set[str], tied: set[str], reader: Reader
) -> tuple[dict[str, PackedLayer], list[Part], PackReport]:
    layers: dict[str, PackedLayer] = {}
    parts: list[Part] = []
    report = PackReport()
    dense = {name.removesuffix(".weight"): s for name, s in source.others.items() if name.endswith(".weight")}
    dense = {name: stored for name, stored in dense.items() if name in linear}
    biases = {name.removesuffix(".bias"): s.dtype for name, s in source.others.items() if name.endswith(".bias")}
    for name, layer in source.layers.items():
        report.dense_bytes += math.prod(layer.shape) * layer.dtype.itemsize
        if layer.packed is not None:
            # checked before anything is written
            layer.packed(reader)
            layers[name] = PackedLayer.of(layer.format, layer.shape, layer.dtype, layer.kept, layer.group_size)
            unchanged = part_of(name, layers[name], layer.kept, lambda read=layer.packed: _fresh(read, reader))
            stays = layer.format is format or name in tied
            chosen = None if stays else choose(layer.dense(reader), format, biases.get(name))
        else:
            unchanged = _dense_part(name, layer, reader)
            chosen = "it is no nn.Linear of the model"
            if name in linear:
                chosen = choose(layer.dense(reader), format, biases.get(name))
        if isinstance(chosen, tuple):
            layers[name], kept = chosen
            unchanged = part_of(name, *chosen, lambda read=layer.dense: pack(_fresh(read, reader), format))
        elif chosen is not None:
            report.left.append((name, chosen))
        parts.append(unchanged)
        reader.forget()
    for name, stored in source.others.items():
        report.dense_bytes += stored.nbytes
        layer = name.removesuffix(".weight")
        if dense.get(layer) is not stored:
            parts.append(_same_part(name, stored, reader))
            continue
        chosen = choose(reader.read(stored), format, biases.get(layer))
        reader.forget()
        if isinstance(chosen, str):
            report.left.append((layer, chosen))
            parts.append(_same_part(name, stored, reader))
        else:
            layers[layer] = chosen[0]
            read = partial(Reader.read, stored=stored)
            parts.append(part_of(layer, *chosen, lambda read=read: pack(_fresh(read, reader), format)))
    if not any(layer.format is format for layer in layers.values()):
        why = f", such as {report.left[0][0]}: {report.left[0][1]}" if report.left else ""
        raise ValueError(f"{str(source.directory)!r} has no linear layer to pack as {format.name}{why}")
    report.packed = {name: layer.to_json() for name, layer in layers.items()}
    report.bytes = sum(part.nbytes for part in parts)
    return layers, parts, report


def _linear_layers(source: Source, directory: Path) -> set[str]:
    """The names of the nn.Linear layers, whose weight is theirs alone, of the model in the config of `directory`."""
    if "model_type" not in source.config:
        if source.kind == QUANT_METHOD:
            return set(source.layers)
        raise ValueError(f"{CONFIG} names no model of transformers: say with layers= which layers are nn.Linear")
    modules = dict(hf.skeleton(directory).named_modules())
    owners = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    return {n for n, module in modules.items() if type(module) is nn.Linear and owners[id(module.weight)] == 1}


def _tied_layers(source: Source, directory: Path) -> set[str]:
    """The packed layers, output embeddings in int8, whose weight the model of the config would tie to another."""
    int8 = {name for name, layer in source.layers.items() if layer.format is BitmapInt8}
    if not int8 or "model_type" not in source.config or "auto_map" in source.config:
        return set()
    copies = hf.skeleton(directory).all_tied_weights_keys
    return {name for name in int8 if f"{name}.weight" in copies}


def _fresh(read: Callable[[Reader], T], reader: Reader) -> T:
    """What `read` reads, after the memory of what was read before it was given back."""
    reader.forget()
    return read(reader)


def _dense_part(name: str, layer: SourceLayer, reader: Reader) -> Part:
    name = f"{name}.weight"
    return Part({name: (layer.dtype, layer.shape)}, lambda: {name: _fresh(layer.dense, reader)})


def _same_part(name: str, stored: Stored, reader: Reader) -> Part:
    read = partial(Reader.read, stored=stored)
    return Part({name: (stored.dtype, stored.shape)}, lambda: {name: _fresh(read, reader)})


def _write_dense(directory: Path, parts: list[Part], shard_bytes: int) -> None:
    """The shards of a checkpoint as transformers writes it: one file has no index."""
    index = write(directory, "model", parts, shard_bytes)
    files = set(index["weight_map"].values())
    if len(files) == 1:
        os.rename(directory / files.pop(), directory / DENSE_FILE)
    elif files:
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_rest(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, code and whatever else lies beside the weights."""
    for name in files_below(source):
        if name != CONFIG and not name.endswith(_WEIGHTS):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
