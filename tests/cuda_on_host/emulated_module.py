"""sparsekern._cuda's functions that pack, unpack and make masks, as the emulator runs them on a CPU's tensors.

They are called as the binding is, with addresses and sizes, so that the ops above them run as they are.
"""

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsekern.ops import compiled
from tests.cuda_on_host.emulator import Program

DTYPES = {"bfloat16": (0, 2), "float16": (1, 2), "float32": (2, 4)}
Sizes = dict[str, int]


@dataclass(frozen=True)
class Function:
    """One of ops.h: the program's numbers, and the bytes of what it reads and of what it writes, by name."""

    numbers: Callable[[Sizes], list[int]]
    reads: Callable[[Sizes], dict[str, int]]
    writes: Callable[[Sizes], dict[str, int]]


def _shape(s: Sizes) -> list[int]:
    return [s["out_features"], s["in_features"]]


def _rows(s: Sizes) -> int:
    """Bytes of a dense weight whose rows are a stride apart."""
    out_features, in_features = _shape(s)
    return ((out_features - 1) * s["stride"] + in_features) * s["bytes"] if out_features and in_features else 0


FUNCTIONS = {
    "pack_24": Function(
        _shape,
        lambda s: {"dense": s["dense_size"] * s["bytes"]},
        lambda s: {"values": s["values_size"] * s["bytes"], "metadata": 2 * s["metadata_size"], "status": 24},
    ),
    "unpack_24": Function(
        _shape,
        lambda s: {"values": s["values_size"] * s["bytes"], "metadata": 2 * s["metadata_size"]},
        lambda s: {"dense": s["dense_size"] * s["bytes"], "status": 8},
    ),
    "fragments_24": Function(
        _shape,
        lambda s: {"values": 2 * s["values_size"], "metadata": 2 * s["metadata_size"]},
        lambda s: {"fragments": 2 * s["fragments_size"], "ordered": 4 * s["ordered_size"], "status": 8},
    ),
    "fragments_24_to_dense": Function(
        _shape,
        lambda s: {"fragments": 2 * s["fragments_size"], "ordered": 4 * s["ordered_size"]},
        lambda s: {"dense": 2 * s["dense_size"]},
    ),
    "bitmap_fragments_masks": Function(
        _shape,
        lambda s: {"bitmap": s["bitmap_size"]},
        lambda s: {"masks": 4 * s["masks_size"], "quads": 4 * s["quads_size"]},
    ),
    "bitmap_fragments_cells": Function(
        lambda s: [*_shape(s), s["cell_rows"]],
        lambda s: {"dense": 2 * s["dense_size"], "masks": 4 * s["masks_size"], "quad_rows": 4 * s["quad_rows_size"]},
        lambda s: {"cells": 32 * s["cell_rows"]},
    ),
    "bitmap_bits": Function(
        lambda s: [*_shape(s), s["stride"]],
        lambda s: {"dense": _rows(s)},
        lambda s: {"bitmap": s["bitmap_size"], "counts": 8 * s["counts_size"], "status": 16},
    ),
    "bitmap_values": Function(
        lambda s: [*_shape(s), s["stride"], s["values_size"]],
        lambda s: {"dense": _rows(s), "bitmap": s["bitmap_size"], "row_offsets": 8 * s["row_offsets_size"]},
        lambda s: {"values": s["values_size"] * s["bytes"]},
    ),
    "bitmap_to_dense": Function(
        lambda s: [*_shape(s), s["values_size"]],
        lambda s: {
            "values": s["values_size"] * s["bytes"],
            "bitmap": s["bitmap_size"],
            "row_offsets": 8 * s["row_offsets_size"],
        },
        lambda s: {"dense": s["dense_size"] * s["bytes"], "status": 8},
    ),
    "keep_largest": Function(
        lambda s: [s["sets"], s["size"], s["kept_stride"]],
        lambda s: {
            "saliency": 4 * s["sets"] * s["size"],
            "kept": 8 * ((s["sets"] - 1) * s["kept_stride"] + 1) if s["sets"] else 0,
        },
        lambda s: {"mask": s["mask_size"], "status": 16},
    ),
}


class EmulatedModule:
    """The functions; `order` is that in which the threads take their turns."""

    def __init__(self, program: Program):
        self.program = program
        self.order = "forward"

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in FUNCTIONS:
            raise AttributeError(name)
        return lambda **arguments: self._call(name, **arguments)

    def _call(self, name: str, stream: int, **arguments) -> None:
        function = FUNCTIONS[name]
        if (built := _BUILT) is not None:
            names = re.findall(r"(\w+): ", getattr(built, name).__doc__.partition(" -> ")[0])
            assert set(names) == {"stream", *arguments}
        dtype, item = DTYPES[arguments.pop("dtype", "float32")]
        sizes = {**arguments, "bytes": item}
        reads, writes = function.reads(sizes), function.writes(sizes)
        tensors = [torch.frombuffer(bytearray(_read(sizes[name], size)), dtype=torch.uint8) if size else
                   torch.empty(0, dtype=torch.uint8) for name, size in reads.items()]  # fmt: skip
        results = self.program.run(
            name,
            tensors,
            [dtype, *function.numbers(sizes)],
            [((size,), torch.uint8) for size in writes.values()],
            self.order,
            # an address may miss 16 bytes here as it would there
            shifts={i: sizes[name] % 16 for i, name in enumerate(reads)},
        )
        for (name, size), result in zip(writes.items(), results, strict=True):
            ctypes.memmove(sizes[name], result.data_ptr(), size)


_BUILT = compiled.cuda()


def _read(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)
