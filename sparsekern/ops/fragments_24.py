"""fragments_24: a 2:4 weight as it is saved (formats/semi_structured.py) to what the mma.sp kernels read, and back.

mma.sp.m16n8k32 multiplies a tile of 16 outputs x 32 inputs, 16 x 16 of them kept. A panel is 16 outputs by all inputs,
a chunk of it 256 inputs: 8 tiles, whose positions fill one 16-byte load of each of the warp's 32 lanes. What is added
to fill the last panel and the last chunk is zero, at positions 0 and 1.

    values    [panels, chunks, 8 tiles, 32 lanes, 8]  one 16-byte load of a lane is its A fragment of a tile
    metadata  [panels, chunks, 32 lanes, 4] int32     one 16-byte load of a lane serves the chunk: register r holds tile
                                                      2r in lanes with lane % 4 < 2 and tile 2r + 1 in the others, which
                                                      are sparsity selectors 0 and 1

Within a tile, with lane = 4 g + t, the eight values are rows g, g + 8, g, g + 8 by the kept columns 2t, 2t + 1, then by
8 + 2t, 8 + 2t + 1 in the last four; and a metadata register is the saved word t % 2 of row g in its low half and of row
g + 8 in its high half.

On a card a kernel makes that order and checks what it reads; another one writes the dense weight.

Source: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types" and "Sparse matrix storage".
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.formats.semi_structured import SemiStructured
from sparsekern.ops import compiled
from sparsekern.ops.kernel import Kernel, device_refuses, never_refuses, pick

PANEL_ROWS = 16
CHUNK_INPUTS = 256
DTYPES = (torch.bfloat16, torch.float16)

_LANES = 32
_TILES = 8  # a chunk
_FRAGMENT = 8  # values of a lane's fragment of a tile
# positions 0 and 1 in each of a word's four groups, as SemiStructured.pack leaves groups without inputs
_EMPTY_WORD = 0x4444

Fragments = tuple[Tensor, Tensor]


def reference(packed: SemiStructured) -> Fragments:
    """The values and metadata that the mma.sp kernels read. Raises ValueError as SemiStructured.validate does."""
    packed.validate()
    panels, chunks = sizes(*packed.shape)
    rows = panels * PANEL_ROWS - packed.shape[0]
    values = pad(packed.values, (0, chunks * CHUNK_INPUTS // 2 - packed.values.shape[1], 0, rows))
    words = pad(packed.metadata, (0, chunks * 16 - packed.metadata.shape[1], 0, rows), value=_EMPTY_WORD)
    # rows are (half, g), kept columns (tile, half, t, neighbour), words (register, selector, word)
    values = values.view(panels, 2, 8, chunks, _TILES, 2, 4, 2).permute(0, 3, 4, 2, 6, 5, 1, 7)
    words = words.view(panels, 2, 8, chunks, 4, 2, 2).permute(0, 3, 2, 5, 6, 4, 1)
    values = values.reshape(panels, chunks, _TILES, _LANES, _FRAGMENT)
    # a register is the words of two rows
    metadata = words.reshape(panels, chunks, _LANES, 8).view(torch.int32)
    return values.contiguous(), metadata


def reference_inverse(operands: Fragments, out_features: int, in_features: int) -> SemiStructured:
    """The inverse of `reference`, bit for bit. Raises ValueError when the operands are not of this size."""
    check(operands, out_features, in_features)
    values, metadata = operands
    panels, chunks = sizes(out_features, in_features)
    values = values.view(panels, chunks, _TILES, 8, 4, 2, 2, 2).permute(0, 6, 3, 1, 2, 5, 4, 7)
    words = metadata.contiguous().view(torch.int16).view(panels, chunks, 8, 2, 2, 4, 2).permute(0, 6, 2, 1, 5, 3, 4)
    values = values.reshape(panels * PANEL_ROWS, chunks * CHUNK_INPUTS // 2)[:out_features, : in_features // 2]
    words = words.reshape(panels * PANEL_ROWS, chunks * 16)[:out_features, : -(-in_features // 16)]
    return SemiStructured(values.contiguous(), words.contiguous(), in_features)


def sizes(out_features: int, in_features: int) -> tuple[int, int]:
    """Panels and chunks of a weight."""
    return -(-out_features // PANEL_ROWS), -(-in_features // CHUNK_INPUTS)


def check(operands: Fragments, out_features: int, in_features: int) -> None:
    """Raises ValueError when `operands` are not the fragments of a weight [out_features, in_features]."""
    values, metadata = operands
    panels, chunks = sizes(out_features, in_features)
    if list(values.shape) != [panels, chunks, _TILES, _LANES, _FRAGMENT]:
        wanted = [panels, chunks, _TILES, _LANES, _FRAGMENT]
        raise ValueError(f"values must be {wanted}, got {list(values.shape)}")
    if metadata.dtype != torch.int32 or list(metadata.shape) != [panels, chunks, _LANES, 4]:
        wanted = [panels, chunks, _LANES, 4]
        raise ValueError(f"metadata must be int32 {wanted}, got {metadata.dtype} {list(metadata.shape)}")


def prepare(packed: SemiStructured) -> Fragments:
    """What `reference` does, by the best kernel for this weight."""
    return pick(KERNELS, packed).run(packed)


def to_dense(operands: Fragments, out_features: int, in_features: int) -> Tensor:
    """The dense weight [out_features, in_features]. Raises ValueError when the operands are not of this size."""
    check(operands, out_features, in_features)
    if _refuses(operands[0]):
        return reference_inverse(operands, out_features, in_features).to_dense()
    return torch.ops.sparsekern.fragments_24_to_dense(*operands, out_features, in_features)


def _cuda(packed: SemiStructured) -> Fragments:
    packed.validate_sizes()
    *operands, status = torch.ops.sparsekern.fragments_24(
        packed.values.contiguous(), packed.metadata.contiguous(), packed.in_features
    )
    if int(status):
        packed.validate()
        raise RuntimeError("the metadata changed while it was read")
    return tuple(operands)


def _cuda_refuses(packed: SemiStructured) -> str | None:
    if packed.metadata.device != packed.device:
        return f"values and metadata must be on one device, got {packed.device} and {packed.metadata.device}"
    return _refuses(packed.values)


def _refuses(values: Tensor) -> str | None:
    return device_refuses(values, "cuda", DTYPES) or compiled.why_not("cuda")


def _fragments(values: Tensor, metadata: Tensor, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    fragments, ordered, status = _fragments_fake(values, metadata, in_features)
    compiled.launch(
        compiled.cuda().fragments_24,
        values=values,
        metadata=metadata,
        fragments=fragments,
        ordered=ordered,
        status=status,
        out_features=len(values),
        in_features=in_features,
    )
    return fragments, ordered, status


def _fragments_fake(values: Tensor, metadata: Tensor, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    panels, chunks = sizes(values.shape[0], in_features)
    return (
        values.new_empty(panels, chunks, _TILES, _LANES, _FRAGMENT),
        values.new_empty(panels, chunks, _LANES, 4, dtype=torch.int32),
        values.new_zeros(1, dtype=torch.int64),
    )


def _dense(fragments: Tensor, ordered: Tensor, out_features: int, in_features: int) -> Tensor:
    dense = fragments.new_empty(out_features, in_features)
    compiled.launch(
        compiled.cuda().fragments_24_to_dense,
        fragments=fragments,
        ordered=ordered,
        dense=dense,
        out_features=out_features,
        in_features=in_features,
    )
    return dense


def _dense_fake(fragments: Tensor, ordered: Tensor, out_features: int, in_features: int) -> Tensor:
    return fragments.new_empty(out_features, in_features)


_LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")
# status is what csrc/cuda/ops.h says; who asks it waits for the card
_LIBRARY.define(
    "fragments_24(Tensor values, Tensor metadata, int in_features) -> (Tensor fragments, Tensor ordered, Tensor status)"
)
_LIBRARY.define("fragments_24_to_dense(Tensor fragments, Tensor ordered, int out_features, int in_features) -> Tensor")
_LIBRARY.impl("fragments_24", _fragments, "CUDA")
_LIBRARY.impl("fragments_24_to_dense", _dense, "CUDA")
torch.library.register_fake("sparsekern::fragments_24", _fragments_fake, lib=_LIBRARY)
torch.library.register_fake("sparsekern::fragments_24_to_dense", _dense_fake, lib=_LIBRARY)

KERNELS = (
    Kernel("cuda", _cuda, _cuda_refuses, restore=reference_inverse),
    Kernel("reference", reference, never_refuses, restore=reference_inverse),
)
