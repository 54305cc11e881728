"""The ops that pack, unpack, reorder and make masks, with the emulator's kernels under them.

What is replaced is sparsekern._cuda alone, whose functions get the same addresses.
"""

import contextlib
import types

import pytest
import torch

from sparsekern.ops import bitmap_fragments, bitmap_rows, compiled, fragments_24, keep_largest, pack_24
from tests.cuda_on_host.emulated_module import EmulatedModule
from tests.cuda_on_host.emulator import build

FILES = ("pack_24.cu", "fragments_24.cu", "bitmap_rows.cu", "bitmap_fragments.cu", "keep_largest.cu")
OPS = {
    "pack_24": pack_24._pack,
    "unpack_24": pack_24._unpack,
    "fragments_24": fragments_24._fragments,
    "fragments_24_to_dense": fragments_24._dense,
    "bitmap_fragments_masks": bitmap_fragments._masks,
    "bitmap_fragments_cells": bitmap_fragments._cells,
    "bitmap_bits": bitmap_rows._bits,
    "bitmap_values": bitmap_rows._values,
    "bitmap_to_dense": bitmap_rows._dense,
    "keep_largest": keep_largest._keep_largest,
}


def pytest_collection_modifyitems(items):
    """What counts the lines that all tests here ran comes last."""
    items.sort(key=lambda item: item.path.name == "test_every_line.py")


@pytest.fixture(scope="session")
def packing_program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("packing"), "packing.cpp", *FILES)


@pytest.fixture
def emulated(packing_program, monkeypatch):
    """The ops take tensors of the CPU, and the kernels are the emulator's."""
    module = EmulatedModule(packing_program)
    monkeypatch.setattr(compiled, "cuda", lambda: module)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda card: 5, raising=False)
    monkeypatch.setattr(pack_24, "_to_dense_refuses", lambda packed: None)
    monkeypatch.setattr(fragments_24, "_refuses", lambda values: None)
    library = torch.library.Library("sparsekern", "IMPL")
    for name, function in OPS.items():
        library.impl(name, function, "CPU")
    yield module
    library._destroy()
