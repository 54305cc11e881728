"""inspect: what the linear weights of a checkpoint hold, read tensor by tensor, without building the model."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

# the patterns that are looked for, the strictest first
GROUPS = ((1, 4), (2, 4), (4, 8))


@dataclass(frozen=True)
class TensorReport:
    """One matrix of a checkpoint.

    pattern       the strictest of 1:4, 2:4, 4:8 that it keeps, "unstructured", or "dense" below 1 % zeros
    bytes         as it is stored
    packed_bytes  the smallest that a packed format takes; `bytes` where packing does not pay
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    sparsity: float
    pattern: str
    bytes: int
    packed_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(directory: str | Path) -> list[TensorReport]:
    """Every matrix in the safetensors files of `directory`, in the order of their names.

    Raises ValueError when there is no such directory, it holds no safetensors, or a file cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"no such directory: {str(directory)!r}")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{str(directory)!r} holds no safetensors")
    reports = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # not a mapping
                    if len(tensors.get_slice(name).get_shape()) == 2:
                        reports.append(_examine(name, tensors.get_tensor(name)))
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    return sorted(reports, key=lambda report: report.name)


def _examine(name: str, weight: Tensor) -> TensorReport:
    rows, columns = weight.shape
    kept = weight != 0
    nonzeros = int(kept.sum())
    sparsity = 1 - nonzeros / max(weight.numel(), 1)
    pattern = _pattern(kept, sparsity)
    # formats/bitmap.py and formats/semi_structured.py, by arithmetic
    packed = nonzeros * weight.itemsize + rows * -(-columns // 8) + 8 * (rows + 1)
    if pattern in ("1:4", "2:4"):
        packed = min(packed, rows * (columns // 2 * weight.itemsize + -(-columns // 16) * 2))
    dtype = str(weight.dtype).removeprefix("torch.")
    return TensorReport(name, (rows, columns), dtype, sparsity, pattern, weight.nbytes, min(packed, weight.nbytes))


def _pattern(kept: Tensor, sparsity: float) -> str:
    for n, m in GROUPS:
        if kept.shape[1] % m == 0 and (kept.unflatten(1, (-1, m)).sum(dim=2) <= n).all():
            return f"{n}:{m}"
    return "unstructured" if sparsity >= 0.01 else "dense"
