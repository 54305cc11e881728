"""compressed_tensors: the two layouts by hand, what the package itself wrote, and what is refused.

compressed_tensors_0_14/ was written by compressed-tensors 0.14.0: a Llama of one block, its layers pruned to 2:4 with
one group of a single weight, and to half of the weights; Sparse24BitMaskCompressor and BitmaskCompressor over its
state dict; config.json by ModelCompressor.update_config. The .safetensors beside each is what went in.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsekern import checkpoint, hf
from sparsekern.checkpoint import convert
from sparsekern.shards import Reader
from sparsekern.sources import open_source

WRITTEN = Path(__file__).parent / "compressed_tensors_0_14"
LAYOUTS = ("sparse-24-bitmask", "sparse-bitmask")
BY_HAND = {
    "sparse-24-bitmask": {
        "a.shape": torch.tensor([[2], [12]]),
        "a.compressed": torch.tensor([[1.0, 2, 3, 4, 5, 6], [7, -0.0, 8, 9, 0, 10]]),
        # low bits first: inputs 0 and 1, 4 and 7, 9 and 10; then 2 and 3, 5 and 6, 8 and 11
        "a.bitmask": torch.tensor([[0b10010011, 0b0110], [0b01101100, 0b1001]], dtype=torch.uint8),
    },
    "sparse-bitmask": {
        "a.shape": torch.tensor([2, 12]),
        "a.compressed": torch.tensor([1.0, 2, 3, 4]),
        "a.bitmask": torch.tensor([[0, 0], [0b10000011, 0b1000]], dtype=torch.uint8),
        "a.row_offsets": torch.tensor([0, 0]),
    },
}
DENSE = {
    "sparse-24-bitmask": [[1.0, 2, 0, 0, 3, 0, 0, 4, 0, 5, 6, 0], [0, 0, 7, 0, 0, 8, 9, 0, 0, 0, 0, 10]],
    "sparse-bitmask": [[0.0] * 12, [1, 2, 0, 0, 0, 0, 0, 3, 0, 0, 0, 4]],
}


def by_hand(directory, layout, **changed):
    """A checkpoint of one layer; `changed` are its fields and what config.json says."""
    directory.mkdir()
    config = {"quant_method": "compressed-tensors", "version": "0.14.0", "sparsity_config": {"format": layout}}
    config |= changed.pop("config", {})
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    tensors = BY_HAND[layout] | {f"a.{field}": tensor for field, tensor in changed.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors | {"norm": torch.ones(3)}, directory / "model.safetensors")
    return directory


def dense(directory, name="a"):
    with Reader() as reader:
        return open_source(directory, reader).layers[name].dense(reader)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_is_the_one_written_here(layout, tmp_path):
    assert dense(by_hand(tmp_path / "a", layout)).tolist() == DENSE[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("to", ["dense", "bitmap", "2:4"])
def test_what_the_package_wrote_gets_a_home(layout, to, tmp_path):
    expected = load_file(WRITTEN / f"{layout}.safetensors")
    report = convert(WRITTEN / layout, tmp_path / "out", to)
    assert "compressed-tensors" not in (tmp_path / "out" / "config.json").read_text()
    if to == "dense":
        loaded = hf.load(tmp_path / "out")
    else:
        checkpoint.verify(tmp_path / "out")
        # at this size the offsets of a bitmap's rows make most layers too large
        assert {layer["format"] for layer in report.packed.values()} == {to}
        loaded = checkpoint.read_into(hf.skeleton(tmp_path / "out"), tmp_path / "out")
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        # -0.0 is +0.0
        assert torch.equal(weight, expected[name]), name


def test_a_name_that_ends_in_weight_is_the_layers_too(tmp_path):
    directory = by_hand(tmp_path / "a", "sparse-bitmask")
    tensors = load_file(directory / "model.safetensors")
    save_file({name.replace("a.", "a.weight."): t for name, t in tensors.items()}, directory / "model.safetensors")
    assert dense(directory).tolist() == DENSE["sparse-bitmask"]


GROUPS = {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}


@pytest.mark.parametrize(
    ("layout", "changed", "message"),
    [
        (
            0,
            {"config": {"config_groups": GROUPS, "format": "float-quantized"}},
            r"config_groups \(float-quantized\) is quant",
        ),
        (
            1,
            {"config": {"transform_config": {"config_groups": GROUPS}}},
            "with transform_config .* is quantised and not",
        ),
        (1, {"config": {"sparsity_config": {"format": "marlin-24"}}}, "must have format .*, got 'marlin-24'"),
        (
            1,
            {"config": {"sparsity_config": {}}},
            "a: must have a dense weight, got bitmask, compressed, row_offsets, sh",
        ),
        (
            0,
            {"config": {"sparsity_config": {"format": "sparse-bitmask"}}},
            "a: must have bitmask, compressed, row_offsets",
        ),
        (0, {"weight_scale": torch.ones(1)}, "a.weight_scale: quantised weights of compressed-tensors are not read"),
        (
            0,
            {"compressed": torch.zeros(2, 6, dtype=torch.float8_e4m3fn)},
            "must be bfloat16, float16 or float32, got .*e4m3",
        ),
        (0, {"shape": None}, "a: must have bitmask, compressed, shape of sparse-24-bitmask, got bitmask, compressed"),
        (1, {"row_offsets": None}, "a: must have bitmask, compressed, row_offsets, shape of sparse-bitmask, got"),
        (0, {"weight": torch.zeros(2, 12)}, "a is stored packed and dense"),
        (0, {"shape": torch.tensor([2.0, 12])}, "a.shape must be two int64"),
        (0, {"shape": torch.tensor([2, 12, 1])}, "a.shape must be two int64"),
        (0, {"shape": torch.tensor([-2, 12])}, "a.shape must be sizes of a tensor"),
        (
            0,
            {"shape": torch.tensor([2, 11])},
            "a: in_features of .* must be a multiple of 4, got 11",
        ),
        (0, {"shape": torch.tensor([2, 24])}, r"a.bitmask must be \[2, 3\] of torch.uint8, got \[2, 2\]"),
        (1, {"shape": torch.tensor([3, 12])}, r"a.bitmask must be \[3, 2\]"),
        (
            1,
            {"row_offsets": torch.tensor([0, 1])},
            "model.safetensors: a: bitmap keeps 0 weights in row 0, row_offsets say 1",
        ),
        (1, {"row_offsets": torch.tensor([0, 9])}, "a: row_offsets must not fall"),
        (1, {"compressed": torch.ones(5)}, "a: bitmap keeps 4 weights in row 1, row_offsets say 5"),
        (0, {"bitmask": torch.tensor([[0b10010011, 0b0110], [0b01101010, 0b1001]], dtype=torch.uint8)}, None),
        (
            0,
            {"bitmask": torch.tensor([[0b10010011, 0b0110], [0b01110100, 0b1001]], dtype=torch.uint8)},
            r"a: bitmask must keep two of every four inputs, not so in row 1, columns 0\.\.3",
        ),
        (
            0,
            {"bitmask": torch.tensor([[0b10010011, 0b0110], [0b01101100, 0b10000001]], dtype=torch.uint8)},
            "0 after input 11",
        ),
    ],
)
def test_what_is_quantised_or_contradicts_is_refused(layout, changed, message, tmp_path):
    directory = by_hand(tmp_path / "a", LAYOUTS[layout], **changed)
    if message is None:
        # other positions are another weight
        dense(directory)
        return
    with pytest.raises(ValueError, match=message):
        dense(directory)


@pytest.mark.parametrize("method", ["gptq", "awq", 3])
def test_other_quantised_weights_are_refused(method, tmp_path):
    directory = by_hand(tmp_path / "a", LAYOUTS[0], config={"quant_method": method})
    with pytest.raises(ValueError, match=f"weights quantised by {method!r} are not read; dequantize the model first"):
        dense(directory)
