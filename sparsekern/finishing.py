"""Finishing a block: with its masks fixed, the weights that stayed are fitted to what the dense block put out.

One-shot methods fit each layer by itself. What a block adds up to is fitted here by a few steps of Adam on its output:
the block reads what the pruned model before it puts out, and aims at what the dense model puts out there.

Source: block-wise reconstruction as in EBFT, Guo et al. 2024, https://arxiv.org/abs/2402.12419.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsekern import hf
from sparsekern.experts import Expert

HELD_OUT_PARTS = 8


@dataclass(frozen=True, eq=False)
class Call:
    """How a block is called on one batch, and what it should put out; all without gradients.

    target  the first tensor that the dense block put out
    counts  takes such a tensor, returns its tokens without padding [tokens, features]
    """

    args: tuple
    kwargs: Mapping[str, Any]
    target: Tensor
    counts: Callable[[Tensor], Tensor]

    def output(self, block: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
        """The first tensor that the block puts out, with `parameters` in the place of its own."""
        # a copy: a block may write to what it is given
        args = tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in self.args)
        kwargs = {key: arg.clone() if isinstance(arg, Tensor) else arg for key, arg in self.kwargs.items()}
        return first_tensor(functional_call(block, dict(parameters), args, kwargs))

    def errors(self, block: nn.Module, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """|| output - target ||^2 and || target ||^2, over the tokens that count."""
        target = self.counts(self.target).float()
        away = self.counts(self.output(block, parameters)).float() - target
        return away.square().sum(), target.square().sum()


@dataclass(frozen=True)
class BlockReport:
    """The relative error of a block's output on held-out batches, before and after its finish.

    kept  False when the finish did not lower it: then the weights are those from before
    """

    name: str
    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class Finish:
    """Fit the weights that stayed in a block to the dense block's output.

    epochs         passes over the calibration batches, one step a batch
    learning_rate  of Adam, as a part of the root mean square of the kept weights; falls to zero
    """

    epochs: int = 4
    learning_rate: float = 0.01

    def __post_init__(self):
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    def fit(self, name: str, block: nn.Module, layers: Mapping[str, hf.Layer], calls: list[Call]) -> BlockReport:
        """Change the weights of `layers` in place, zeros stay zero.

        name    of the block, for the report
        block   called as `calls` say; the first tensor it puts out is fitted
        layers  of the block that were pruned, by name
        calls   one a batch; the last eighth of them, one at least, is held out and decides whether the finish is kept

        Raises ValueError for fewer than two batches.
        """
        if len(calls) < 2:
            raise ValueError(
                f"{name}: finishing needs two calibration batches at least, one held out; got {len(calls)}"
            )
        held_out = max(1, len(calls) // HELD_OUT_PARTS)
        seen, unseen = calls[:-held_out], calls[-held_out:]
        # by identity: experts share a parameter
        wanted = {id(hf.parameter(layer)) for layer in layers.values()}
        parameters = {key: value for key, value in block.named_parameters() if id(value) in wanted}
        before = _error(block, {}, unseen)
        fitted = self._descend(block, layers, parameters, seen)
        after = _error(block, fitted, unseen)
        # NaN is not lower
        kept = after < before
        if kept:
            for key, parameter in parameters.items():
                parameter.data.copy_(fitted[key])
        return BlockReport(name, before, after, kept)

    def _descend(
        self,
        block: nn.Module,
        layers: Mapping[str, hf.Layer],
        parameters: Mapping[str, nn.Parameter],
        calls: list[Call],
    ) -> dict[str, Tensor]:
        """The fitted parameters by name, in the block's own dtype."""
        masks = _masks(parameters, layers)
        # steps are far smaller than what bfloat16 can hold
        masters = {key: value.data.float().clone().requires_grad_() for key, value in parameters.items()}
        groups = [
            {
                "params": [master],
                "lr": self.learning_rate
                * float(
                    master.detach().where(masks[key], 0.0).square().sum().div(masks[key].sum().clamp(min=1)).sqrt()
                ),
            }
            for key, master in masters.items()
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        steps = self.epochs * len(calls)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

        def cast() -> dict[str, Tensor]:
            # + 0.0: a half's small negative weight may become -0.0
            return {
                key: torch.where(masks[key], masters[key].to(value.dtype), value.data) + 0.0
                for key, value in parameters.items()
            }

        for step in range(steps):
            call = calls[step % len(calls)]
            with torch.enable_grad():
                away, size = call.errors(block, cast())
                # a layer that a batch does not reach has no gradient there, and when it reaches none there is no graph
                gradients = (
                    torch.autograd.grad(away / size, list(masters.values()), materialize_grads=True)
                    if away.requires_grad
                    else [torch.zeros_like(master) for master in masters.values()]
                )
            for master, gradient in zip(masters.values(), gradients, strict=True):
                master.grad = gradient
            optimizer.step()
            schedule.step()
        return {key: value.detach() for key, value in cast().items()}


def _masks(parameters: Mapping[str, nn.Parameter], layers: Mapping[str, hf.Layer]) -> dict[str, Tensor]:
    """The weights of `layers` that are not zero, as a mask of each parameter: it may hold experts that are not ours."""
    masks = {key: torch.zeros_like(value.data, dtype=torch.bool) for key, value in parameters.items()}
    keys = {id(value): key for key, value in parameters.items()}
    for layer in layers.values():
        parameter = hf.parameter(layer)
        part = layer.index if isinstance(layer, Expert) else slice(None)
        masks[keys[id(parameter)]][part] = parameter.data[part] != 0
    return masks


def _error(block: nn.Module, parameters: Mapping[str, Tensor], calls: list[Call]) -> float:
    """The relative error of the block's output with `parameters` in the place of its own."""
    pairs = [call.errors(block, parameters) for call in calls]
    away, size = (float(sum(column)) for column in zip(*pairs, strict=True))
    return (away / size) ** 0.5 if size else 0.0


def first_tensor(output: Any) -> Tensor:
    """Of what a block puts out, its hidden states."""
    return output if isinstance(output, Tensor) else next(item for item in output if isinstance(item, Tensor))
