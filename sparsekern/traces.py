"""traces: what one forward of a model does with a decoder block: its arguments, what its layers read, what it puts out.

Nothing of the model changes: there are hooks while something is watched, and none afterwards.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import hf
from sparsekern.batches import by_name, map_tensors
from sparsekern.experts import Expert, RoutedTokens


class StoppedError(Exception):
    """The forward has come as far as it is wanted."""

    def __init__(self, said: Any):
        super().__init__()
        self.said = said


class LayersPartedError(Exception):
    """Layers that shared an input on the first batch do not on another."""


class Block:
    def __init__(self, name: str, module: nn.Module, layers: list[tuple[str, hf.Layer]]):
        self.name, self.module = name, module
        # blocks of one ModuleList hand on to each other; an encoder's last output is still read when a decoder runs
        self.stack = name.rpartition(".")[0]
        self.layers = {layer_name: layer for layer_name, layer in layers if layer_name.startswith(f"{name}.")}
        self.experts = {layer_name: layer for layer_name, layer in self.layers.items() if isinstance(layer, Expert)}


class Trace:
    """What a forward did with a block: how often it ran, on what, and which tensors its layers read."""

    def __init__(self, block: Block):
        self.block, self.calls = block, 0
        self.inputs: list[Any] = []
        self._reads = Reads()

    @contextmanager
    def watching(self, ran: "dict[str, Trace]") -> Iterator[None]:
        """While open, note what happens; a block that runs enters itself in `ran`."""

        def enter(arguments: Mapping[str, Any]) -> None:
            ran[self.block.name] = self
            self.calls += 1
            self.inputs.append(fingerprint(arguments))

        with watched(self.block, enter=enter, read=self._reads.note, leave=self._reads.forget):
            yield

    def leaders(self) -> dict[str, str]:
        """For each layer the first one that reads the same tensors; itself for one that reads none."""
        first: dict[tuple[int, ...], str] = {}
        return {name: first.setdefault(self._reads.of(name) or (name,), name) for name in self.block.layers}


class Reads:
    """Which tensor each layer reads, as numbers: the same number is the same memory, not written to in between."""

    def __init__(self):
        self._numbers: dict[str, list[int]] = {}
        # kept alive, or an address could come back with other content
        self._alive: dict[tuple, tuple[int, Tensor]] = {}
        self._next = 0

    def note(self, name: str, x: Tensor) -> None:
        key = (x.data_ptr(), x.dtype, x.shape, x.stride(), x._version)
        if key not in self._alive:
            self._alive[key] = self._next, x
            self._next += 1
        self._numbers.setdefault(name, []).append(self._alive[key][0])

    def of(self, name: str) -> tuple[int, ...]:
        return tuple(self._numbers.get(name, ()))

    def forget(self, _: Any = None) -> None:
        self._alive.clear()


@contextmanager
def watched(
    block: Block,
    enter: Callable[[Mapping[str, Any]], None] = lambda arguments: None,
    read: Callable[[str, Tensor], None] | None = None,
    leave: Callable[[Any], None] = lambda output: None,
    routed: Callable[[str, Tensor, Tensor | None, int], None] | None = None,
) -> Iterator[None]:
    """While open, call `enter` with the block's arguments by name, `read` with its layers' inputs, `leave` after it.

    routed  as RoutedTokens calls it, for the block's experts
    """
    running = False

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal running
        running = True
        enter(by_name(module, args, kwargs))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal running
        running = False
        leave(output)

    def reader(name: str) -> Callable:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            # a layer may be shared with another block, whose turn this is not
            if running:
                read(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    with ExitStack() as hooks:
        hooks.callback(block.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(block.module.register_forward_hook(after).remove)
        if routed is not None and block.experts:
            hooks.enter_context(RoutedTokens(block.experts, lambda *what: routed(*what) if running else None))
        layers = {name: layer for name, layer in block.layers.items() if name not in block.experts}
        for name, layer in layers.items() if read is not None else ():
            hooks.callback(layer.register_forward_pre_hook(reader(name), with_kwargs=True).remove)
        yield


@contextmanager
def returning(module: nn.Module, output: Any) -> Iterator[None]:
    """While open, the module does nothing but return a copy of `output`."""
    own = module.__dict__.get("forward")
    # a copy: what comes after may write to it
    module.forward = lambda *args, **kwargs: map_tensors(output, Tensor.clone)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def fingerprint(value: Any) -> Any:
    """Equal for equal values, tensors bit for bit, at the size of a hash."""
    if isinstance(value, Tensor):
        octets = value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        return value.dtype, value.shape, hashlib.sha256(octets).digest()
    if isinstance(value, tuple | list):
        return tuple(fingerprint(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, fingerprint(item)) for key, item in value.items())
    return value if isinstance(value, int | float | str | None) else type(value)
