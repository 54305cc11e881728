"""sources: a checkpoint on the disk, whoever wrote it, as layers whose weights are read one at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekern import compressed_tensors, model_files
from sparsekern.manifest import QUANT_METHOD, SUMS, check_sums, read_manifest, regular
from sparsekern.packed_layer import CONFIG, Packed
from sparsekern.shards import DAMAGED, Reader, Stored, read_json


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
    group_size: int | None = None


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
        dense = partial(_dense, read)
        layers[name] = SourceLayer(layer.shape, layer.dtype, dense, read, layer.format, kept, layer.group_size)
    bare = {key: value for key, value in manifest.config.items() if key != "quantization_config"}
    return Source(directory, QUANT_METHOD, bare, layers, manifest.others())


def _dense(read: Callable[[Reader], Packed], reader: Reader) -> Tensor:
    return read(reader).to_dense()


def _tensors(directory: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint as transformers writes it, of which no file lies elsewhere."""
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")]:
        regular(directory, path.name)
    return model_files.tensors_of(directory)
