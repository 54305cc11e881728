"""Compressed checkpoints with one lie each, and a judge who reads them without this package's reader.

mutate(directory, number) changes a copy of a checkpoint in one way; judge(directory, ...) says what became of it. What
is changed and hashed anew is another checkpoint: it must be refused, or loaded as exactly what its files hold.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from sparsekern import checkpoint
from sparsekern.formats import Bitmap, SemiStructured

CONFIG, INDEX, SUMS = "config.json", "sparsekern.safetensors.index.json", "SHA256SUMS"
FORMATS = {"bitmap": (Bitmap, ("values", "bitmap", "row_offsets")), "2:4": (SemiStructured, ("values", "metadata"))}
# what no file says truthfully
NUMBERS = (-1, 0, 1, 7, 2**31, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 1.5, True, None, "3", [], {})
TEXTS = ("", "x", "../x", "/etc/passwd", "a\nb", "\u0000", "é", "model.safetensors", "BF16", "U8", "2:4", "bitmap")


def shards(directory):
    return sorted(directory.glob("sparsekern-*.safetensors"))


def split(path):
    """The header of a safetensors file and its data."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(path, header, data, pad=b" "):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += pad * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def a_file(directory, chance):
    return chance.choice(sorted(path for path in directory.iterdir() if path.is_file()))


# --- any file: its bytes


def flip_a_bit(directory, chance):
    path = a_file(directory, chance)
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def change_bytes(directory, chance):
    path = a_file(directory, chance)
    data = bytearray(path.read_bytes())
    at, count = chance.randrange(len(data)), chance.choice([1, 2, 8, 64])
    piece = bytes(data[at : at + count])
    what = chance.randrange(6)
    if what == 0:
        data[at : at + count] = chance.randbytes(len(piece))
    elif what == 1:
        data[at : at + count] = bytes(len(piece))
    elif what == 2:
        del data[at : at + count]
    elif what == 3:
        data[at:at] = piece
    elif what == 4:
        data += chance.randbytes(count)
    else:
        other = chance.randrange(len(data))
        data[at : at + count], data[other : other + count] = data[other : other + count], piece
    path.write_bytes(data)


def cut_short(directory, chance):
    path = a_file(directory, chance)
    size = path.stat().st_size
    os.truncate(path, chance.choice([0, 1, 7, 8, 9, size // 2, size - 1, chance.randrange(size)]) % size)


def move_files(directory, chance):
    path, what = a_file(directory, chance), chance.randrange(8)
    if what == 0:
        path.unlink()
    elif what == 1:
        path.rename(directory / chance.choice(["model.safetensors", "sparsekern-00003-of-00002.safetensors", "x"]))
    elif what == 2:
        shutil.copy(path, directory / chance.choice(["model.safetensors", "sparsekern-00003-of-00003.safetensors"]))
    elif what == 3:
        path.unlink()
        path.symlink_to(chance.choice(["/etc/passwd", "/dev/zero", "nowhere", path.name, ".."]))
    elif what == 4:
        path.unlink()
        path.mkdir()
    elif what == 5:
        outside = directory.parent / f"{directory.name}.outside"
        path.rename(outside)
        path.symlink_to(outside)
    elif what == 6:
        first, second = chance.sample(sorted(p for p in directory.iterdir() if p.is_file()), 2)
        contents = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(contents)
    else:
        path.unlink()
        os.mkfifo(path)


# --- the headers of the shards


def lie_in_a_header(directory, chance):
    path = chance.choice(shards(directory))
    header, data = split(path)
    names = [name for name in header if name != "__metadata__"]
    name, other = chance.choice(names), chance.choice(names)
    entry, offsets = header[name], header[name]["data_offsets"]
    what = chance.randrange(16)
    if what == 0:
        entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], offsets
    elif what == 1:
        entry["data_offsets"] = list(header[other]["data_offsets"])
    elif what == 2:
        offsets[chance.randrange(2)] += chance.choice([-8, -1, 1, 2, 8])
    elif what == 3:
        entry["data_offsets"] = [offset + chance.choice([-8, -1, 1, 8]) for offset in offsets]
    elif what == 4:
        offsets[chance.randrange(2)] = chance.choice(NUMBERS)
    elif what == 5 and entry["shape"]:
        entry["shape"][chance.randrange(len(entry["shape"]))] = chance.choice(NUMBERS)
    elif what == 6 and entry["shape"]:
        entry["shape"][chance.randrange(len(entry["shape"]))] += chance.choice([-1, 1])
    elif what == 7:
        entry["shape"] = chance.choice([entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]], [], [0], "3"])
    elif what == 8:
        entry["dtype"] = chance.choice(["BF16", "F16", "F32", "F64", "I64", "U64", "I16", "U8", "BOOL", "F4", "", 3])
    elif what == 9:
        header[name], header[other] = header[other], header[name]
    elif what == 10:
        header[chance.choice([f"{name}x", name.rpartition(".")[0], *TEXTS])] = header.pop(name)
    elif what == 11:
        header.pop(name)
    elif what == 12:
        header[chance.choice([f"{name}x", *TEXTS])] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    elif what == 13:
        entry[chance.choice(["dtype", "shape", "data_offsets"])] = chance.choice([*NUMBERS, *TEXTS])
    elif what == 14:
        entry.pop(chance.choice(["dtype", "shape", "data_offsets"]))
    else:
        header["__metadata__"] = chance.choice([*NUMBERS, {"format": 3}, {"a": {}}])
    join(path, header, data)


