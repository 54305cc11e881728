"""hf: where the blocks and layers of transformers' models are. How models are loaded and saved is in hf_files.py.

A layer can be pruned when its forward is exactly x W^T + b: nn.Linear, transformers' Conv1D, which holds W^T, and each
expert's matrix where a mixture of experts keeps them in one 3-D parameter.
Blocks are found by structure (the outermost ModuleLists), so that a plain nn.Module works as well.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from sparsekern.experts import Expert, UnreadableExpertsError, orientation
from sparsekern.hf_files import (
    fingerprint,
    has_tokenizer,
    load,
    processor_files,
    quiet,
    save,
    skeleton,
    tokenizer,
    untrained,
    write_config,
)

__all__ = [
    "Layer",
    "UnknownModelError",
    "blocks",
    "evaluating",
    "facts",
    "fingerprint",
    "gradient",
    "has_tokenizer",
    "is_transposed",
    "layers",
    "load",
    "one_by_one",
    "parameter",
    "positions",
    "processor_files",
    "quiet",
    "save",
    "skeleton",
    "skipped",
    "tokenizer",
    "untrained",
    "weight",
    "write_config",
]

# one weight matrix W that x is multiplied by
Layer = nn.Module | Expert

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class UnknownModelError(TypeError):
    """A model that has no blocks we can find, or does not run those we found."""


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's encoder and decoder blocks with their names, in the order they stand: an encoder before its decoder.

    A block is an element of an outermost nn.ModuleList that holds linear layers. Raises TypeError when there is none.
    """
    found = {id(block): (name, block) for name, block in reversed(list(_blocks_below(model, "")))}
    if not found:
        raise UnknownModelError(
            f"{type(model).__name__} has no blocks: no nn.ModuleList whose elements hold linear layers"
        )
    return list(reversed(found.values()))


def layers(model: nn.Module) -> list[tuple[str, Layer]]:
    """The layers that can be pruned, with their full names, block by block.

    Experts that lie in one 3-D parameter are a layer each, e.g. model.layers.0.mlp.experts.gate_up_proj.3.
    Never the output embeddings, tied weights, routers of experts, or anything outside the blocks; `skipped` says why.
    Raises TypeError when the model has no blocks.
    """
    return [(name, module) for name, module, reason in _verdicts(model) if reason is None]


def skipped(model: nn.Module) -> list[tuple[str, str]]:
    """The matrices that are not pruned, with the reason. Raises TypeError when the model has no blocks."""
    return [(name, reason) for name, _, reason in _verdicts(model) if reason is not None]


def weight(layer: Layer) -> Tensor:
    """The layer's W [out_features, in_features]: a view, so writing to it changes the layer."""
    if isinstance(layer, Expert):
        return layer.weight
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


def is_transposed(layer: Layer) -> bool:
    """Whether the layer's weight lies in its parameter as W^T [in_features, out_features]."""
    return layer.transposed if isinstance(layer, Expert) else isinstance(layer, Conv1D)


def parameter(layer: Layer) -> nn.Parameter:
    """The parameter that holds the layer's weight, alone or with other experts'."""
    return getattr(layer.module, layer.parameter) if isinstance(layer, Expert) else layer.weight


def gradient(layer: Layer) -> Tensor:
    """The gradient of `weight(layer)` [out_features, in_features]."""
    grad = parameter(layer).grad
    if isinstance(layer, Expert):
        return grad[layer.index].T if layer.transposed else grad[layer.index]
    return grad.T if isinstance(layer, Conv1D) else grad


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open: eval mode, no gradients, no cache of keys and values, experts one by one; as before afterwards."""
    training = {module: module.training for module in model.modules()}
    # a model of several has a config for each, and the outermost may have no say in what the others cache
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    cached = [(config, use) for config in configs.values() if (use := getattr(config, "use_cache", None)) is not None]
    # inference mode would hide whether a tensor was written to
    with torch.inference_mode(False), torch.no_grad(), one_by_one(model):
        try:
            model.eval()
            for config, _ in cached:
                config.use_cache = False
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
            for config, use in cached:
                config.use_cache = use


def facts(model: nn.Module) -> dict[str, str | int]:
    """What a report says about a model: its class, name, dtype and number of parameters, tied ones counted once."""
    parameters = list(model.parameters())
    return {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else "none",
    }


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """While open, each expert is multiplied by on its own, whatever fused way the model's config has chosen."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    chosen = [(c, way) for c in configs.values() if (way := getattr(c, "_experts_implementation_internal", None))]
    try:
        for config, _ in chosen:
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, way in chosen:
            config._experts_implementation_internal = way


