"""sources: a checkpoint on the disk, whoever wrote it, as layers whose weights are read one at a time."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekern import compressed_tensors
from sparsekern.manifest import CONFIG, QUANT_METHOD, SUMS, Packed, check_sums, read_manifest, regular
from sparsekern.shards import DAMAGED, Reader, Stored, read_header, read_json

DENSE_INDEX = "model.safetensors.index.json"
DENSE_FILE = "model.safetensors"
_FILE = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True)
class SourceLayer:
    """A layer whose weight is stored packed.

    dense   reads and checks it, and rebuilds the weight [out_features, in_features]
    packed  reads and checks it in the canonical format that it is stored in; None when it has none
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    dense: Callable[[Reader], Tensor]
    packed: Callable[[Reader], Packed] | None = None
    format: type[Packed] | None = None
    kept: int = 0


@dataclass(frozen=True)
class Source:
    """A checkpoint: `layers` are stored packed, `others` as they are; `config` says nothing of the packing any more."""

    directory: Path
    kind: str
    config: dict[str, Any]
    layers: dict[str, SourceLayer]
    others: dict[str, Stored]


def open_source(directory: str | Path, reader: Reader, hashes: bool = True) -> Source:
    """The checkpoint in `directory`: sparsekern's, compressed-tensors' sparse ones, or dense safetensors.

    hashes  check every file against SHA256SUMS where there is one

    Raises ValueError for what is none of these, for quantised weights, and for files whose headers lie.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"no such directory: {str(directory)!r}")
    if not (directory / CONFIG).is_file():
        raise ValueError(f"{str(directory)!r} is not a checkpoint: it holds no {CONFIG}")
    regular(directory, CONFIG)
    config = read_json(directory / CONFIG)
    quantization = config.get("quantization_config") or config.get("compression_config")
    method = quantization.get("quant_method", compressed_tensors.QUANT_METHOD) if type(quantization) is dict else None
    if method == QUANT_METHOD:
        return _compressed(directory, hashes)
    if quantization is not None and method != compressed_tensors.QUANT_METHOD:
        raise ValueError(f"{CONFIG}: weights quantised by {method!r:.80} are not read; dequantize the model first")
    if hashes and (directory / SUMS).is_file():
        check_sums(directory)
    tensors = _tensors(directory)
    bare = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if quantization is None:
        return Source(directory, "dense", bare, {}, tensors)
    layout = compressed_tensors.layout_of(quantization)
    layers, packed = {}, compressed_tensors.layers(tensors, layout)
    for name, fields in packed.items():
        layers[name.removesuffix(".weight")] = SourceLayer(
            compressed_tensors.shape(name, fields, reader),
            fields["compressed"].dtype,
            partial(compressed_tensors.dense, name, fields),
        )
    used = {f"{name}.{field}" for name, fields in packed.items() for field in fields}
    others = {name: stored for name, stored in tensors.items() if name not in used}
    if twice := sorted(name for name in layers if f"{name}.weight" in others):
        raise ValueError(f"{twice[0]} is stored packed and dense; {DAMAGED}")
    return Source(directory, layout or "dense", bare, layers, others)


def _compressed(directory: Path, hashes: bool) -> Source:
    manifest = read_manifest(directory)
    if hashes:
        check_sums(directory)
    layers = {}
    for name, layer in manifest.layers.items():
        kept = manifest.tensors[f"{name}.values"].shape[0]
        read = partial(manifest.packed, name)
        layers[name] = SourceLayer(
            layer.shape, layer.dtype, lambda reader, read=read: read(reader).to_dense(), read, layer.format, kept
        )
    bare = {key: value for key, value in manifest.config.items() if key != "quantization_config"}
    return Source(directory, QUANT_METHOD, bare, layers, manifest.others())


def _tensors(directory: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint as transformers writes it, by its index or its only file."""
    weight_map: dict[str, str] | None = None
    files = [DENSE_FILE]
    if (directory / DENSE_INDEX).exists():
        regular(directory, DENSE_INDEX)
        weight_map = read_json(directory / DENSE_INDEX).get("weight_map")
        if type(weight_map) is not dict:
            raise ValueError(f"{DENSE_INDEX}: must have a weight_map; {DAMAGED}")
        for name, file in weight_map.items():
            if type(file) is not str or not _FILE.fullmatch(file):
                raise ValueError(
                    f"{DENSE_INDEX}: {name!r:.80} must lie in a safetensors file of this directory, got {file!r:.80}; "
                    f"{DAMAGED}"
                )
        files = sorted(set(weight_map.values()))
    tensors: dict[str, Stored] = {}
    for file in files:
        if not (directory / file).exists():
            held = "it holds no safetensors" if weight_map is None else f"its index names {file}, which is missing"
            raise ValueError(f"{str(directory)!r} cannot be read: {held}")
        regular(directory, file)
        for name, stored in read_header(directory / file).items():
            # of a tensor that is in two files, the index says which counts
            if weight_map is None or weight_map.get(name) == file:
                tensors[name] = stored
    if missing := sorted((weight_map or {}).keys() - tensors.keys()):
        raise ValueError(f"{weight_map[missing[0]]}: has no {missing[0]}, which {DENSE_INDEX} says it has; {DAMAGED}")
    return tensors