def lie_around_a_header(directory, chance):
    path = chance.choice(shards(directory))
    header, data = split(path)
    text, what = json.dumps(header), chance.randrange(8)
    if what == 0:
        whole = bytearray(path.read_bytes())
        size = chance.choice([0, 1, 8, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, len(whole) - 8, len(whole) - 7])
        whole[:8] = size.to_bytes(8, "little")
        path.write_bytes(whole)
    elif what == 1:
        name = chance.choice([name for name in header if name != "__metadata__"])
        again = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})[1:-1]
        join(
            path,
            f"{{{again}, {text[1:]}".encode() if chance.random() < 0.5 else f"{text[:-1]}, {again}}}".encode(),
            data,
        )
    elif what == 2:
        join(path, header, data, pad=chance.choice([b"\0", b"x", b"}"]))
    elif what == 3:
        join(path, b"[" * chance.choice([1, 1000, 100_000]), data)
    elif what == 4:
        join(path, text.replace("[", chance.choice(["[NaN, ", "[1e999, ", "[Infinity, ", "[-"]), 1).encode(), data)
    elif what == 5:
        join(path, text.encode().replace(b'"', b'"\xff\xfe', 1), data)
    elif what == 6:
        # the same, otherwise written
        join(path, json.dumps(dict(reversed(list(header.items()))), indent=1).encode(), data)
    else:
        join(path, header, data + bytes(chance.choice([1, 8, 4096])))


# --- the contents of packed layers


def lie_in_a_tensor(directory, chance):
    path = chance.choice(shards(directory))
    header, data = split(path)
    data = bytearray(data)
    fields = [n for n in header if n.rpartition(".")[2] in ("values", "bitmap", "row_offsets", "metadata")]
    if not fields:
        return flip_a_bit(directory, chance)
    start, end = header[chance.choice(fields)]["data_offsets"]
    what = chance.randrange(4)
    if what == 0:
        data[chance.randrange(start, end)] ^= 1 << chance.randrange(8)
    elif what == 1:
        data[start:end] = chance.choice([b"\xff", b"\0", b"\x7f"]) * (end - start)
    elif what == 2:
        at = start + chance.randrange(end - start) // 8 * 8
        data[at : min(at + 8, end)] = chance.choice(NUMBERS[:8]).to_bytes(8, "little", signed=True)[: min(8, end - at)]
    else:
        a, b = sorted(chance.sample(range(start, end), 2))
        data[a], data[b] = data[b], data[a]
    join(path, header, bytes(data))


