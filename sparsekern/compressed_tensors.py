"""compressed_tensors: the two sparse layouts of compressed-tensors up to 0.14, which its later versions read no more.

    sparse-24-bitmask  L.shape [2, 1], L.compressed [out, in / 2], L.bitmask [out, ceil(in / 8)]: two of every four
    sparse-bitmask     L.shape [2], L.compressed [kept], L.bitmask as above, L.row_offsets [out], where each row begins

A bitmask is uint8, bit i % 8 of byte i // 8 is input i, 1 = kept: the bitmap of formats/bitmap.py. What is kept may be
zero. Read from the source of compressed-tensors 0.14.0, compressors/sparse_compressors.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekern.formats import Bitmap
from sparsekern.formats.bitmap import DTYPES, popcount
from sparsekern.shards import DAMAGED, Reader, Stored, shape_of

QUANT_METHOD = "compressed-tensors"
SPARSE_24, SPARSE = "sparse-24-bitmask", "sparse-bitmask"
_FIELDS = {SPARSE_24: {"shape", "compressed", "bitmask"}, SPARSE: {"shape", "compressed", "bitmask", "row_offsets"}}
_QUANTISED = (
    "weight_scale",
    "weight_zero_point",
    "weight_packed",
    "input_scale",
    "weight_g_idx",
    "weight_global_scale",
)


def layout_of(quantization: Mapping[str, Any]) -> str | None:
    """Which of the two layouts a quantization_config names; None when its weights are dense.

    Raises ValueError for whatever is quantised or transformed.
    """
    sparsity = quantization.get("sparsity_config") or {}
    layout = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
    for other in ("config_groups", "kv_cache_scheme", "transform_config"):
        if quantization.get(other):
            raise ValueError(
                f"config.json: {QUANT_METHOD} with {other} ({quantization.get('format')}) is quantised and not read: "
                f"only {SPARSE_24} and {SPARSE} of floating-point weights are"
            )
    if layout is not None and layout not in (*_FIELDS, "dense"):
        raise ValueError(
            f"config.json: sparsity_config of {QUANT_METHOD} must have format {SPARSE_24} or {SPARSE}, "
            f"got {layout!r:.80}"
        )
    return layout if layout in _FIELDS else None


def layers(tensors: Mapping[str, Stored], layout: str | None) -> dict[str, dict[str, Stored]]:
    """The packed layers among `tensors`, by name: their stored fields.

    Raises ValueError for a layer that lacks a field or has one of the other layout, and for quantised ones.
    """
    if strange := sorted(name for name in tensors if name.rpartition(".")[2] in _QUANTISED):
        raise ValueError(f"{strange[0]}: quantised weights of {QUANT_METHOD} are not read; dequantize the model first")
    found: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        layer, _, field = name.rpartition(".")
        if field in _FIELDS[SPARSE] and f"{layer}.compressed" in tensors:
            found.setdefault(layer, {})[field] = stored
    for layer, fields in found.items():
        if layout is None or fields.keys() != _FIELDS[layout]:
            wanted = "a dense weight" if layout is None else f"{', '.join(sorted(_FIELDS[layout]))} of {layout}"
            raise ValueError(f"{layer}: must have {wanted}, got {', '.join(sorted(fields))}; {DAMAGED}")
    return found


def shape(layer: str, fields: Mapping[str, Stored], reader: Reader) -> tuple[int, int]:
    """The shape of a packed layer, which its other fields bear out. Raises ValueError when they do not."""
    stored, compressed = fields["shape"], fields["compressed"]
    if stored.dtype != torch.int64 or stored.shape not in ((2,), (2, 1)):
        raise ValueError(f"{layer}.shape must be two int64, got {list(stored.shape)} of {stored.dtype}; {DAMAGED}")
    size = shape_of(reader.read(stored).flatten().tolist())
    if size is None:
        raise ValueError(f"{layer}.shape must be sizes of a tensor; {DAMAGED}")
    out_features, in_features = size
    expected = {"bitmask": (torch.uint8, (out_features, -(-in_features // 8)))}
    if "row_offsets" in fields:
        expected["row_offsets"] = (torch.int64, (out_features,))
        expected["compressed"] = (compressed.dtype, (*compressed.shape[:1],))
    else:
        expected["compressed"] = (compressed.dtype, (out_features, in_features // 2))
        if in_features % 4:
            raise ValueError(
                f"{layer}: in_features of {SPARSE_24} must be a multiple of 4, got {in_features}; {DAMAGED}"
            )
    for field, (dtype, wanted) in expected.items():
        if (fields[field].dtype, fields[field].shape) != (dtype, wanted):
            raise ValueError(
                f"{layer}.{field} must be {list(wanted)} of {dtype}, got {list(fields[field].shape)} of "
                f"{fields[field].dtype}; {DAMAGED}"
            )
    if compressed.dtype not in DTYPES:
        raise ValueError(
            f"{layer}.compressed must be bfloat16, float16 or float32, got {compressed.dtype}: quantised weights of "
            f"{QUANT_METHOD} are not read"
        )
    return out_features, in_features


def dense(layer: str, fields: Mapping[str, Stored], reader: Reader) -> Tensor:
    """The weight of a packed layer [out_features, in_features]. Raises ValueError when its fields contradict."""
    out_features, in_features = shape(layer, fields, reader)
    values, bitmask = reader.read(fields["compressed"]).flatten(), reader.read(fields["bitmask"])
    if "row_offsets" in fields:
        row_offsets = torch.cat([reader.read(fields["row_offsets"]), torch.tensor([len(values)])])
    else:
        row_offsets = torch.arange(out_features + 1) * (in_features // 2)
    packed = Bitmap(values, bitmask, row_offsets, in_features)
    try:
        packed.validate()
        if "row_offsets" not in fields:
            _refuse_other_groups(bitmask, in_features)
    except ValueError as error:
        raise ValueError(f"{fields['compressed'].file.name}: {layer}: {error}; {DAMAGED}") from error
    return packed.to_dense()


def _refuse_other_groups(bitmask: Tensor, in_features: int) -> None:
    """Raises ValueError when a group of four inputs keeps another number than two."""
    groups = in_features // 4
    # the groups of low nibbles, and of high ones
    for shift, count in ((0, -(-groups // 2)), (4, groups // 2)):
        wrong = popcount((bitmask[:, :count] >> shift) & 15) != 2
        if wrong.any():
            row, byte = wrong.nonzero()[0].tolist()
            column = 8 * byte + shift
            raise ValueError(
                f"bitmask must keep two of every four inputs, not so in row {row}, columns {column}..{column + 3}"
            )
