"""hf_weights: a model's tensors and what a checkpoint holds of them, some at a time.

A checkpoint's tensors may have other names than the model's, and transformers may stack them as it loads, as it does
with the experts of a mixture. Both ways are gone here for one decoder block alone, by transformers' own rules.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

HALVES = (torch.float16, torch.bfloat16)
# a tensor without its values
Shape = tuple[torch.dtype, tuple[int, ...]]


@dataclass
class _Stack:
    """Tensors of the checkpoint that become tensors of the model together.

    first  the model's first tensor that they become; the names of all are known after they were converted
    rule   transformers'; None: one tensor, taken as it is
    names  in the checkpoint, with the pattern that each was recognised by
    """

    first: str
    rule: WeightConverter | None
    names: list[tuple[str, str | None]] = field(default_factory=list)


class Weights:
    """The tensors of a model by name, tied ones once, and what of a checkpoint they are made of.

    model   a skeleton (hf.skeleton); tensors that transformers keeps in float32 are changed to that
    stored  dtype and shape of the checkpoint's tensors by name

    tensors  parameters and persistent buffers, each by the first of its names
    twins    pairs of the checkpoint's tensors that are one in the model: the first is read, the second must be equal

    Raises ValueError when the checkpoint lacks a tensor, holds it in another shape, or would get it under another name
    when the model is saved.
    """

    def __init__(self, model: nn.Module, stored: Mapping[str, Shape]):
        self._model = model
        _keep_float32(model)
        self.tensors: dict[str, Tensor] = {}
        # every name of a tied tensor -> the one that it has here
        self._known_as: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            self._known_as[name] = first.setdefault(id(tensor), name)
            self.tensors.setdefault(self._known_as[name], tensor)
        self.twins: list[tuple[str, str]] = []
        self._rules = get_model_conversion_mapping(model)
        stacks = self._stacks(stored)
        # what did not serve must not be undone; transformers 5.0 does not tell
        self._rules = [rule for rule in self._rules if not hasattr(rule, "was_used") or rule.was_used()]
        self._stack_of = self._check(stacks, stored)

    def names_of(self, names: Iterable[str]) -> list[str]:
        """What the checkpoint calls what these tensors of the model are made of."""
        return [name for stack in self._needed(names) for name, _ in stack.names]

    def load(self, names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """These tensors of the model; `read` returns a tensor of the checkpoint."""
        made: dict[str, Tensor] = {}
        for stack in self._needed(names):
            made |= self._convert(stack, read)
        return {name: made[name] for name in names}

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the checkpoint calls and holds of these tensors of the model: the inverse of `load`."""
        stacks = self._needed(tensors)
        plain = {stack.names[0][0]: tensors[self._known_as[stack.first]] for stack in stacks if stack.rule is None}
        taken = {self._known_as[stack.first] for stack in stacks if stack.rule is None}
        others = {name: tensor for name, tensor in tensors.items() if name not in taken}
        if not others:
            return plain
        before = getattr(self._model, "_weight_conversions", None)
        self._model._weight_conversions = self._rules
        try:
            return plain | {n: t.contiguous() for n, t in revert_weight_conversion(self._model, others).items()}
        finally:
            self._model._weight_conversions = before

    def _stacks(self, stored: Mapping[str, Shape]) -> list[_Stack]:
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        own, prefix = self._model.state_dict(), self._model.base_model_prefix
        stacks: dict[str, _Stack] = {}
        # the order in which transformers stacks
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, own)
            if target not in own and name in own:
                target, pattern = rename_source_key(name, [], [], prefix, own)
            if target not in own:
                # nothing of the model's, as transformers sees it too
                continue
            stack = stacks.setdefault(target, _Stack(target, by_pattern.get(pattern)))
            stack.names.append((name, pattern))
        return list(stacks.values())

    def _check(self, stacks: list[_Stack], stored: Mapping[str, Shape]) -> dict[str, _Stack]:
        """The stack of every tensor of the model, after all went both ways on the meta device."""
        made: dict[str, Tensor] = {}
        stack_of: dict[str, _Stack] = {}

        def on_meta(name: str) -> Tensor:
            dtype, shape = stored[name]
            return torch.empty(shape, dtype=dtype, device="meta")

        for stack in stacks:
            if stack.rule is None and len(stack.names) > 1:
                raise ValueError(f"{stack.names[0][0]} and {stack.names[1][0]} are both {stack.first} of the model")
            for name, tensor in self._convert(stack, on_meta).items():
                if name in stack_of:
                    self.twins.append((stack_of[name].names[0][0], stack.names[0][0]))
                else:
                    made[name], stack_of[name] = tensor, stack
        for name, tensor in self.tensors.items():
            if name not in made:
                raise ValueError(f"the checkpoint holds no weights for {name}")
            if made[name].shape != tensor.shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, and {list(made[name].shape)} in the checkpoint")
        self._stack_of = stack_of
        back = {name: tensor.shape for name, tensor in self.stored(made).items()}
        for name in self.names_of(self.tensors):
            if back.get(name) != torch.Size(stored[name][1]):
                raise ValueError(f"{name} has no way back from the model to the checkpoint")
        return stack_of

    def _needed(self, names: Iterable[str]) -> list[_Stack]:
        return list({id(stack): stack for stack in (self._stack_of[name] for name in names)}.values())

    def _convert(self, stack: _Stack, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        # transformers casts before it stacks
        dtype = self.tensors[self._known_as[stack.first]].dtype
        if stack.rule is None:
            return {self._known_as[stack.first]: read(stack.names[0][0]).to(dtype)}
        rule = copy.deepcopy(stack.rule)
        for name, pattern in stack.names:
            rule.add_tensor(stack.first, name, pattern, read(name).to(dtype))
        converted = rule.convert(stack.first, model=self._model, config=self._model.config)
        # transformers 5.0 returns what went wrong beside it
        converted = converted[0] if isinstance(converted, tuple) else converted
        lists = {self._known_as[name]: tensor for name, tensor in converted.items() if name in self._known_as}
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in lists.items()}


def use_generation_config(model: nn.Module, source: Path) -> None:
    """Give a skeleton the generation config that loading `source` gives a model."""
    if (source / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(source)


def _keep_float32(model: nn.Module) -> None:
    """Change to float32 what a model of transformers keeps in that when its other weights are halves."""
    always = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    patterns = [
        *always,
        *((getattr(model, "_keep_in_fp32_modules", None) or ()) if model.dtype == torch.float16 else ()),
    ]
    if model.dtype not in HALVES or not patterns:
        return
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if kept.search(name) and tensor.dtype in HALVES:
            tensor.data = tensor.data.float()
