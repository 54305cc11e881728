"""state: the tensors that a module's state dict would hold, one by one, and which of them are one tensor."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekern.linear import SparseLinear


@dataclass(frozen=True)
class Slot:
    """A parameter or persistent buffer: `own` is its name in `module`."""

    module: nn.Module
    own: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.own)


def slots(model: nn.Module) -> dict[str, Slot]:
    """Every parameter and persistent buffer by its full name; of a SparseLinear only the bias.

    A module that stands in two places counts once. Raises ValueError for a module that keeps other state, and for
    adapters that were not merged.
    """
    found = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, SparseLinear):
            _refuse(prefix, module)
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and own not in module._non_persistent_buffers_set:
                found[f"{prefix}.{own}" if prefix else own] = Slot(module, own)
    return found


def tied(slots: Mapping[str, Slot]) -> list[list[str]]:
    """The names of every tensor: more than one where it is tied."""
    groups: dict[tuple, list[str]] = {}
    for name, slot in slots.items():
        tensor = slot.tensor
        # what is empty or on the meta device has no address
        placed = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        groups.setdefault(placed if tensor.data_ptr() else (id(tensor),), []).append(name)
    return list(groups.values())


def fill(slots: Mapping[str, Slot], names: list[str], tensor: Tensor) -> None:
    """Make a copy of `tensor` the one that `names` stand for, on the device of the old one."""
    old = slots[names[0]].tensor
    new = torch.empty_like(tensor, device="cpu" if old.is_meta else old.device).copy_(tensor)
    if isinstance(old, nn.Parameter):
        if not old.is_meta:
            # whoever holds the parameter, such as an optimizer, keeps it
            for name in names:
                slots[name].tensor.data = new
            return
        new = nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())
    for name in names:
        setattr(slots[name].module, slots[name].own, new)


def _refuse(name: str, module: nn.Module) -> None:
    kind = type(module)
    if hasattr(module, "base_layer"):
        raise ValueError(f"{name}: wrapped by {kind.__name__}: merge the adapter first, with merge_and_unload()")
    for method in ("_save_to_state_dict", "get_extra_state"):
        if getattr(kind, method) is not getattr(nn.Module, method):
            raise ValueError(f"{name}: {kind.__name__} keeps state that is no parameter or buffer: it has {method}")
