"""inspect: what the linear weights of a checkpoint hold, read tensor by tensor, without building the model.

N:M is looked for along the inputs. Where a weight has them, [out_features, in_features] or transposed as in GPT-2's
Conv1D and some experts, is what the model does that config.json names; without one they are taken to come last.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsekern import hf
from sparsekern.manifest import QUANT_METHOD, read_manifest
from sparsekern.shards import Reader

# the patterns that are looked for, the strictest first
GROUPS = ((1, 4), (2, 4), (4, 8))
# the parts of a name by which a layer is known whatever stands before them
LAST_PARTS = 3


@dataclass(frozen=True)
class TensorReport:
    """One matrix of a checkpoint, or the experts of one 3-D parameter.

    shape         as it is stored, or would be dense
    transposed    the inputs come before the outputs: [..., in_features, out_features]
    format        "dense", or the packed format that it is stored in
    pattern       the strictest of 1:4, 2:4, 4:8 that it keeps, "unstructured", or "dense" below 1 % zeros
    bytes         as it is stored
    packed_bytes  the smallest that a packed format takes; `bytes` where packing does not pay, and where no format holds
                  such a layer: transposed, or experts
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    dtype: str
    format: str
    sparsity: float
    pattern: str
    bytes: int
    packed_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(directory: str | Path) -> list[TensorReport]:
    """Every matrix in the safetensors files of `directory`, dense or packed, in the order of their names.

    Raises ValueError when there is no such directory, it holds no safetensors, or a file cannot be read; for a packed
    checkpoint also for anything in it that is not true.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"no such directory: {str(directory)!r}")
    if _is_packed(directory):
        reports = _packed(directory)
    else:
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{str(directory)!r} holds no safetensors")
        lies = _Transposed(directory)
        reports = (report for file in files for report in _dense(file, lies))
    return sorted(reports, key=lambda report: report.name)


def _dense(file: Path, lies: "_Transposed") -> Iterator[TensorReport]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # not a mapping
                part = tensors.get_slice(name)
                shape = tuple(part.get_shape())
                if _is_weight(name, shape):
                    # an expert at a time: all of them may be gigabytes
                    parts = [part[:]] if len(shape) == 2 else (part[index] for index in range(shape[0]))
                    yield _examine(name, shape, parts, lies.of(name))
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error


def _packed(directory: Path) -> Iterator[TensorReport]:
    manifest = read_manifest(directory)
    with Reader() as reader:
        for name, layer in manifest.layers.items():
            fields = manifest.fields(name).values()
            report = _examine(f"{name}.weight", layer.shape, [manifest.packed(name, reader).to_dense()], False)
            stored = sum(field.nbytes for field in fields)
            yield TensorReport(
                **asdict(report) | {"format": layer.format.name, "bytes": stored, "packed_bytes": stored}
            )
            reader.forget()
        for name, stored in manifest.others().items():
            if _is_weight(name, stored.shape):
                tensor = reader.read(stored)
                yield _examine(name, stored.shape, [tensor] if tensor.dim() == 2 else list(tensor), False)
                reader.forget()


def _examine(name: str, shape: tuple[int, ...], matrices: Any, transposed: bool) -> TensorReport:
    """matrices: one, or as many as experts, as they are stored."""
    nonzeros = size = packed = 0
    holds = dict.fromkeys(GROUPS, True)
    for matrix in matrices:
        weight = matrix.T if transposed else matrix
        kept = weight != 0
        nonzeros += int(kept.sum())
        size += weight.numel()
        for group in GROUPS:
            holds[group] = holds[group] and _keeps(kept, *group)
    dtype, stored = str(matrix.dtype).removeprefix("torch."), size * matrix.itemsize
    sparsity = 1 - nonzeros / max(size, 1)
    pattern = next((f"{n}:{m}" for (n, m), held in holds.items() if held), None)
    pattern = pattern or ("unstructured" if sparsity >= 0.01 else "dense")
    packed = stored
    if len(shape) == 2 and not transposed:
        # formats/bitmap.py and formats/semi_structured.py, by arithmetic
        (rows, columns), itemsize = shape, matrix.itemsize
        packed = min(packed, nonzeros * itemsize + rows * -(-columns // 8) + 8 * (rows + 1))
        if pattern in ("1:4", "2:4"):
            packed = min(packed, rows * (columns // 2 * itemsize + -(-columns // 16) * 2))
    return TensorReport(name, shape, transposed, dtype, "dense", sparsity, pattern, stored, packed)


def _keeps(kept: Tensor, n: int, m: int) -> bool:
    return kept.shape[1] % m == 0 and bool((kept.unflatten(1, (-1, m)).sum(dim=2) <= n).all())


def _is_weight(name: str, shape: tuple[int, ...]) -> bool:
    # experts may have a bias in one matrix, and convolutions have three dimensions
    return (len(shape) == 2 or (len(shape) == 3 and shape[0] > 0 and "expert" in name)) and not name.endswith("bias")


def _is_packed(directory: Path) -> bool:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return False


class _Transposed:
    """Which tensors of a checkpoint are [in_features, out_features], by the model that its config.json names."""

    def __init__(self, directory: Path):
        self._by_name: dict[str, bool] = {}
        self._by_last_parts: dict[str, set[bool]] = {}
        # what cannot be built says nothing
        with suppress(ValueError, hf.UnknownModelError):
            for name, layer in hf.layers(hf.skeleton(directory)):
                experts = isinstance(layer, hf.Expert)
                tensor = name.rpartition(".")[0] if experts else f"{name}.weight"
                self._by_name[tensor] = hf.is_transposed(layer)
        for name, transposed in self._by_name.items():
            self._by_last_parts.setdefault(_last_parts(name), set()).add(transposed)

    def of(self, name: str) -> bool:
        # a checkpoint may call a layer by another name in front than the model does
        known = self._by_name.get(name)
        return self._by_last_parts.get(_last_parts(name)) == {True} if known is None else known


def _last_parts(name: str) -> str:
    return ".".join(name.split(".")[-LAST_PARTS:])
