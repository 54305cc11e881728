"""experts: the layers of a mixture of experts that lie in one 3-D parameter, and the tokens that are routed to each.

Such a parameter is W [experts, out_features, in_features], or transposed, [experts, in_features, out_features]. Names
do not say which, and a square one's shape does not either: the forward that multiplies by it does. So its products are
watched, twice:

    orientation  the forward runs on meta tensors, which have a shape and no values: nothing is computed
    RoutedTokens while a model runs: what each expert is multiplied by are the tokens routed to it

An expert with few tokens knows too little of its own input. It borrows from the experts beside it: with n tokens of its
own and H_all the second moment over all experts of the parameter,

    H = (X^T X + k H_all) / (n + k),   k = in_features / 16
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

# product -> where its x and its W are among the arguments, and which dimension of that W is in_features
PRODUCTS = {
    functional.linear: (0, 1, -1),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), (0, 1, -2)),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), (0, 1, -2)),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), (1, 2, -2)),
}

# tokens per input below which an expert borrows, and how many tokens per input it borrows. Measured with the layers of
# the model that ships, its tokens routed by k-means: borrowing wins below 2 tokens per input and is even at 4
ENOUGH, BORROWED = 2, 1 / 16


@dataclass(frozen=True)
class Expert:
    """One expert's matrix in a 3-D parameter: a layer like an nn.Linear, but no module of its own.

    module, parameter  where it lies: getattr(module, parameter)[index]
    transposed         it is [in_features, out_features] there
    """

    module: nn.Module
    parameter: str
    index: int
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """W [out_features, in_features]: a view, so writing to it changes the model."""
        matrix = getattr(self.module, self.parameter).data[self.index]
        return matrix.T if self.transposed else matrix


class UnreadableExpertsError(ValueError):
    """A forward that does not show how it multiplies by its experts."""


def orientation(module: nn.Module) -> dict[str, bool]:
    """For every 3-D parameter of a module of experts whether it is transposed, [experts, in_features, out_features].

    Nothing is computed and nothing of the module changes; its weights may be on the meta device. Raises
    UnreadableExpertsError, saying why, when its forward does not multiply by every one as x W_e^T.
    """
    twin = _on_meta(module)
    wanted = {name: p for name, p in twin.named_parameters(recurse=False) if p.dim() == 3}
    reason = ""
    for arguments in _arguments(wanted):
        probe = _Probe(wanted)
        try:
            with torch.no_grad(), probe:
                type(twin).forward(twin, *arguments)
        except _AllSeenError:
            return probe.transposed
        except UnreadableExpertsError as error:
            reason = str(error)
        # what a forward raises that is given other arguments than it takes
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            continue
    raise UnreadableExpertsError(reason or f"{type(module).__name__} does not show how it multiplies by its experts")


class RoutedTokens(TorchFunctionMode):
    """While open, calls read(name, x, rows, total) with what each expert is multiplied by.

    experts  the layers to watch, by name
    x        [tokens, in_features], the tokens routed to the expert
    rows     [tokens] int64: which of the `total` tokens of the block they are; None when that cannot be told
    """

    def __init__(self, experts: Mapping[str, Expert], read: Callable[[str, Tensor, Tensor | None, int], None]):
        super().__init__()
        self._read = read
        self._names = {(id(e.module), e.parameter, e.index): name for name, e in experts.items()}
        self._transposed = {(id(e.module), e.parameter): e.transposed for e in experts.values()}
        owners = {(id(e.module), e.parameter): getattr(e.module, e.parameter) for e in experts.values()}
        self._parameters = _Parameters(owners)
        # the tokens that were last picked out of all: how many there were, and which
        self._picked: tuple[int, Tensor] | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            at, by, axis = PRODUCTS[func]
            product = self._parameters.product(args[by], axis) if len(args) > by else None
            if product is not None:
                self._multiplied(args[at], *product)
        elif func is Tensor.__getitem__:
            self._pick(*args)
        return func(*args, **(kwargs or {}))

    def _multiplied(self, x: Tensor, owner: tuple[int, str], experts: range, transposed: bool) -> None:
        if transposed != self._transposed[owner]:
            raise UnreadableExpertsError(f"{owner[1]} is multiplied by in more ways than one")
        for index in experts:
            name = self._names.get((*owner, index))
            if name is None:
                continue
            if len(experts) == 1:
                tokens = x.reshape(-1, x.shape[-1])
                self._read(name, tokens, *self._rows(tokens))
            else:
                tokens = x[index - experts.start] if x.dim() == 3 else x
                # a product over all experts holds all tokens for each, those of other experts as zeros
                here = (tokens != 0).any(dim=1).nonzero()[:, 0]
                self._read(name, tokens[here], here, len(tokens))

    def _pick(self, source: Tensor, index: Any) -> None:
        picks = isinstance(index, Tensor) and index.dim() == 1 and index.dtype == torch.int64
        if picks and source.dim() == 2 and source.is_floating_point():
            self._picked = len(source), index

    def _rows(self, x: Tensor) -> tuple[Tensor | None, int]:
        """Which tokens x [tokens, in_features] holds: it has as many rows as were picked, or is a part of such."""
        if self._picked is None or not x.stride(0):
            return None, 0
        total, picked = self._picked
        whole, first = x.untyped_storage().nbytes() // x.itemsize // x.stride(0), x.storage_offset() // x.stride(0)
        return (picked[first : first + len(x)] if whole == len(picked) else None), total


def borrow(experts: Mapping[str, Expert], stats: dict[str, Any], statistic: Callable) -> dict[str, str]:
    """Let each expert with too few tokens borrow from all experts of its parameter.

    experts    layers by name
    stats      their statistics by name, without those that no token reached; changed in place. They have `tokens` and
               count(other, times)
    statistic  makes an empty one of (in_features, device)

    Returns for each expert that borrowed what its statistics are made of.
    """
    borrowed = {}
    beside: dict[tuple[int, str], list[str]] = {}
    for name, expert in experts.items():
        beside.setdefault((id(expert.module), expert.parameter), []).append(name)
    for names in beside.values():
        in_features = experts[names[0]].weight.shape[1]
        own = {name: stats[name].tokens if name in stats else 0 for name in names}
        few = [name for name in names if own[name] < ENOUGH * in_features]
        if not few or not any(own.values()):
            continue
        everybody = statistic(in_features, experts[names[0]].weight.device)
        for name in names:
            if name in stats:
                everybody.count(stats[name], 1.0)
        tokens = min(math.ceil(BORROWED * in_features), everybody.tokens)
        for name in few:
            if name in stats:
                stats[name].count(everybody, tokens / everybody.tokens)
            else:
                stats[name] = everybody
            borrowed[name] = f"{own[name]} tokens of its own, {tokens} of all {len(names)} experts"
    return borrowed


class _AllSeenError(Exception):
    """The probe has seen what it wanted."""


class _Probe(TorchFunctionMode):
    """Notes how each parameter is multiplied by, and stops the forward when all have been."""

    def __init__(self, wanted: Mapping[str, Tensor]):
        super().__init__()
        self.transposed: dict[str, bool] = {}
        self._parameters = _Parameters(wanted)
        self._missing = set(wanted)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # shapes that do not fit raise here
        result = func(*args, **(kwargs or {}))
        at = next((i for i, arg in enumerate(args) if self._parameters.owner(arg) is not None), None)
        if at is None:
            return result
        _, by, axis = PRODUCTS.get(func, (0, None, 0))
        if at == by:
            product = self._parameters.product(args[by], axis)
            if product is None:
                raise UnreadableExpertsError("the experts are not multiplied by one whole matrix after the other")
            self.transposed[product[0]] = product[2]
            self._missing.discard(product[0])
            if not self._missing:
                raise _AllSeenError
        elif isinstance(result, Tensor) and self._parameters.owner(result) is None:
            raise UnreadableExpertsError(f"the experts go through {resolve_name(func) or func}")
        return result


class _Parameters:
    """Finds of which parameter a tensor is a view, and of which experts in it."""

    def __init__(self, parameters: Mapping[Any, Tensor]):
        # several may lie in one storage, when a checkpoint is mapped into memory
        self._by_storage: dict[int, list[tuple[Any, Tensor]]] = {}
        for owner, parameter in parameters.items():
            self._by_storage.setdefault(_storage(parameter), []).append((owner, parameter))

    def owner(self, tensor: Any) -> tuple[Any, Tensor] | None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return None
        for owner, parameter in self._by_storage.get(_storage(tensor), ()):
            if 0 <= tensor.storage_offset() - parameter.storage_offset() < parameter.numel():
                return owner, parameter
        return None

    def product(self, w: Any, axis: int) -> tuple[Any, range, bool] | None:
        """Whose W a product has multiplied by, of which experts, and whether it lies there transposed.

        w     the operand, in_features along `axis`

        None when w is nobody's, or anything but whole matrices.
        """
        found = self.owner(w)
        if found is None or w.dim() not in (2, 3):
            return None
        owner, parameter = found
        first, rest = divmod(w.storage_offset() - parameter.storage_offset(), parameter.stride(0))
        if rest or (w.dim() == 3 and w.stride(0) != parameter.stride(0)):
            return None
        mine = [(w.shape[d], w.stride(d)) for d in (axis, -3 - axis)]
        for transposed in (False, True):
            inputs, outputs = (1, 2) if transposed else (2, 1)
            if mine == [(parameter.shape[d], parameter.stride(d)) for d in (inputs, outputs)]:
                return owner, range(first, first + (w.shape[0] if w.dim() == 3 else 1)), transposed
        return None


def _storage(tensor: Tensor) -> int:
    # what lies on the meta device has a storage and no address
    return tensor.untyped_storage()._cdata


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy without values and hooks; what is not a tensor is shared."""

    def empty(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.empty_like(tensor, device="meta")

    twin = copy.copy(module)
    twin.__dict__ |= {
        "_parameters": {name: empty(p) for name, p in module._parameters.items()},
        "_buffers": {name: empty(b) for name, b in module._buffers.items()},
        "_modules": {name: None if child is None else _on_meta(child) for name, child in module._modules.items()},
        "_forward_hooks": {},
        "_forward_pre_hooks": {},
    }
    return twin


def _arguments(parameters: Mapping[str, Tensor]) -> Iterator[tuple]:
    """What a forward of experts may take, for every number of inputs that these parameters can have."""
    for inputs in dict.fromkeys(size for p in parameters.values() for size in p.shape[:0:-1]):
        first = next(iter(parameters.values()))
        experts = first.shape[0]

        def empty(*shape: int, like: Tensor = first) -> Tensor:
            return torch.empty(shape, dtype=like.dtype, device="meta")

        # one token, the two experts it is routed to, and how much they count; or how much all of them do
        yield empty(1, inputs), torch.zeros(1, 2, dtype=torch.int64, device="cpu"), empty(1, 2)
        yield empty(1, inputs), empty(1, experts)
        # one token for each expert, sorted
        yield empty(experts, inputs), [1] * experts
        yield (empty(experts, inputs),)