def positions(model: nn.Module) -> int | None:
    """How many tokens the model can be given at once; None when its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _blocks_below(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        elements = isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList)
        if not elements:
            yield from _blocks_below(child, f"{prefix}{name}.")
        elif not _is_linear(child) and any(_is_linear(inner) for inner in child.modules()):
            yield f"{prefix}{name}", child


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _verdicts(model: nn.Module) -> list[tuple[str, Layer, str | None]]:
    """Every matrix of the model: its name, its layer, and why it is not pruned (None: it is). Blocks come first."""
    inside = {}
    for block_name, block in blocks(model):
        for name, module in block.named_modules(prefix=block_name):
            # a module that two blocks share belongs to the first
            inside.setdefault(id(module), (name, module))
    outside = {id(module): (name, module) for name, module in model.named_modules() if id(module) not in inside}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    verdicts = []
    for name, module in [*inside.values(), *outside.values()]:
        reason = None
        if module is output:
            reason = "output embeddings"
        elif any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
            reason = "tied: its weight belongs to another module as well"
        elif id(module) not in inside:
            reason = "outside the blocks"
        if _is_linear(module):
            verdicts.append((name, module, reason or _refusal(model, name, module)))
        else:
            verdicts += _stacks(model, name, module, reason)
    return verdicts


def _stacks(model: nn.Module, name: str, module: nn.Module, reason: str | None) -> Iterator[tuple]:
    """The verdicts on the parameters of a module that is no linear layer: those of experts hold a layer each."""
    transposed: dict[str, bool] = {}
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.dim() < 2:
            continue
        full = f"{name}.{own}"
        refused = _not_a_layer(full, module, parameter) or reason or _refusal_of_experts(model, full, module, parameter)
        if refused is None and not transposed:
            try:
                with one_by_one(module):
                    transposed = orientation(module)
            except UnreadableExpertsError as error:
                refused = f"experts in one 3-D parameter: {error}"
        if refused is None:
            for index in range(len(parameter)):
                yield f"{full.removesuffix('.weight')}.{index}", Expert(module, own, index, transposed[own]), None
        else:
            yield full.removesuffix(".weight"), module, refused


def _refusal(model: nn.Module, name: str, layer: nn.Module) -> str | None:
    """Why the layer's output is not simply x W^T + b, or must not be touched; None when it may be pruned."""
    if adapted := _adapted(model, name):
        return adapted
    *path, last = name.split(".")
    parent = model.get_submodule(".".join(path))
    has_experts = any("expert" in child for child, _ in parent.named_children())
    if "router" in name or (has_experts and (last == "gate" or last.endswith("_gate"))):
        return "router of experts"
    if is_parametrized(layer) or hasattr(layer, "weight_g"):
        return "parametrised: its weight is computed from others"
    plain = Conv1D if isinstance(layer, Conv1D) else nn.Linear
    if type(layer).forward is not plain.forward:
        return f"{type(layer).__name__} does not compute what {plain.__name__} does"
    return _changed(layer, layer.weight)


def _refusal_of_experts(model: nn.Module, name: str, module: nn.Module, parameter: nn.Parameter) -> str | None:
    if is_parametrized(module):
        return "parametrised: its weight is computed from others"
    return _adapted(model, name) or _changed(module, parameter)


def _adapted(model: nn.Module, name: str) -> str | None:
    path = name.split(".")[:-1]
    for depth in range(1, len(path) + 1):
        ancestor = model.get_submodule(".".join(path[:depth]))
        if hasattr(ancestor, "base_layer"):
            return f"wrapped by {type(ancestor).__name__}: merge the adapter first"
    return None


def _changed(module: nn.Module, weight: nn.Parameter) -> str | None:
    # accelerate replaces the forward too, but only to move tensors
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return "its forward was replaced"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    return None


def _not_a_layer(name: str, module: nn.Module, parameter: nn.Parameter) -> str | None:
    """Why a parameter of a module that is no linear layer holds no layers; None when it may hold experts."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "router" in f"{name}{kind}".lower() or ".gate." in name:
        return "router of experts"
    if "expert" in f"{name}{kind}".lower() and parameter.dim() == 3:
        return None
    return f"{kind}, not a linear layer"
