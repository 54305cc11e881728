"""hf_quantizer: with sparsekern imported, transformers' own from_pretrained and save_pretrained know compressed models.

What from_pretrained does, in its order, and what is done here at each step:

    reads config.json             its quantization_config is checked: SparsekernConfig
    looks for the weights         they are where INDEX says: without this plug-in there is nothing to find
    builds the model on meta      each packed layer becomes Awaiting, with room for what the files declare
    reads, casts, places          nothing: packed tensors are tensors like any other. A dtype casts the kept values
    hands the model over          each Awaiting is validated and becomes a SparseLinear; nothing random may be left

No layer becomes dense on the way, but for one 2:4 layer at a time. A kernel reads nothing that was not validated. What
is refused is a ValueError that names the layer, the rule and the value.
"""

import functools
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsekern import checkpoint
from sparsekern.formats import BitmapInt8
from sparsekern.linear import SparseLinear
from sparsekern.manifest import INDEX, QUANT_METHOD, Manifest, read_layers, read_manifest
from sparsekern.ops import compiled
from sparsekern.packed_layer import FIELDS, Packed, check_packed
from sparsekern.shards import Reader
from sparsekern.swap import densify, replace_module

SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@register_quantization_config(QUANT_METHOD)
class SparsekernConfig(QuantizationConfigMixin):
    """The quantization_config of a compressed checkpoint (manifest.py).

    Raises ValueError for a newer format_version and for what makes no sense.
    """

    def __init__(self, format_version: int, layers: Mapping[str, Mapping[str, Any]], quant_method: str = QUANT_METHOD):
        self.quant_method, self.format_version, self.layers = quant_method, format_version, layers
        read_layers({"quantization_config": vars(self)})


