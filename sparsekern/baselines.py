"""baselines: what a sparse linear layer has to beat: torch's own linear, dense, in the forms that people can have.

F.linear    what nn.Linear calls
prepacked   oneDNN with the weight reordered beforehand, which is what torch.compile with freezing calls
compiled    torch.compile: on the CPU with freezing; a second of compilation a layer, and not seen to beat prepacked
cuSPARSELt  torch's own product with a 2:4 weight, with the algorithm that its search finds best; what a sparse layer of
            ours has to beat where the weight is 2:4
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.ops import compiled, cusparselt


@dataclass(frozen=True)
class Dense:
    """A baseline: `prepare` makes from (weight, bias, tokens) what `run` reads beside x and the bias.

    All are dense but CUSPARSELT, whose weight must be 2:4.

    of_tokens  prepared anew for each number of tokens
    """

    name: str
    prepare: Callable[[Tensor, Tensor | None, int], object]
    run: Callable[[Tensor, object, Tensor | None], Tensor]
    refuses: Callable[[Tensor], str | None]
    of_tokens: bool = False


class _Linear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _prepacked_refuses(weight: Tensor) -> str | None:
    if weight.device.type != "cpu":
        return f"the weight must be on the CPU, got {weight.device}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this processor"
    return None if weight.dtype in (torch.bfloat16, torch.float32) else f"unsupported dtype {weight.dtype}"


def _compile(weight: Tensor, bias: Tensor | None, tokens: int) -> object:
    # exported, so that no guard is checked when it is called
    x = weight.new_zeros(tokens, weight.shape[1])
    with torch.no_grad():
        graph = torch.export.export(_Linear(weight.clone(), bias), (x,)).module()
        return torch._inductor.compile(graph, (x,), options={"freezing": weight.device.type == "cpu"})


def _search(compressed: Tensor, x: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
    """The library's fastest algorithm for this product, how it splits the sum, and in which way."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    arguments = (compressed, cusparselt.padded(x).T, bias, None, None, True)
    with torch.cuda.device_of(x):
        if search is None:
            return torch._cslt_sparse_mm_search(*arguments), 1, -1
        return search(*arguments)[:3]


def _prepare_searched(weight: Tensor, bias: Tensor | None, tokens: int) -> tuple[Tensor, int, int, int]:
    compressed = cusparselt.compress(weight)
    x = torch.randn(tokens, weight.shape[1], device=weight.device).to(weight.dtype)
    return compressed, *_search(compressed, x, bias)


LINEAR = Dense("F.linear", lambda weight, *_: compiled.copy(weight), F.linear, lambda weight: None)
PREPACKED = Dense(
    "prepacked",
    # the layout that oneDNN chooses was seen not to depend on the number of tokens
    lambda weight, *_: torch.ops.mkldnn._reorder_linear_weight(weight.clone(), None),
    lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""),
    _prepacked_refuses,
)
COMPILED = Dense(
    "compiled",
    _compile,
    lambda x, call, _: call(x),
    lambda weight: None,
    of_tokens=True,
)
CUSPARSELT = Dense(
    "cuSPARSELt",
    _prepare_searched,
    lambda x, prepared, bias: cusparselt.multiply(x, prepared[0], bias, *prepared[1:]),
    cusparselt.refuses,
    of_tokens=True,
)
