"""checkpoint: a model with its layers packed, on the disk and back; manifest.py says what lies there.

What is packed is canonical (formats/), never a kernel's own order. -0.0 in a packed weight comes back as +0.0; every
other bit is kept.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import hf
from sparsekern.convert import convert
from sparsekern.formats import BitmapInt8, Dense
from sparsekern.linear import SparseLinear
from sparsekern.manifest import INDEX, Manifest, check_sums, read_manifest, write_compressed
from sparsekern.packed_layer import CONFIG, Packed, PackedLayer
from sparsekern.packing import PackReport, choose, pack, part_of
from sparsekern.plan import Plan, Unmeasured
from sparsekern.publish import publish
from sparsekern.shards import DTYPES, NAMES, SHARD_BYTES, Part, Reader, Stored, in_order
from sparsekern.state import Slot, fill, slots, tied
from sparsekern.swap import is_tied_copy, reconsider, replace_module

__all__ = ["PackReport", "VerifyReport", "convert", "load", "read_into", "save", "verify"]


def save(
    model: nn.Module,
    directory: str | Path,
    tokenizer=None,
    *,
    files: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> PackReport:
    """Write `model` as a compressed checkpoint, of transformers or any other nn.Module.

    tokenizer    or processor, saved beside the model
    files        name -> text, written beside them: README.md is the model's card
    shard_bytes  at most so many a file, or one tensor where that is more

    SparseLinear layers are packed as they are; nn.Linear layers that hold zeros as a bitmap or, where it holds and
    is smaller, as 2:4; they stay dense where packing does not pay or their weight is tied. A tensor at a time is
    packed and written.
    The directory appears by one rename, synced, complete or not at all. Raises FileExistsError when it exists already
    and ValueError for a model that cannot be stored: on the meta device, quantised otherwise, or with adapters on it.
    """
    layers, parts, report = _pack(model)
    with publish(directory) as unfinished:
        if not hf.write_config(model, unfinished):
            (unfinished / CONFIG).write_text(json.dumps({"architectures": [type(model).__name__]}), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        for name, content in (files or {}).items():
            (unfinished / name).write_text(content, encoding="utf-8")
        write_compressed(unfinished, layers, parts, shard_bytes)
    return report


@dataclass
class VerifyReport:
    """What verify() found to be true.

    layers       the packed layers as config.json has them
    tensors      how many tensors are stored
    bytes        of every tensor as it is stored
    dense_bytes  what they would take unpacked
    sha256       of each file, by name; empty when hashes were not asked for
    model        the class of transformers that needs these tensors in these shapes, or why none was asked
    """

    directory: str
    layers: dict[str, dict[str, Any]]
    tensors: int
    bytes: int
    dense_bytes: int
    sha256: dict[str, str]
    model: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        hashes = f"{len(self.sha256)} files match SHA256SUMS" if self.sha256 else "hashes were not checked"
        return (
            f"{self.directory}: {self.tensors} tensors, {len(self.layers)} packed layers, {self.bytes:,} bytes "
            f"({self.dense_bytes / max(self.bytes, 1):.2f}x smaller than dense); {hashes}; "
            f"{self.model}"
        )


def verify(directory: str | Path, hashes: bool = True) -> VerifyReport:
    """Check everything that a compressed checkpoint says, tensor by tensor, without building the model.

    hashes  also every file against SHA256SUMS

    Raises ValueError, naming file, tensor, rule and value, for the first thing that is not true.
    """
    manifest = read_manifest(directory)
    digests = check_sums(manifest.directory) if hashes else {}
    with Reader() as reader:
        for name in manifest.layers:
            manifest.packed(name, reader)
            reader.forget()
    layers = {name: layer.to_json() for name, layer in manifest.layers.items()}
    stored = sum(stored.nbytes for stored in manifest.tensors.values())
    dense, model = _dense_bytes(manifest), _compare(manifest)
    return VerifyReport(str(directory), layers, len(manifest.tensors), stored, dense, digests, model)


def load(
    directory: str | Path,
    *,
    into: nn.Module | None = None,
    hashes: bool = True,
    tokens: Iterable[int] = (1,),
    plan: Plan | Unmeasured | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model of a compressed checkpoint, its packed layers as SparseLinear.

    into    a module of the same class to fill; None builds the model of transformers that config.json names
    hashes  first check every file against SHA256SUMS
    plan    what decides, with its measurements, which layers are faster packed at `tokens`; the others become nn.Linear
            again. None leaves all packed
    dtype   of the weights; None keeps the checkpoint's own

    Raises ValueError, naming file, tensor, rule and value, when anything in the checkpoint is not true.
    """
    if into is not None:
        model = read_into(into, directory, hashes=hashes)
        model = model if dtype is None else model.to(dtype)
    else:
        manifest = read_manifest(directory)
        if hashes:
            check_sums(manifest.directory)
        model = hf.load(directory, dtype=dtype)
    if plan is not None:
        reconsider(model, plan, tokens)
    return model