@register_quantizer(QUANT_METHOD)
class SparsekernQuantizer(HfQuantizer):
    """What transformers calls while it loads a model whose config names sparsekern."""

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "sparsekern packs nothing while a dense checkpoint is read; load it without quantization_config, then "
                "sparsify(model)"
            )
        if device_map == "disk" or (isinstance(device_map, Mapping) and "disk" in device_map.values()):
            raise ValueError("device_map must keep packed layers in memory, got a part on the disk")

    def update_attn_implementation(self, config):
        """The hook between the config and the search for the weights; nothing here is about attention."""
        config.transformers_weights = INDEX
        return config

    # the one that lies there before transformers 5.23
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(self, model, checkpoint_files: list[str] | None = None, **_: Any) -> None:
        manifest = _manifest(model.config.name_or_path, checkpoint_files)
        _check_shapes(model, manifest)
        copies = model.all_tied_weights_keys
        tied = {*copies, *copies.values()}
        self._untied = {}
        for name in manifest.layers:
            place = _place(model, name)
            if place is None and _is_whole(model):
                raise ValueError(f"{name}: is packed, but {type(model).__name__} has no such layer")
            weight = f"{place}.weight"
            if weight in copies and manifest.layers[name].format is BitmapInt8:
                # an output embedding that was rounded is no longer the input embedding
                self._untied[weight] = copies.pop(weight)
            elif weight in tied:
                raise ValueError(f"{name}: is packed, but {type(model).__name__} ties its weight to another")
            if place is not None:
                replace_module(model, place, _awaiting(name, manifest, model.get_submodule(place)))
        self._expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model, **_: Any) -> None:
        del model.config.transformers_weights
        # that the model ties it is how densify() finds the bits it was rounded from
        model.all_tied_weights_keys.update(self.__dict__.pop("_untied"))
        _check_loaded(model, self.__dict__.pop("_expected"))
        if reason := compiled.why_not("cpu"):
            warnings.warn(f"sparsekern._cpu is missing, so the reference ops serve on a CPU: {reason}", stacklevel=2)
        # by name, so that what was read of a layer is freed when its kernel has its own order of it
        for name in [name for name, module in model.named_modules() if isinstance(module, Awaiting)]:
            replace_module(model, name, _sparse(name, model.get_submodule(name)))
        # a partial, because a copy of the model and one from a pickle must save themselves
        model.save_pretrained = functools.partial(_save_pretrained, model)

    def _dequantize(self, model, dtype: torch.dtype | None = None):
        """What model.dequantize() does: every packed layer dense, with the same bits, and trained like any other."""
        packed = [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]
        densify(model)
        for name in packed:
            model.get_submodule(name).requires_grad_(True)
        model.__dict__.pop("save_pretrained", None)
        # the model's own dtype is none to cast to: it keeps some modules in float32
        return model if dtype == model.config.dtype else model.to(dtype)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the packed weights are; the packed weights get no gradient."""
        return True


class Awaiting(nn.Module):
    """A layer whose packed tensors are still to be read: buffers with their names and sizes, on the meta device.

    name    of the layer in the manifest
    linear  the layer of the dense model, whose dtype the values are cast to
    """

    def __init__(self, name: str, manifest: Manifest, linear: nn.Linear):
        super().__init__()
        self.layer, self.dtype = manifest.layers[name], linear.weight.dtype
        self.stored = manifest.fields(name)
        for field, stored in self.stored.items():
            dtype = self.dtype if field == "values" and self.layer.format is not BitmapInt8 else stored.dtype
            self.register_buffer(field, torch.empty(stored.shape, dtype=dtype, device="meta"))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        # some models' _init_weights fill every weight they know: here is nothing to fill
        self.weight = linear.weight.detach()

    def packed(self) -> Packed:
        """What was read. Raises ValueError when its parts contradict each other."""
        packed = self.layer.packed({field: self._read(field) for field in FIELDS[self.layer.format]}, self.dtype)
        check_packed(packed)
        return packed

    def _read(self, field: str) -> Tensor:
        tensor, stored = getattr(self, field), self.stored[field]
        # scales are float32 whatever the model is cast to, and may have been cast there and back
        if field == "values" and self.layer.format is not BitmapInt8:
            return tensor
        if tensor.dtype == stored.dtype and field != "scales":
            return tensor
        # transformers before 5.23 makes float32 of everything in a module that a model keeps in it, as T5 its wo
        with Reader() as reader:
            return reader.read(stored).clone().to(tensor.device)


def _manifest(directory: str, checkpoint_files: list[str] | None) -> Manifest:
    """The manifest of the files that transformers has found. Raises ValueError when they are not the ones it names."""
    if checkpoint_files is None:
        raise ValueError("a compressed model is loaded from its directory, not from a state_dict")
    found = {Path(os.path.abspath(file)) for file in checkpoint_files}
    # a name of the hub is no directory; the files of a subfolder are not in the one that is named
    here = Path(os.path.abspath(directory))
    manifest = read_manifest(here if (here / INDEX).is_file() else min(found).parent)
    shards = {stored.file for stored in manifest.tensors.values()}
    if found != {Path(os.path.abspath(shard)) for shard in shards}:
        raise ValueError(f"{INDEX}: names {len(shards)} files, and transformers has found {len(found)} others")
    return manifest


def _place(model, name: str) -> str | None:
    """Where the layer `name` of the saved model is in this one, which may be its base model or have it as one."""
    base = f"{model.base_model_prefix}."
    modules = {place for place, _ in model.named_modules()}
    return next((place for place in (name, name.removeprefix(base), base + name) if place in modules), None)


def _awaiting(name: str, manifest: Manifest, linear: nn.Module) -> Awaiting:
    if type(linear) is not nn.Linear:
        raise ValueError(f"{name}: is packed, but the model has a {type(linear).__name__} there, not a Linear")
    needed, shape = [linear.out_features, linear.in_features], list(manifest.layers[name].shape)
    if needed != shape:
        raise ValueError(f"{name}: must be {needed} by the model's config, got {shape} in quantization_config")
    return Awaiting(name, manifest, linear)


def _check_shapes(model, manifest: Manifest) -> None:
    """Raises ValueError for a tensor that is stored in another shape, where the class is the saved one."""
    if not _is_whole(model):
        return
    own = model.state_dict()
    for name, stored in manifest.others().items():
        if name in own and own[name].shape != stored.shape:
            shapes = f"{list(own[name].shape)} by the model's config, got {list(stored.shape)}"
            raise ValueError(f"{name}: must be {shapes} in {stored.file.name}")


def _check_loaded(model, expected: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Raises ValueError for a tensor of another shape, and, in the class that was saved, for one that was not read."""
    loaded = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    optional = [*(model._keys_to_ignore_on_load_missing or ())]
    float32 = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for name, (shape, dtype) in expected.items():
        tensor = loaded[name]
        # transformers marks what it has read, and fills the rest with random numbers
        missing = not getattr(tensor, "_is_hf_initialized", False)
        if missing and _is_whole(model) and not any(re.search(pattern, name) for pattern in optional):
            raise ValueError(f"{name}: is in none of the files, but {type(model).__name__} needs it")
        # transformers 5.0 takes any shape where there is a plug-in
        if tensor.shape != shape:
            raise ValueError(f"{name}: must be {list(shape)} by the model's config, got {list(tensor.shape)}")
        if tensor.is_floating_point() and tensor.dtype != dtype and not any(part in name for part in float32):
            # transformers 5.0 casts nothing that has another name in the file, as in a base model
            tensor.data = tensor.data.to(dtype)


