"""Tiny models that are half zeros, and the files of their checkpoints, to be changed."""

import json
import os

from torch import nn

import sparsekern as sk
from sparsekern import hf
from tests import tiny_models

SHARD = "sparsekern-00001-of-00001.safetensors"
INDEX = "sparsekern.safetensors.index.json"
TENSORS = {"bitmap": ("values", "bitmap", "row_offsets"), "2:4": ("values", "metadata")}


def halve(model: nn.Module) -> nn.Module:
    """`model` with half of each layer's weights at zero: the second, fourth, ... layer is 2:4, the others are not."""
    for number, (_, layer) in enumerate(hf.layers(model)):
        weight = hf.weight(layer)
        if number % 2:
            weight[:, ::2] = 0
        else:
            weight[:, : weight.shape[1] // 2] = 0
    return model


def sparse(name: str) -> nn.Module:
    """The tiny model `name`, half of it pruned, with a SparseLinear wherever one can be."""
    model = halve(tiny_models.make(name))
    sk.sparsify(model, plan=sk.Unmeasured())
    return model


def read(directory, file: str) -> dict:
    with open(os.path.join(directory, file)) as opened:
        return json.load(opened)


def dump(directory, file: str, content: dict) -> None:
    with open(os.path.join(directory, file), "w") as opened:
        json.dump(content, opened)
