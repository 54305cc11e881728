"""gradients: the squared gradients of a model's own loss, for methods that ask what the loss feels.

Forward and backward run one calibration sequence at a time. A layer's gradient is squared into its accumulator and
freed as soon as backward has it, and a block's activations are computed again when backward comes to it, so that what
is held is the model, one float32 number a weight of its layers, and one block's activations.
"""

import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsekern import hf
from sparsekern.batches import Batch, read_batches
from sparsekern.experts import Expert
from sparsekern.stats import GradSquare


def squared_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Container[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, hf.Layer, GradSquare]]:
    """The mean squared gradient of every layer's weight, as (name, layer, stats); layers the loss ignores are left out,
    experts that no token reaches among them.

    model     its forward takes labels and returns an object with the mean loss of one sequence as `loss`
    batches   tensors [batch, tokens] of token ids, which are their own labels, or dicts of what forward takes by
              keyword, with labels; whatever in a dict is as long as labels is cut into sequences with it
    names     of the layers that are wanted, None for all of hf.layers(model)
    progress  called with the sequences done and their total

    All gradients are taken before the first layer is yielded; by then the model is as it was given: training mode,
    requires_grad, grad, no hooks. Raises TypeError for a model without a loss; ValueError for batches without labels,
    float16 weights, weights on the meta device, and a loss or gradient that is not finite, naming layer and batch.
    """
    layers = [(name, layer) for name, layer in hf.layers(model) if names is None or name in names]
    for name, layer in layers:
        _check(name, layer)
    parameters = inspect.signature(model.forward).parameters
    if not any(name == "labels" or p.kind is p.VAR_KEYWORD for name, p in parameters.items()):
        raise TypeError(f"{type(model).__name__} has no loss to differentiate: its forward takes no labels")
    cut = [list(_sequences(number, batch)) for number, batch in enumerate(read_batches(batches))]
    total, done = sum(map(len, cut)), 0
    stats = {name: GradSquare(*hf.weight(layer).shape, layer.weight.device) for name, layer in layers}
    held: dict[nn.Parameter, list[tuple[str, hf.Layer]]] = {}
    for name, layer in layers:
        held.setdefault(hf.parameter(layer), []).append((name, layer))
    reached: set[str] = set()
    with hf.evaluating(model), _checkpointed(model), _differentiable(model, held):
        for number, sequences in enumerate(cut):
            for sequence in sequences:
                missing = dict(layers)
                with ExitStack() as hooks:
                    for parameter, inside in held.items():
                        hook = _accumulator(inside, stats, missing, number)
                        hooks.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
                    loss = _loss(model, sequence, "use_cache" in parameters, number)
                    # it does not when no wanted layer took part
                    if loss.requires_grad:
                        loss.backward()
                reached |= stats.keys() - missing.keys()
                for name in missing:
                    stats[name].add(None)
                progress(done := done + 1, total)
    for name, layer in layers:
        if name in reached:
            # popped: the consumer's reference is the last
            yield name, layer, stats.pop(name)


def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The mean loss of a sequence, forward only; batches, model and errors are those of squared_gradients."""
    takes_use_cache = "use_cache" in inspect.signature(model.forward).parameters
    losses = []
    with hf.evaluating(model):
        for number, batch in enumerate(read_batches(batches)):
            losses += [float(_loss(model, one, takes_use_cache, number)) for one in _sequences(number, batch)]
    return sum(losses) / len(losses)


def _check(name: str, layer: hf.Layer) -> None:
    if layer.weight.is_meta:
        raise ValueError(f"{name}: weight is on the meta device; load the model without device_map offloading")
    if layer.weight.dtype == torch.float16:
        raise ValueError(f"{name}: gradients of torch.float16 underflow; load the model in bfloat16 or float32")


def _sequences(number: int, batch: Batch) -> Iterator[dict[str, Any]]:
    """The batch cut into sequences, each what forward takes by keyword, or with the token ids under ""."""
    if isinstance(batch, Tensor):
        yield from ({"": ids[None], "labels": ids[None]} for ids in batch)
        return
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or not labels.dim():
        raise ValueError(f"calibration batch {number} holds no labels, without which the model has no loss")

    def part(value: Any, at: int) -> Any:
        return value[at : at + 1] if isinstance(value, Tensor) and value.shape[:1] == labels.shape[:1] else value

    yield from ({key: part(value, at) for key, value in batch.items()} for at in range(len(labels)))


def _loss(model: nn.Module, sequence: Mapping[str, Any], takes_use_cache: bool, number: int) -> Tensor:
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in sequence.items()}
    ids = (moved.pop(""),) if "" in moved else ()
    output = model(*ids, **moved, **({"use_cache": False} if takes_use_cache else {}))
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{type(model).__name__} has no loss to differentiate: its forward returns {type(output).__name__}"
        )
    if not loss.isfinite().all():
        raise ValueError(f"calibration batch {number}: the loss is {float(loss.detach())}")
    return loss


def _accumulator(
    layers: list[tuple[str, hf.Layer]], stats: dict[str, GradSquare], missing: dict[str, hf.Layer], number: int
) -> Callable[[Tensor], None]:
    """What squares the gradient of one parameter's layers into `stats`, frees it, and takes them off `missing`."""

    def hook(parameter: Tensor) -> None:
        for name, layer in layers:
            gradient = hf.gradient(layer)
            # the experts of a parameter get their gradients together, reached or not
            if isinstance(layer, Expert) and not gradient.any():
                continue
            try:
                stats[name].add(gradient)
            except ValueError as error:
                raise ValueError(f"{name}: calibration batch {number}: {error}") from error
            del missing[name]
        parameter.grad = None

    return hook


@contextmanager
def _differentiable(model: nn.Module, wanted: Container[nn.Parameter]) -> Iterator[None]:
    """While open, the layers' weights and nothing else take gradients."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(parameter in wanted)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """While open, each block forgets its activations and computes them again for backward."""

    def forgetful(forward: Callable) -> Callable:
        # transformers' own checkpointing works in training mode only
        return lambda *args, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    with ExitStack() as stack:
        for _, block in hf.blocks(model):
            own = block.__dict__.get("forward")
            block.forward = forgetful(block.forward)
            stack.callback(_put_back, block, own)
        yield


def _put_back(block: nn.Module, own: Callable | None) -> None:
    del block.forward
    if own is not None:
        block.forward = own
