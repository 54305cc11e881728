"""baselines: what a sparse linear layer has to beat: torch's own linear, dense, in the forms that people can have.

F.linear    what nn.Linear calls
prepacked   oneDNN with the weight reordered beforehand, which is what torch.compile with freezing calls
compiled    torch.compile with freezing itself: a second of compilation a layer, and not seen to beat prepacked
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Dense:
    """A dense baseline: `prepare` makes from (weight, bias, tokens) what `run` reads beside x and the bias.

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
        return torch._inductor.compile(graph, (x,), options={"freezing": True})


LINEAR = Dense("F.linear", lambda weight, *_: weight.clone(), F.linear, lambda weight: None)
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
    lambda weight: None if weight.device.type == "cpu" else f"freezing is for the CPU, got {weight.device}",
    of_tokens=True,
)
