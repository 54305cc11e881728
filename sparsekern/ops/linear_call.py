"""linear_call: what the linear ops share before their CPU kernels: the op that torch sees, a short way, the gradient.

A call through torch's dispatcher, with the gradient's wrapper and a Python function behind it, costs more than some
kernels take at one token. Where the dispatcher would only go on to the CPU's function, `CpuLinear.run` calls that at
once. The dispatcher would do more, and is asked, wherever

    somebody compiles, exports, traces or profiles, or a mode or functorch is active (vmap, grad, fake tensors)
    x, the bias or an operand is no plain tensor on the CPU: a subclass, a negative view, sparse, on another device
    a gradient is wanted

Both ways end in the same function with the same checks.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _any_requires_grad, _dispatch_tls_local_include_set, _len_torch_function_stack
from torch.autograd import _profiler_enabled

from sparsekern.ops import compiled

Operands = tuple[Tensor, ...]

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


def _usual_keys() -> frozenset[int]:
    """What torch adds to every call's dispatch keys when no mode, transform or tracer is active."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(_dispatch_tls_local_include_set().raw_repr())
    return frozenset(found)


_USUAL_KEYS = _usual_keys()


def dispatcher_adds_nothing(x: Tensor, operands: Operands, bias: Tensor | None) -> bool:
    """Whether torch's dispatcher would go straight to the CPU's function, with these tensors and whatever is active."""
    # first, because dynamo knows the answer and reads no further
    if torch.compiler.is_compiling() or _len_torch_function_stack() or _profiler_enabled():
        return False
    if _dispatch_tls_local_include_set().raw_repr() not in _USUAL_KEYS:
        return False
    if not compiled.cpu().are_plain(x, operands, bias):
        return False
    return not (torch.is_grad_enabled() and _any_requires_grad(x, bias, *operands))


class CpuLinear:
    """y = x W^T + bias as an op of torch, for one way to store W.

    name      of the op, torch.ops.sparsekern.<name>
    operands  the names of what it reads of W
    kind      the one of them that has the dtype of x
    multiply  (x, operands, bias, y, in_features): writes y [..., out_features] from x [..., in_features], both and the
              bias contiguous; raises ValueError where their dtypes or sizes do not fit, as the compiled module does
    dense     (operands, out_features, in_features): W, for the gradient of x, which is g W
    """

    def __init__(
        self,
        name: str,
        operands: tuple[str, ...],
        kind: str,
        multiply: Callable[[Tensor, Operands, Tensor | None, Tensor, int], None],
        dense: Callable[[Operands, int, int], Tensor],
    ):
        self._multiply, self._dense = multiply, dense
        self._kind, self._count = operands.index(kind), len(operands)
        _LIBRARY.define(
            f"{name}(Tensor x, {_arguments(operands)}, Tensor? bias, int out_features, int in_features) -> Tensor"
        )
        _LIBRARY.impl(name, self._on_the_cpu, "CPU")
        torch.library.register_fake(f"sparsekern::{name}", self._fake, lib=_LIBRARY)
        torch.library.register_autograd(f"sparsekern::{name}", self._backward, setup_context=_keep, lib=_LIBRARY)
        self._op = getattr(torch.ops.sparsekern, name).default

    def run(self, x: Tensor, operands: Operands, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
        """y [..., out_features] from x [..., in_features]. Raises ValueError as check_product does."""
        if dispatcher_adds_nothing(x, operands, bias):
            return self._product(x, operands, bias, out_features, in_features)
        return self._op(x, *operands, bias, out_features, in_features)

    def _product(
        self, x: Tensor, operands: Operands, bias: Tensor | None, out_features: int, in_features: int
    ) -> Tensor:
        shape = x.shape
        if not shape or shape[-1] != in_features:
            check_product(x, operands[self._kind], bias, in_features)
        # not a view: autograd lets nobody write to one that an op has returned. To take a tuple apart costs torch more
        # than all of the checks
        y = x.new_empty(shape[0], out_features) if len(shape) == 2 else x.new_empty(*shape[:-1], out_features)
        bias = None if bias is None else bias.contiguous()
        self._multiply(x.contiguous(), operands, bias, y, in_features)
        return y

    def _on_the_cpu(self, x: Tensor, *rest) -> Tensor:
        *operands, bias, out_features, in_features = rest
        return self._product(x, tuple(operands), bias, out_features, in_features)

    def _fake(self, x: Tensor, *rest) -> Tensor:
        *operands, bias, out_features, in_features = rest
        check_product(x, operands[self._kind], bias, in_features)
        return x.new_empty((*x.shape[:-1], out_features))

    def _backward(self, ctx, g: Tensor) -> tuple:
        gx = g @ self._dense(ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[0] else None
        # after x and the operands
        gb = g.sum_to_size(g.shape[-1]) if ctx.needs_input_grad[1 + self._count] else None
        return gx, *[None] * self._count, gb, None, None


def _arguments(operands: tuple[str, ...]) -> str:
    return ", ".join(f"Tensor {name}" for name in operands)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    _, *operands, _, out_features, in_features = inputs
    ctx.save_for_backward(*operands)
    ctx.sizes = out_features, in_features


def weight_op(
    name: str, operands: tuple[str, ...], kind: str, expand: Callable[[Operands, int, int], Tensor]
) -> Callable[[Operands, int, int], Tensor]:
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
