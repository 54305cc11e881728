"""linear_call: what the linear ops share before their kernels: the op that torch sees, a short way, the gradient.

A call through torch's dispatcher, with the gradient's wrapper and a Python function behind it, costs more than some
kernels take at one token. Where the dispatcher would only go on to the device's function, `run` calls that at once.
The dispatcher would do more, and is asked, wherever

    somebody compiles, exports, traces or profiles, or a mode or functorch is active (vmap, grad, fake tensors)
    x, the bias or an operand is no plain tensor on that device: a subclass, a negative view, sparse, on another one
    a gradient is wanted

Both ways end in the same function with the same checks.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _any_requires_grad, _dispatch_tls_local_include_set, _len_torch_function_stack
from torch.autograd import _profiler_enabled
from torch.nn.functional import linear

from sparsekern.ops import compiled

Operands = tuple[Tensor, ...]
Weight = Callable[[Operands, int, int], Tensor]

# how the functions of sparsekern._cuda end
CUDA_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

_LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")


def check_product(x: Tensor, values: Tensor, bias: Tensor | None, in_features: int) -> None:
    """Raises ValueError unless x and bias fit the values of a weight: shape, dtype, device."""
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must end with in_features = {in_features}, got shape {list(x.shape)}")
    if x.dtype != values.dtype:
        raise ValueError(f"x must have the weight's dtype {values.dtype}, got {x.dtype}")
    if bias is not None and bias.dtype != values.dtype:
        raise ValueError(f"bias must have the weight's dtype {values.dtype}, got {bias.dtype}")
    if x.device != values.device:
        raise ValueError(f"x must be on the weight's device {values.device}, got {x.device}")
    if bias is not None and bias.device != values.device:
        raise ValueError(f"bias must be on the weight's device {values.device}, got {bias.device}")


def laid_out(x: Tensor, bias: Tensor | None, out_features: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """x and the bias as kernels read them, contiguous, and a new y [..., out_features]."""
    shape = x.shape
    # not a view: autograd lets nobody write to one that an op has returned. To take a tuple apart costs torch more
    # than all of the checks
    y = x.new_empty(shape[0], out_features) if len(shape) == 2 else x.new_empty(*shape[:-1], out_features)
    return x.contiguous(), None if bias is None else bias.contiguous(), y


def _usual_keys() -> frozenset[int]:
    """What torch adds to every call's dispatch keys when no mode, transform or tracer is active."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(_dispatch_tls_local_include_set().raw_repr())
    return frozenset(found)


_USUAL_KEYS = _usual_keys()


def dispatcher_adds_nothing(device: int, x: Tensor, operands: Operands, bias: Tensor | None) -> bool:
    """Whether torch's dispatcher would go straight to the function of a device, with these tensors and what is active.

    device  its kind, as DLPack numbers them
    """
    # first, because dynamo knows the answer and reads no further
    if torch.compiler.is_compiling() or _len_torch_function_stack() or _profiler_enabled():
        return False
    if _dispatch_tls_local_include_set().raw_repr() not in _USUAL_KEYS:
        return False
    module = compiled.cpu()
    if module is None or not module.are_plain(device, x, operands, bias):
        return False
    return not (torch.is_grad_enabled() and _any_requires_grad(x, bias, *operands))


