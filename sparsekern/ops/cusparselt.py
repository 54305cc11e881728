"""cusparselt: linear_24 by NVIDIA's cuSPARSELt, through the torch that is installed, where that brings it.

The library is proprietary: nothing of it comes with this package, and nothing here needs it. It computes

    y^T = W x^T + bias

and reads x and writes y as they lie. The compressed weight is one tensor in an order of its own, the kept values and
where they stood; `restore` multiplies it by the identity, whose sums have one term that is not zero and are exact.

Tokens are padded with zeros to a multiple of 8. The algorithm is the library's default one, so that equal inputs give
equal bits; baselines.py has the search for the fastest. What stands in x where a weight was pruned is not read: NaN
there does not reach the output.

Source of the rules: NVIDIA cuSPARSELt documentation, cusparseLtStructuredDescriptorInit and
cusparseLtDenseDescriptorInit.
"""

import torch
from torch import Tensor

from sparsekern.formats import SemiStructured
from sparsekern.ops.kernel import device_refuses
from sparsekern.ops.linear_call import CudaLinear

DTYPES = (torch.bfloat16, torch.float16)
# of the rows and columns of a 16-bit weight that is 2:4, and of a dense operand
SPARSE_MULTIPLE = 16
DENSE_MULTIPLE = 8
ALIGNMENT_BYTES = 16
# columns of the identity that one product takes
_STRIPE = 1024


def refuses(packed: SemiStructured | Tensor) -> str | None:
    """Why this kernel cannot serve a weight, packed or still dense; None: it can."""
    if reason := device_refuses(packed, "cuda", DTYPES):
        return reason
    if not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} brings no cuSPARSELt"
    for name, size in zip(("out_features", "in_features"), packed.shape, strict=True):
        if size == 0 or size % SPARSE_MULTIPLE:
            return f"{name} must be a positive multiple of {SPARSE_MULTIPLE}, got {size}"
    return None


def compress(dense: Tensor) -> Tensor:
    """A 2:4 weight [out_features, in_features] in the library's order [out_features, in_features * 9 / 16]."""
    with torch.cuda.device_of(dense):
        return torch._cslt_compress(dense.contiguous())


def multiply(
    x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: int = 0, split_k: int = 1, split_k_mode: int = -1
) -> Tensor:
    """y [tokens, out_features] of x [tokens, in_features]; the algorithm as the library's search names it."""
    tokens = len(x)
    y = torch._cslt_sparse_mm(
        compressed,
        padded(x).T,
        bias=None if bias is None else _aligned(bias),
        transpose_result=True,
        alg_id=algorithm,
        split_k=split_k,
        split_k_mode=split_k_mode,
    )
    return y if len(y) == tokens else y[:tokens].contiguous()


def padded(x: Tensor) -> Tensor:
    """x [tokens, in_features] as the library reads it: contiguous, aligned, a multiple of 8 tokens."""
    missing = -len(x) % DENSE_MULTIPLE
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else _aligned(x)


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT_BYTES else x


def prepare(packed: SemiStructured) -> tuple[Tensor, ...]:
    """What `run` reads."""
    packed.validate()
    return (compress(packed.to_dense()),)


def restore(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> SemiStructured:
    """The weight that `prepare` was given."""
    return SemiStructured.pack(dense(operands, out_features, in_features))


def dense(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> Tensor:
    """The dense weight [out_features, in_features] of what `prepare` has made."""
    (compressed,) = operands
    weight = compressed.new_empty(out_features, in_features)
    with torch.cuda.device_of(compressed):
        for start in range(0, in_features, _STRIPE):
            width = min(_STRIPE, in_features - start)
            identity = compressed.new_zeros(width, in_features)
            identity[:, start:].fill_diagonal_(1.0)
            # + 0.0: a sum of negative zeros would not be what was packed
            weight[:, start : start + width] = multiply(identity, compressed, None).T + 0.0
    return weight


def _multiply(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    flat = x.reshape(-1, in_features)
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    # a launch goes to the current device
    with torch.cuda.device_of(x):
        return multiply(flat, *operands, bias).view(*x.shape[:-1], out_features)


_LINEAR = CudaLinear("linear_24_cusparselt", ("compressed",), "compressed", _multiply, dense)


def run(x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """y [..., out_features] by the library, from what `prepare` has made."""
    return _LINEAR.run(x, operands, bias, out_features, in_features)
