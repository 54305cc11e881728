"""linear_24: y = x W^T + bias with W packed 2:4 (formats/semi_structured.py).

`prepare` turns the packed weight into the tensors that a kernel reads, once; `restore` gives it back bit for bit.
"""

from torch import Tensor
from torch.nn.functional import linear

from sparsekern.formats import SemiStructured
from sparsekern.ops.kernel import Kernel, never_refuses


def reference(x: Tensor, packed: SemiStructured, bias: Tensor | None) -> Tensor:
    """Multiply by the dense weight.

    x     [..., in_features], the dtype of the values
    bias  [out_features] or None

    Returns y [..., out_features].
    """
    return linear(x, packed.to_dense(), bias)


def _prepare(packed: SemiStructured) -> tuple[Tensor, Tensor]:
    return packed.values, packed.metadata


def _restore(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> SemiStructured:
    return SemiStructured(*operands, in_features)


def _run(x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    return reference(x, _restore(operands, out_features, in_features), bias)


KERNELS = (Kernel("reference", _run, never_refuses, _prepare, _restore),)