class _Linear:
    """y = x W^T + bias as an op of torch, for one way to store W on one kind of device.

    name      of the op, torch.ops.sparsekern.<name>
    operands  the names of what it reads of W
    kind      the one of them that has the dtype of x
    multiply  as the device's class says
    dense     (operands, out_features, in_features): W, for the gradient of x, which is g W
    rows_of   (operands): out_features, of an op whose arguments end with in_features alone
    """

    key: ClassVar[str]  # of torch's dispatcher
    device: ClassVar[int]  # DLPack's number

    def __init__(
        self,
        name: str,
        operands: tuple[str, ...],
        kind: str,
        multiply: Callable[..., Any],
        dense: Weight,
        rows_of: Callable[[Operands], int] | None = None,
    ):
        self.name = name
        self._multiply, self._dense, self._rows_of = multiply, dense, rows_of
        self._kind, self._count, self._sizes = operands.index(kind), len(operands), 1 if rows_of else 2
        sizes = ", ".join(["int out_features", "int in_features"][-self._sizes :])
        _LIBRARY.define(f"{name}(Tensor x, {_arguments(operands)}, Tensor? bias, {sizes}) -> Tensor")
        _LIBRARY.impl(name, self.dispatched, self.key)
        torch.library.register_fake(f"sparsekern::{name}", self._fake, lib=_LIBRARY)
        torch.library.register_autograd(f"sparsekern::{name}", self._backward, setup_context=self._keep, lib=_LIBRARY)
        self._op = getattr(torch.ops.sparsekern, name).default

    def run(self, x: Tensor, operands: Operands, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
        """y [..., out_features] from x [..., in_features]. Raises ValueError as check_product does."""
        if dispatcher_adds_nothing(self.device, x, operands, bias):
            return self._product(x, operands, bias, out_features, in_features)
        return self._op(x, *operands, bias, *(out_features, in_features)[-self._sizes :])

    def dispatched(self, x: Tensor, *rest: Any) -> Tensor:
        """The op's function for its device."""
        return self._product(x, *self._parts(rest))

    def _parts(self, rest: tuple[Any, ...]) -> tuple[Operands, Tensor | None, int, int]:
        """Operands, bias, out_features and in_features, of what an op is given behind x."""
        operands, bias, sizes = rest[: self._count], rest[self._count], rest[self._count + 1 :]
        return operands, bias, *(sizes if self._rows_of is None else (self._rows_of(operands), *sizes))

    def _fake(self, x: Tensor, *rest: Any) -> Tensor:
        operands, bias, out_features, in_features = self._parts(rest)
        check_product(x, operands[self._kind], bias, in_features)
        return x.new_empty((*x.shape[:-1], out_features))

    def _keep(self, ctx, inputs: tuple, output: Tensor) -> None:
        operands, _, *ctx.sizes = self._parts(inputs[1:])
        ctx.save_for_backward(*operands)

    def _backward(self, ctx, g: Tensor) -> tuple:
        gx = g @ self._dense(ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[0] else None
        # after x and the operands
        gb = g.sum_to_size(g.shape[-1]) if ctx.needs_input_grad[1 + self._count] else None
        return gx, *[None] * self._count, gb, *[None] * self._sizes


class CpuLinear(_Linear):
    """On the CPU.

    multiply  (x, operands, bias, y, in_features): writes y [..., out_features] from x [..., in_features], both and the
              bias contiguous; raises ValueError where their dtypes or sizes do not fit, as the compiled module does
    """

    key, device = "CPU", 1

    def _product(
        self, x: Tensor, operands: Operands, bias: Tensor | None, out_features: int, in_features: int
    ) -> Tensor:
        shape = x.shape
        if not shape or shape[-1] != in_features:
            check_product(x, operands[self._kind], bias, in_features)
        x, bias, y = laid_out(x, bias, out_features)
        self._multiply(x, operands, bias, y, in_features)
        return y


class CudaLinear(_Linear):
    """On a card.

    multiply  (x, operands, bias, out_features, in_features): y [..., out_features] from x [..., in_features], which
              fits, and the bias, both of the weight's dtype and device
    """

    key, device = "CUDA", 2

    def _product(
        self, x: Tensor, operands: Operands, bias: Tensor | None, out_features: int, in_features: int
    ) -> Tensor:
        # the kernels know nothing but addresses
        check_product(x, operands[self._kind], bias, in_features)
        return self._multiply(x, operands, bias, out_features, in_features)


def through(dense: Weight) -> Callable[[Tensor, Operands, Tensor | None, int, int], Tensor]:
    """A `multiply` of CudaLinear by torch's own linear, with the dense weight that each call makes and frees."""
    return lambda x, operands, bias, *sizes: linear(x, dense(operands, *sizes), bias)


def _arguments(operands: tuple[str, ...]) -> str:
    return ", ".join(f"Tensor {name}" for name in operands)


def weight_op(name: str, operands: tuple[str, ...], kind: str, expand: Weight) -> Weight:
    """`expand`, which needs addresses, as an op that torch can trace: (operands, out_features, in_features) -> W."""
    place = operands.index(kind)

    def on_the_cpu(*arguments) -> Tensor:
        *given, out_features, in_features = arguments
        return expand(tuple(given), out_features, in_features)

    def fake(*arguments) -> Tensor:
        *given, out_features, in_features = arguments
        return given[place].new_empty(out_features, in_features)

    _LIBRARY.define(f"{name}({_arguments(operands)}, int out_features, int in_features) -> Tensor")
    _LIBRARY.impl(name, on_the_cpu, "CPU")
    torch.library.register_fake(f"sparsekern::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.sparsekern, name).default
    return lambda given, out_features, in_features: op(*given, out_features, in_features)
