"""lazy_weight: the dense weight of a packed layer as a tensor whose values are built when they are first read.

Models ask a layer's weight for its dtype in every forward pass, T5 three times a layer. Shape, dtype and device are
answered at once; whatever reads values builds them, once for each LazyWeight. Writing is an error: what is written
would be lost.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_PROPERTIES = ("device", "dtype", "is_cpu", "is_cuda", "is_leaf", "is_meta", "itemsize", "layout", "nbytes", "ndim")
_METHODS = ("dim", "element_size", "is_contiguous", "is_floating_point", "nelement", "numel", "size", "stride")
# what is known of a weight without its values
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in (*_PROPERTIES, "requires_grad", "shape")),
    *(getattr(Tensor, name) for name in _METHODS),
    torch.is_floating_point,
    torch.numel,
}
# an alias of what cannot be written to
_ALIASES = {Tensor.data.__get__, Tensor.detach, torch.detach}
_WRITES = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__"}


class LazyWeight(Tensor):
    """A weight of that shape, dtype and device, whose values `build` returns as a plain tensor."""

    _build: Callable[[], Tensor]
    _built: Tensor | None

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, build: Callable[[], Tensor]
    ) -> "LazyWeight":
        lazy = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        lazy._build, lazy._built = build, None
        return lazy

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _ALIASES:
            return args[0]
        name = func.__name__
        if args and isinstance(args[0], cls) and (name in _WRITES or (name.endswith("_") and not name.endswith("__"))):
            raise RuntimeError(
                "the weight of a SparseLinear is packed and cannot be written to, trained or merged into: "
                "sparsekern.densify(model) first"
            )
        return _with_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # what reaches a tensor without torch's Python functions
        return _with_values(func, args, kwargs)


def _with_values(func: Callable, args: tuple, kwargs: dict | None):
    args, kwargs = tree_map(_values, (args, kwargs or {}))
    return func(*args, **kwargs)


def _values(argument):
    if not isinstance(argument, LazyWeight):
        return argument
    if argument._built is None:
        argument._built = argument._build()
    return argument._built
