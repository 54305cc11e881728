"""packed_layer: one packed layer as config.json of a compressed checkpoint has it, and its tensors as stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.formats import Bitmap, BitmapInt8, SemiStructured
from sparsekern.formats.bitmap import DTYPES
from sparsekern.ops import bitmap_rows
from sparsekern.shards import DAMAGED, shape_of

Packed = Bitmap | BitmapInt8 | SemiStructured

CONFIG = "config.json"
FORMATS = {format.name: format for format in (Bitmap, SemiStructured, BitmapInt8)}
FIELDS = {
    Bitmap: ("values", "bitmap", "row_offsets"),
    BitmapInt8: ("values", "scales", "bitmap", "row_offsets"),
    SemiStructured: ("values", "metadata"),
}
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class PackedLayer:
    """One packed layer as config.json has it; `pattern` is "2:4", or the sparsity of a bitmap in words: "50.0%".

    group_size  inputs that share a scale, of an int8 one; None: a row has one
    """

    format: type[Packed]
    shape: tuple[int, int]
    pattern: str
    dtype: torch.dtype
    group_size: int | None = None

    @classmethod
    def of(
        cls,
        format: type[Packed],
        shape: tuple[int, int],
        dtype: torch.dtype,
        kept: int,
        group_size: int | None = None,
    ) -> "PackedLayer":
        """The entry of a layer that keeps `kept` weights."""
        return cls(format, tuple(shape), pattern_of(format, tuple(shape), kept), dtype, group_size)

    def packed(self, fields: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Packed:
        """The weight of these fields; of an int8 one `dtype` is that of x, None the layer's."""
        if self.format is BitmapInt8:
            return BitmapInt8(
                **fields, in_features=self.shape[1], group_size=self.group_size, dtype=dtype or self.dtype
            )
        return self.format(**fields, in_features=self.shape[1])

    def tensors(self, kept: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The fields as they are stored, dtype and shape."""
        out_features, in_features = self.shape
        if self.format is not SemiStructured:
            int8 = self.format is BitmapInt8
            groups = -(-in_features // self.group_size) if self.group_size else 1
            return {
                "values": (torch.int8 if int8 else self.dtype, (kept,)),
                **({"scales": (torch.float32, (out_features, max(groups, 1)))} if int8 else {}),
                "bitmap": (torch.uint8, (out_features, -(-in_features // 8))),
                "row_offsets": (torch.int64, (out_features + 1,)),
            }
        return {
            "values": (self.dtype, (out_features, in_features // 2)),
            "metadata": (torch.int16, (out_features, -(-in_features // 16))),
        }

    def to_json(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        entry = {"format": self.format.name, "shape": list(self.shape), "pattern": self.pattern, "dtype": dtype}
        return entry | ({"group_size": self.group_size} if self.format is BitmapInt8 else {})


def check_packed(packed: Packed) -> None:
    """Raises ValueError when the parts of `packed` contradict each other, or its values are not finite."""
    if isinstance(packed, Bitmap):
        bitmap_rows.validate(packed)
    else:
        packed.validate()
    # the extremes, which NaN becomes, are found without memory of their own
    if packed.values.numel() and not all(extreme.isfinite() for extreme in packed.values.aminmax()):
        missing = int((~packed.values.isfinite()).sum())
        raise ValueError(f"values must be finite as {packed.dtype}, got {missing} NaN or infinite ones")


def read_layer(name: str, entry: Any) -> PackedLayer:
    """The entry `name` of config.json. Raises ValueError naming the layer, the rule and the value."""

    def refuse(rule: str, value: Any) -> ValueError:
        return ValueError(f"{CONFIG}: {name!r:.80}: {rule}, got {value!r:.80}; {DAMAGED}")

    if not name.isprintable() or not name:
        raise refuse("the name of a layer must be printable", name)
    more = {"group_size"} if type(entry) is dict and entry.get("format") == BitmapInt8.name else set()
    if type(entry) is not dict or entry.keys() != {"format", "shape", "pattern", "dtype", *more}:
        raise refuse(f"must have format, shape, pattern and dtype{', and group_size' if more else ''}", entry)
    if type(entry["format"]) is not str or entry["format"] not in FORMATS:
        raise refuse(f"format must be one of {', '.join(FORMATS)}", entry["format"])
    if type(entry["dtype"]) is not str or entry["dtype"] not in DTYPE_NAMES:
        raise refuse(f"dtype must be one of {', '.join(DTYPE_NAMES)}", entry["dtype"])
    format, shape = FORMATS[entry["format"]], shape_of(entry["shape"])
    if shape is None or len(shape) != 2:
        raise refuse("shape must be out_features and in_features", entry["shape"])
    if format is SemiStructured and shape[1] % 4:
        raise refuse("in_features of a 2:4 layer must be a multiple of 4", entry["shape"])
    if type(entry["pattern"]) is not str:
        raise refuse("pattern must be a text", entry["pattern"])
    size = entry.get("group_size")
    if size is not None and (type(size) is not int or size < 1):
        raise refuse("group_size must be a whole number from 1, or null", size)
    return PackedLayer(format, shape, entry["pattern"], DTYPE_NAMES[entry["dtype"]], size)


def pattern_of(format: type[Packed], shape: tuple[int, int], kept: int) -> str:
    """In words: "2:4", or the sparsity of a bitmap."""
    size = shape[0] * shape[1]
    return f"{1 - kept / size if size else 0:.1%}" if format is not SemiStructured else "2:4"
