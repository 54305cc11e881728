"""paging: a model whose blocks read their weights from disk when they run, and drop them after.

What is outside the blocks stays in memory. A block that is held keeps its weights, changed or not, until it is let go;
what was written of them by then is what it reads from there on.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import hf, model_files
from sparsekern.hf_weights import Weights
from sparsekern.model_files import UnreadableError
from sparsekern.shards import Stored, read_header

# among the names of blocks: what is in none of them
OUTSIDE = ""


@dataclass(frozen=True, eq=False)
class _Slot:
    """Where a tensor stands in the model, as an attribute of some modules, and what stands there while it is away."""

    places: list[tuple[nn.Module, str]]
    away: Tensor

    def put(self, tensor: Tensor) -> None:
        if isinstance(self.away, nn.Parameter) and tensor is not self.away:
            tensor = nn.Parameter(tensor, requires_grad=self.away.requires_grad)
        for module, name in self.places:
            (module._parameters if name in module._parameters else module._buffers)[name] = tensor

    @property
    def tensor(self) -> Tensor:
        return getattr(*self.places[0])


class Pager:
    """The weights of a skeleton's blocks: on disk, until they are needed.

    model   a skeleton (hf.skeleton); what is outside its blocks is loaded at once, its blocks' forwards are replaced
    source  directory of its checkpoint

    blocks  names, in the order they stand

    Raises UnreadableError when the checkpoint cannot be read block by block.
    """

    def __init__(self, model: nn.Module, source: Path):
        self._now = model_files.tensors_of(source)
        self._dense = dict(self._now)
        try:
            self._weights = Weights(model, {name: (tensor.dtype, tensor.shape) for name, tensor in self._now.items()})
            self._compare_twins()
        except ValueError as error:
            raise UnreadableError(f"{str(source)!r} cannot be read block by block: {error}") from error
        blocks = hf.blocks(model)
        self.blocks = [name for name, _ in blocks]
        self._slots = {name: _Slot([], tensor) for name, tensor in self._weights.tensors.items()}
        of = {id(tensor): name for name, tensor in self._weights.tensors.items()}
        inside = {id(module) for _, block in blocks for module in block.modules()}
        # what is in a block and outside is outside; a tensor that blocks share is written with the first of them
        self._home: dict[str, str] = {}
        self._needed: dict[str, list[str]] = {}
        for module in model.modules():
            for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if id(tensor) in of:
                    self._slots[of[id(tensor)]].places.append((module, own))
                    if id(module) not in inside:
                        self._home[of[id(tensor)]] = OUTSIDE
        for block, module in blocks:
            tensors = module.state_dict(keep_vars=True).values()
            needed = dict.fromkeys(of[id(tensor)] for tensor in tensors if id(tensor) in of)
            for name in needed:
                self._home.setdefault(name, block)
            self._needed[block] = [name for name in needed if self._home[name] != OUTSIDE]
        self._holders = dict.fromkeys(self._slots, 0)
        self._take(self._at_home(OUTSIDE), self._now)
        for block, module in blocks:
            module.forward = self._paging(block, module.forward)

    @contextmanager
    def held(self, block: str, dense: bool = False) -> Iterator[None]:
        """While open, the block's weights are in memory and may be changed.

        dense  as they are in the source, whatever was written of them since
        """
        names = self._needed[block]
        if dense:
            self._take([name for name in names if self._home[name] == block], self._dense)
            self._take([name for name in names if self._home[name] != block], self._now)
        else:
            self._take(names, self._now)
        try:
            yield
        finally:
            for name in names:
                self._holders[name] -= 1
                if not self._holders[name]:
                    self._slots[name].put(self._slots[name].away)

    def write(self, block: str, path: Path) -> str:
        """Write what a block that is held holds at the moment, or what is OUTSIDE, and sync it; returns its sha256."""
        tensors = self._weights.stored({name: self._slots[name].tensor for name in self._at_home(block)})
        return model_files.write(path, tensors)

    def read_from(self, path: Path) -> None:
        """From now on, read from there what it holds."""
        self._now |= read_header(path)

    def _at_home(self, block: str) -> list[str]:
        return [name for name, home in self._home.items() if home == block]

    def _take(self, names: Iterable[str], stored: dict[str, Stored]) -> None:
        absent = [name for name in names if not self._holders[name]]
        for name, tensor in self._weights.load(absent, lambda key: model_files.read(stored[key])).items():
            self._slots[name].put(tensor)
        for name in names:
            self._holders[name] += 1

    def _paging(self, block: str, forward: Callable) -> Callable:
        @functools.wraps(forward)
        def paged(*args: Any, **kwargs: Any) -> Any:
            with self.held(block):
                return forward(*args, **kwargs)

        return paged

    def _compare_twins(self) -> None:
        for first, second in self._weights.twins:
            if not torch.equal(model_files.read(self._now[first]), model_files.read(self._now[second])):
                raise ValueError(f"{first} and {second} are tied in the model and differ in the checkpoint")