def swap_tensors(directory, chance):
    """The contents of two tensors of one dtype, of different layers where there are such, trade places."""
    path = chance.choice(shards(directory))
    header, data = split(path)
    names = [name for name in header if name != "__metadata__"]
    pairs = [(a, b) for a in names for b in names if a < b and header[a]["dtype"] == header[b]["dtype"]]
    if not pairs:
        return flip_a_bit(directory, chance)
    a, b = chance.choice(pairs)
    header[a], header[b] = header[b], header[a]
    join(path, header, data)


# --- the JSON files and the sums


def lie_in_json(directory, chance):
    """A random place of config.json or of the index gets another value, goes, or is there twice."""
    path = directory / chance.choice([CONFIG, INDEX])
    content = json.loads(path.read_text())
    key = chance.choice(["quantization_config", None]) if path.name == CONFIG else None
    place = content[key] if key in content else content
    while isinstance(place, dict) and place:
        key = chance.choice(sorted(place))
        if not isinstance(place[key], (dict, list)) or not place[key] or chance.random() < 0.2:
            break
        place = place[key]
    if isinstance(place, list):
        place[chance.randrange(len(place))] = chance.choice([*NUMBERS, *TEXTS])
        path.write_text(json.dumps(content))
        return
    what = chance.randrange(5)
    if what == 0:
        place.pop(key)
    elif what == 1:
        place[chance.choice([*TEXTS, f"{key}x"])] = place.pop(key)
    elif what == 2:
        name = json.dumps(key)
        text = json.dumps(content)
        path.write_text(text.replace(f"{name}:", f"{name}: {json.dumps(chance.choice(NUMBERS))}, {name}:", 1))
        return
    else:
        place[key] = chance.choice([*NUMBERS, *TEXTS])
    path.write_text(json.dumps(content))


def leave_by_the_index(directory, chance):
    path = directory / INDEX
    index = json.loads(path.read_text())
    name = chance.choice(sorted(index["weight_map"]))
    target = index["weight_map"][name]
    here = directory.name
    escapes = [f"../{here}/{target}", f"./{target}", str(directory / target), f"x/../{target}", f"../{target}"]
    others = [f"{target}\0", f"{target} ", "/etc/passwd", "model.safetensors", "sparsekern-00009-of-00009.safetensors"]
    index["weight_map"][name] = chance.choice([*escapes, *others, target.upper()])
    path.write_text(json.dumps(index))


def newer_version(directory, chance):
    config = json.loads((directory / CONFIG).read_text())
    config["quantization_config"]["format_version"] = chance.choice([2, 3, 2**40, 1.0, "1", 0, -1, None, [1]])
    (directory / CONFIG).write_text(json.dumps(config))


def write_json_otherwise(directory, chance):
    """The same, otherwise written."""
    path = directory / chance.choice([CONFIG, INDEX])
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, indent=chance.choice([None, 1, 7]), sort_keys=chance.random() < 0.5) + " \n\n")


def lie_in_the_sums(directory, chance):
    path = directory / SUMS
    lines, what = path.read_text().splitlines(), chance.randrange(9)
    at = chance.randrange(len(lines))
    if what == 0:
        lines.pop(at)
    elif what == 1:
        lines.append(lines[at])
    elif what == 2:
        lines[at] = f"{lines[at][:64]}  ../{directory.name}/{lines[at][66:]}"
    elif what == 3:
        lines.append(f"{hashlib.sha256(Path('/etc/passwd').read_bytes()).hexdigest()}  /etc/passwd")
    elif what == 4:
        lines[at] = lines[at][:64].upper() + lines[at][64:]
    elif what == 5:
        lines[at] = f"{lines[at][:63]}  {lines[at][66:]}"
    elif what == 6:
        lines[at] = f"{chance.randbytes(32).hex()}  {lines[at][66:]}"
    elif what == 7:
        lines[at] = lines[at].replace("  ", " *")
    else:
        chance.shuffle(lines)
    path.write_text("\n".join(lines) + chance.choice(["\n", "\n\n", "\r\n", ""]))


