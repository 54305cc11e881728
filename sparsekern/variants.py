"""variants: forms of one model that stand in memory together: pruned, without its linear layers, and what they take."""

import copy
import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsekern.hf_generate import RUN
from sparsekern.linear import SparseLinear
from sparsekern.measure import device_of
from sparsekern.swap import replace_module


class _Nothing(nn.Module):
    """A linear layer whose output is zeros, and which reads no weights."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def pruned(dense: nn.Module, sparsity: float | None) -> nn.Module:
    """A copy whose decoder blocks' layers are pruned at random, None: not at all; it shares the other tensors."""
    model = sharing(dense)
    if sparsity is None:
        return model
    kept = torch.rand(RUN, generator=torch.Generator().manual_seed(1)).to(device_of(dense)) >= sparsity
    for name, linear in _block_layers(model):
        weight = linear.weight.clone()
        for part in weight.view(-1).split(RUN):
            part.mul_(kept[: len(part)])
        replace_module(model, name, _linear(weight, linear.bias))
    return model


def without_linear(dense: nn.Module) -> nn.Module:
    model = sharing(dense)
    for name, linear in [*_block_layers(model), *_head(model)]:
        replace_module(model, name, _Nothing(linear.out_features))
    return model


def sharing(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _block_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    head = model.get_output_embeddings()
    return [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m is not head]


def _head(model: nn.Module) -> list[tuple[str, nn.Module]]:
    head = model.get_output_embeddings()
    return [(name, module) for name, module in model.named_modules() if module is head]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias
    return linear.eval()


def read_bytes(model: nn.Module) -> int:
    """Of the weights that a new token is multiplied by."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | SparseLinear)]
    return sum(layer.nbytes if isinstance(layer, SparseLinear) else layer.weight.nbytes for layer in layers)


def peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` takes beside what is there before it; None where the machine does not say."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # what was freed before would hide what the call takes
        ctypes.CDLL(None).malloc_trim(0)
        # from here on the high-water mark is of what follows
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)
    except (OSError, KeyError, AttributeError):
        return None


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[name].split()[0]) << 10


def available() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return None