def _is_whole(model) -> bool:
    """True for the class that was saved, which the files hold the whole of; another may have a head of its own."""
    return type(model).__name__ in (model.config.architectures or ())


def _sparse(name: str, awaiting: Awaiting) -> SparseLinear:
    if any(buffer.is_meta for buffer in awaiting.buffers()):
        raise ValueError(f"{name}: was offloaded, but packed layers have to stay in memory; choose another device_map")
    if hasattr(awaiting, "_hf_hook"):
        raise ValueError(f"{name}: device_map must place whole blocks, not single layers")
    try:
        packed = awaiting.packed()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return SparseLinear(packed, awaiting.bias).train(awaiting.training)


def _save_pretrained(
    model,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    max_shard_size: int | str = checkpoint.SHARD_BYTES,
    **settings: Any,
) -> None:
    """save_pretrained of a model that was loaded compressed: compressed again, as sparsekern.save writes it.

    Adapters on it are saved alone, and a model without a packed layer, after densify(), is saved as any other. Raises
    FileExistsError when `save_directory` holds something, and ValueError for settings that would change what is saved.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return type(model).save_pretrained(model, save_directory, is_main_process, **settings)
    if not any(isinstance(module, SparseLinear) for module in model.modules()):
        model.hf_quantizer.remove_quantization_config(model)
        del model.save_pretrained
        return model.save_pretrained(save_directory, is_main_process, max_shard_size=max_shard_size, **settings)
    for setting in ("state_dict", "push_to_hub", "variant", "distributed_checkpoint"):
        if settings.get(setting):
            raise ValueError(f"save_pretrained of a compressed model has no {setting}; sparsekern.densify(model) first")
    if is_main_process:
        directory = Path(save_directory)
        if directory.is_dir() and not os.listdir(directory):
            # what a caller has made to be written to
            directory.rmdir()
        checkpoint.save(model, directory, shard_bytes=_bytes(max_shard_size))


def _bytes(size: int | str) -> int:
    """The bytes of a size as transformers writes it, "5GB"."""
    if isinstance(size, int):
        return size
    matched = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?B)\s*", size.upper())
    if not matched:
        raise ValueError(f'max_shard_size must be a number of bytes or like "5GB", got {size!r}')
    return int(float(matched[1]) * SIZES[matched[2]])
