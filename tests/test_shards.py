"""shards: the layout by hand, what other readers make of it, and every lie in a header that is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparsekern.shards import MAX_HEADER_BYTES, Part, Reader, read_header, read_json, write, write_file


def parts(tensors):
    return [
        Part({name: (tensor.dtype, tuple(tensor.shape))}, lambda name=name, tensor=tensor: {name: tensor})
        for name, tensor in tensors.items()
    ]


def by_hand(path, header, data, length=None):
    """A safetensors file with exactly this header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start, end, shape, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_file_is_written_as_it_is_written_here(tmp_path):
    tensors = {"a": torch.tensor([1, 2], dtype=torch.uint8), "b": torch.tensor([3], dtype=torch.int16)}
    write_file(tmp_path / "f", parts(tensors))
    header = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"I16","shape":[1],"data_offsets":[0,2]},'
        b'"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}'
    )
    header += b" " * (-len(header) % 8)
    assert (tmp_path / "f").read_bytes() == len(header).to_bytes(8, "little") + header + b"\3\0\1\2"


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int8, torch.bool)
DTYPES += (torch.float8_e4m3fn, torch.uint16)


def test_the_safetensors_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    tensors = {f"{dtype}".replace("torch.", ""): torch.arange(7).view(7, 1).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 5), "slice": torch.arange(12.0).view(3, 4)[:, 1:3]}
    write_file(tmp_path / "ours", parts(tensors))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    loaded = load_file(tmp_path / "ours")
    with safe_open(tmp_path / "ours", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    for file in ("ours", "theirs"):
        stored = read_header(tmp_path / file)
        assert stored.keys() == tensors.keys()
        with Reader() as reader:
            for name, tensor in tensors.items():
                assert reader.read(stored[name]).dtype == loaded[name].dtype == tensor.dtype
                assert torch.equal(reader.read(stored[name]).double(), tensor.double())
                assert torch.equal(loaded[name].double(), tensor.double())
                reader.forget()
                assert torch.equal(reader.read(stored[name]).double(), tensor.double())


def test_a_tensor_that_is_not_aligned_is_read(tmp_path):
    header = {"a": entry(0, 1, [1]), "b": entry(1, 9, [2], "F32")}
    data = b"\7" + torch.tensor([1.5, -2.5]).numpy().tobytes()
    stored = read_header(by_hand(tmp_path / "f", header, data))
    with Reader() as reader:
        assert reader.read(stored["b"]).tolist() == [1.5, -2.5]


def test_a_shard_is_as_large_as_it_may_be_and_a_part_is_never_split(tmp_path):
    made = []

    def part(name, size):
        def make():
            made.append(name)
            return {f"{name}.x": torch.zeros(size, dtype=torch.uint8), f"{name}.y": torch.ones(1)}

        return Part({f"{name}.x": (torch.uint8, (size,)), f"{name}.y": (torch.float32, (1,))}, make)

    index = write(tmp_path, "s", [part("a", 6), part("b", 6), part("c", 100), part("d", 1)], shard_bytes=20)
    names = ["s-00001-of-00003.safetensors", "s-00002-of-00003.safetensors", "s-00003-of-00003.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    files = {name: names[{"a": 0, "b": 0, "c": 1, "d": 2}[name[0]]] for name in index["weight_map"]}
    assert index == {"metadata": {"total_size": 113 + 16}, "weight_map": files}
    assert made == ["a", "b", "c", "d"]


def test_a_part_that_became_something_else_is_an_error(tmp_path):
    part = Part({"a": (torch.uint8, (2,))}, lambda: {"a": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match=r"a must be \[2\] of torch.uint8, got \[3\] .* changed while it was saved"):
        write_file(tmp_path / "f", [part])


def test_of_no_tensor_there_is_no_shard(tmp_path):
    assert write(tmp_path, "s", [], 1) == {"metadata": {"total_size": 0}, "weight_map": {}}
    assert not list(tmp_path.iterdir())


def test_two_parts_of_one_name_and_shards_of_nothing_are_refused(tmp_path):
    twice = parts({"a": torch.zeros(1)}) * 2
    with pytest.raises(ValueError, match="two tensors are called 'a'"):
        write(tmp_path, "s", twice, 100)
    with pytest.raises(ValueError, match="shard_bytes must be at least 1, got 0"):
        write(tmp_path, "s", [], 0)


GOOD = {"a": entry(0, 2, [2]), "b": entry(2, 4, [1, 2])}
LIES = {
    "a gap": ({**GOOD, "b": entry(3, 5, [2])}, b"12345", "b and a leave a gap: data_offsets begin at 3, expected 2"),
    "an overlap": ({**GOOD, "b": entry(1, 3, [2])}, b"123", "b and a overlap: data_offsets begin at 1, expected 2"),
    "one place for two": ({**GOOD, "b": entry(0, 2, [2])}, b"12", "b and a overlap"),
    "a late start": ({"a": entry(1, 3, [2])}, b"123", "a and the header leave a gap"),
    "falling offsets": ({"a": entry(2, 0, [2])}, b"12", r"a: data_offsets must ascend .* got \[2, 0\]"),
    "negative offsets": ({"a": entry(-2, 0, [2])}, b"12", "data_offsets must ascend"),
    "offsets past the end": ({"a": entry(0, 3, [3])}, b"12", "must ascend within the file's 2 bytes"),
    "a larger shape": ({"a": entry(0, 2, [3])}, b"12", r"a: data_offsets must span the 3 bytes of \[3\] U8"),
    "another dtype": ({"a": entry(0, 2, [2], "BF16")}, b"12", "must span the 4 bytes"),
    "an unknown dtype": ({"a": entry(0, 2, [2], "X7")}, b"12", "dtype must be one of .* got 'X7'"),
    "a dtype that is a list": ({"a": entry(0, 2, [2], ["U8"])}, b"12", "dtype must be one of"),
    "a shape below zero": ({"a": entry(0, 2, [-1, -2])}, b"12", "shape must be sizes of a tensor"),
    "a shape of fractions": ({"a": entry(0, 2, [2.0])}, b"12", "shape must be sizes"),
    "a shape of truths": ({"a": entry(0, 1, [True])}, b"1", "shape must be sizes"),
    "a huge shape without elements": ({"a": entry(0, 0, [0, 2**62, 4])}, b"", "shape must be sizes"),
    "too many dimensions": ({"a": entry(0, 1, [1] * 65)}, b"1", "shape must be sizes"),
    "an offset that is text": ({"a": {**entry(0, 1, [1]), "data_offsets": ["0", 1]}}, b"1", "two whole numbers"),
    "a missing field": ({"a": {"dtype": "U8", "shape": []}}, b"", "must have dtype, shape and data_offsets"),
    "one more field": ({"a": {**entry(0, 1, [1]), "x": 1}}, b"1", "must have dtype, shape and data_offsets"),
    "bytes that follow": (GOOD, b"12345", "must end with its last tensor at byte .*: it has more"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__ must hold texts"),
    "a name of control characters": ({"a\n": entry(0, 1, [1])}, b"1", "names must be printable"),
    "no name": ({"": entry(0, 1, [1])}, b"1", "names must be printable"),
    "half a surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", "must be printable"),
    "a list": (b"[]", b"", "must be a JSON object"),
    "no JSON": (b"{", b"", "is not JSON"),
    "no text": (b"\xff\xfe", b"", "is not JSON"),
    "one name twice": (b'{"a":1,"a":1}', b"", "'a' is there twice"),
    "NaN": (b'{"a":NaN}', b"", "NaN is no number"),
    "a deep nest": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "is not JSON"),
    "a number without end": (b'{"a":' + b"1" * 10_000 + b"}", b"", "is not JSON|must have dtype"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_with_the_file_and_the_rule(lie, tmp_path):
    header, data, pattern = LIES[lie]
    with pytest.raises(ValueError, match=rf"^f: .*({pattern}).*fetch it or save it again$") as error:
        read_header(by_hand(tmp_path / "f", header, data))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1, 40])
def test_a_header_that_is_longer_than_its_file_or_the_limit_is_refused(length, tmp_path):
    with pytest.raises(ValueError, match=rf"f: its header must fit in .* got a length of {length:,}"):
        read_header(by_hand(tmp_path / "f", b"{}", b"", length))


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_without_a_header_is_refused(size, tmp_path):
    (tmp_path / "f").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"f: must hold at least the 8 bytes .* got {size}"):
        read_header(tmp_path / "f")


def test_every_way_to_cut_a_file_short_is_refused(tmp_path):
    write_file(tmp_path / "f", parts({"a": torch.ones(3), "b": torch.ones(5, dtype=torch.uint8)}))
    whole = (tmp_path / "f").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="^f: "):
            read_header(tmp_path / "f")


def test_a_json_file_of_any_other_size_or_kind_is_refused(tmp_path):
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(ValueError, match="huge.json: must have at most 100,000,000 bytes, got 100,000,001"):
        read_json(tmp_path / "huge.json")