def read_into(model: nn.Module, directory: str | Path, *, hashes: bool = True) -> nn.Module:
    """Fill `model`, any nn.Module of the class that was saved, on any device; nn.Linear becomes SparseLinear.

    Each tensor takes the dtype that it was saved in. Every name and shape is compared, and every packed layer checked,
    before anything in `model` changes. Raises ValueError naming what does not fit.
    """
    manifest = read_manifest(directory)
    if hashes:
        check_sums(manifest.directory)
    found = slots(model)
    wanted = _fit(model, manifest, found)
    sparse: dict[str, SparseLinear] = {}
    with Reader() as reader:
        for name in manifest.layers:
            bias = manifest.tensors.get(f"{name}.bias")
            sparse[name] = _sparse_linear(model.get_submodule(name), manifest.packed(name, reader), bias, reader)
            reader.forget()
        for name, stored in in_order(manifest.others()):
            if name in wanted:
                fill(found, wanted[name], reader.read(stored))
                reader.forget()
    # a module that stands in two places is replaced in both
    replaced = {id(model.get_submodule(name)): module for name, module in sparse.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in replaced:
            replace_module(model, name, replaced[id(module)])
    return model


def _compare(manifest: Manifest) -> str:
    """The model that config.json describes needs what is stored, in its shapes. Raises ValueError when it does not.

    Returns its class, or why it was not asked: it is none of transformers' own, or they rename its tensors.
    """
    if "model_type" not in manifest.config or "auto_map" in manifest.config:
        return "not compared with a model: config.json names none of transformers' own"
    model = hf.skeleton(manifest.directory)
    kind, found, stored = type(model).__name__, slots(model), manifest.others()
    shapes = {name: (stored.shape, None) for name, stored in stored.items()}
    shapes |= {f"{name}.weight": (layer.shape, name) for name, layer in manifest.layers.items()}
    for name, (shape, layer) in shapes.items():
        if name in found and tuple(found[name].tensor.shape) != shape:
            raise ValueError(
                f"{CONFIG}: {kind} needs {name} to be {list(found[name].tensor.shape)}, got {list(shape)}: "
                "the config and the tensors are not of one model"
            )
        if layer and name in found and type(found[name].module) is not nn.Linear:
            raise ValueError(f"{CONFIG}: {layer} is packed, but in {kind} it is no nn.Linear")
    if strangers := sorted(shapes.keys() - found.keys()):
        return f"not compared with {kind} as a whole: it has no {strangers[0]}, unless transformers renames it"
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for names in tied(found):
        if not shapes.keys() & set(names) and not set(names) <= set(ignored):
            raise ValueError(f"{INDEX}: {kind} needs {names[0]}, which is not stored")
    return f"all that {kind} needs"


def _pack(model: nn.Module) -> tuple[dict[str, PackedLayer], list[Part], PackReport]:
    """How each tensor of `model` will be written."""
    if isinstance(model, SparseLinear) or type(model) is nn.Linear:
        raise ValueError("model is one layer, which has no name; put it into a module, such as nn.Sequential")
    layers: dict[str, PackedLayer] = {}
    parts: list[Part] = []
    report = PackReport()
    for name, module in model.named_modules():
        if not isinstance(module, SparseLinear):
            continue
        # what has the bits of the input embedding is made of it again; what was rounded is not
        if module.format is not BitmapInt8 and is_tied_copy(model, name, module) is not None:
            continue
        if module.format is Dense:
            weight = module.packed.to_dense()
            parts.append(_weight_part(name, weight, module.bias, layers, report))
            report.dense_bytes += weight.nbytes
        else:
            layers[name] = PackedLayer.of(
                module.format, (module.out_features, module.in_features), module.dtype, module.kept, module.group_size
            )
            parts.append(part_of(name, layers[name], module.kept, lambda module=module: module.packed))
            report.dense_bytes += module.out_features * module.in_features * module.dtype.itemsize
    found = slots(model)
    for names in tied(found):
        name = _stored_name(model, names)
        if name is None:
            continue
        module, tensor = found[name].module, found[name].tensor.detach()
        _refuse_tensor(name, tensor)
        report.dense_bytes += tensor.nbytes
        layer = name.rpartition(".")[0]
        if len(names) == 1 and type(module) is nn.Linear and found[name].own == "weight":
            parts.append(_weight_part(layer, tensor, module.bias, layers, report))
            continue
        parts.append(Part({name: (tensor.dtype, tuple(tensor.shape))}, lambda name=name, tensor=tensor: {name: tensor}))
        if len(names) > 1:
            linear = (n for n in names if type(found[n].module) is nn.Linear and found[n].own == "weight")
            report.left += [(other.rpartition(".")[0], "its weight is tied") for other in linear]
    report.bytes = sum(part.nbytes for part in parts)
    report.packed = {name: layer.to_json() for name, layer in layers.items()}
    return layers, parts, report


def _weight_part(
    layer: str, weight: Tensor, bias: Tensor | None, layers: dict[str, PackedLayer], report: PackReport
) -> Part:
    """How the weight of a dense layer will be written; where it is packed, that is put into `layers`."""
    chosen = choose(weight, bias=None if bias is None else bias.dtype)
    if isinstance(chosen, str):
        report.left.append((layer, chosen))
        name = f"{layer}.weight"
        return Part({name: (weight.dtype, tuple(weight.shape))}, lambda: {name: weight})
    layers[layer], kept = chosen
    format = layers[layer].format
    return part_of(layer, layers[layer], kept, lambda: pack(weight, format))


def _stored_name(model: nn.Module, names: list[str]) -> str | None:
    """Which of `names`, which are one tensor, is stored: the one that transformers looks for; None for none."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    copies = getattr(model, "all_tied_weights_keys", None) or {}
    names = [name for name in names if name not in ignored]
    return next((name for name in names if name not in copies), names[0] if names else None)


def _refuse_tensor(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device; load the model without offloading (device_map=None)")
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.dtype not in NAMES:
        raise ValueError(
            f"{name} must be a plain tensor of {', '.join(DTYPES)}, got a {type(tensor).__name__} of {tensor.dtype}"
        )


def _fit(model: nn.Module, manifest: Manifest, found: Mapping[str, Slot]) -> dict[str, list[str]]:
    """The stored name -> the names in `model` that it fills. Raises ValueError when the two do not fit together."""
    kind, stored = type(model).__name__, manifest.others()
    modules = dict(model.named_modules())
    found = dict(found)
    for name, layer in manifest.layers.items():
        module = modules.get(name)
        if type(module) is not nn.Linear and not isinstance(module, SparseLinear):
            raise ValueError(
                f"{name} is packed in {str(manifest.directory)!r}, so {kind} must have an nn.Linear there, "
                f"got {'nothing' if module is None else type(module).__name__}"
            )
        if (module.out_features, module.in_features) != layer.shape:
            raise ValueError(f"{name}: must be {list(layer.shape)}, got {[module.out_features, module.in_features]}")
        found.pop(f"{name}.weight", None)
    wanted = {}
    for names in tied(found):
        there = [name for name in names if name in stored]
        if len(there) != 1:
            raise ValueError(
                f"{names[0]} of {kind} is stored {len(there)} times in {str(manifest.directory)!r}"
                + (f", as {' and '.join(there)}, and is one tensor in the model" if there else "")
            )
        if (shape := tuple(found[names[0]].tensor.shape)) != stored[there[0]].shape:
            raise ValueError(
                f"{there[0]}: must be {list(stored[there[0]].shape)} as stored, got {list(shape)} in {kind}"
            )
        wanted[there[0]] = names
    if unused := sorted(stored.keys() - wanted.keys()):
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise ValueError(f"{unused[0]}{more} of {str(manifest.directory)!r} has no place in {kind}")
    return {name: names for name, names in wanted.items() if name.rpartition(".")[0] not in manifest.layers}


def _sparse_linear(module: nn.Module, packed: Packed, bias: Stored | None, reader: Reader) -> SparseLinear:
    """`module` with `packed` as its weight, on its device, of which no tensor is a view of the mapped file."""
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors and not tensors[0].is_meta else torch.device("cpu")
    mapped = {name: value for name, value in vars(packed).items() if isinstance(value, Tensor)}
    fields = {name: value.to(device) for name, value in mapped.items()}
    own = replace(packed, **fields)
    made = SparseLinear(own, None if bias is None else reader.read(bias).to(device, copy=True))
    addresses = {value.data_ptr() for value in mapped.values()}
    for name, operand in list(made._buffers.items()):
        if operand is not None and operand.data_ptr() in addresses:
            setattr(made, name, operand.clone())
    return made.train(module.training)


def _dense_bytes(manifest: Manifest) -> int:
    packed = sum(math.prod(layer.shape) * layer.dtype.itemsize for layer in manifest.layers.values())
    return packed + sum(stored.nbytes for stored in manifest.others().values())