# as often as there are ways in each
MUTATIONS = (
    *(flip_a_bit, flip_a_bit, flip_a_bit, change_bytes, change_bytes, cut_short, cut_short, move_files),
    *(lie_in_a_header, lie_in_a_header, lie_in_a_header, lie_around_a_header, lie_around_a_header),
    *(lie_in_a_tensor, lie_in_a_tensor, lie_in_a_tensor, swap_tensors, lie_in_json, lie_in_json, lie_in_json),
    *(leave_by_the_index, newer_version, write_json_otherwise, lie_in_the_sums),
)


def hash_again(directory):
    """Write SHA256SUMS over what lies there now, whatever it is."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != SUMS)
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (directory / SUMS).write_text(sums)


def mutate(directory, number):
    """Change the checkpoint in one way; returns its name and whether the hashes were made to agree."""
    chance = random.Random(number)
    mutation = MUTATIONS[number % len(MUTATIONS)]
    mutation(directory, chance)
    fresh = (number // len(MUTATIONS)) % 2 == 1 and mutation is not lie_in_the_sums
    if fresh and not (directory / SUMS).is_symlink() and not (directory / SUMS).is_dir():
        (directory / SUMS).unlink(missing_ok=True)
        hash_again(directory)
    return mutation.__name__, fresh


def contents(directory):
    """Every tensor of the checkpoint, dense, by the safetensors library and the formats' own reference."""
    tensors = {}
    for path in shards(directory):
        tensors |= load_file(path)
    for name, entry in json.loads((directory / CONFIG).read_text())["quantization_config"]["layers"].items():
        format, fields = FORMATS[entry["format"]]
        packed = format(*(tensors.pop(f"{name}.{field}") for field in fields), entry["shape"][1])
        packed.validate()
        # a -0.0 among the kept values of a packed layer is loaded as +0.0
        tensors[f"{name}.weight"] = packed.to_dense() + 0.0
    return tensors


def same(a, b):
    """Whether two dictionaries hold the same tensors, bit by bit."""

    def described(tensor):
        return tensor.dtype, tensor.shape, tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(described(a[name]) == described(b[name]) for name in a)


def judge(directory, original, load, fresh):
    """What became of a mutated checkpoint: "refused", "equal", "another", or a fault in words.

    original  contents() of the checkpoint before
    load      (directory, hashes) -> the tensors that were loaded, by name; what it lacks is not compared
    fresh     the hashes were made to agree

    "equal" holds what the original held. "another" is, hashed anew or not hashed, what its files say it is.
    """
    verdicts = []
    for hashes in (True, False):
        for step in (
            lambda hashes=hashes: checkpoint.verify(directory, hashes=hashes),
            lambda hashes=hashes: load(directory, hashes),
        ):
            try:
                result = step()
            except ValueError as error:
                verdicts.append("refused" if str(error) else "fault: refused without a word")
                continue
            except Exception as error:  # noqa: BLE001 - what a user would see as a crash
                verdicts.append(f"fault: {type(error).__name__}: {error}")
                continue
            try:
                held = contents(directory)
            except Exception as error:  # noqa: BLE001 - the library refuses what was accepted
                verdicts.append(f"fault: accepted, but {type(error).__name__}: {error}")
                continue
            if isinstance(result, dict) and not same(result, {name: held[name] for name in result}):
                verdicts.append(f"fault: loaded is not what the files hold, hashes={hashes}")
            elif same(held, original):
                verdicts.append("equal")
            else:
                verdicts.append("another" if fresh or not hashes else "fault: accepted in spite of its hashes")
    faults = [verdict for verdict in verdicts if verdict.startswith("fault")]
    return faults[0] if faults else max(verdicts, key=["refused", "equal", "another"].index)
