"""calibrate: walk tokens through a model block by block and gather statistics of every layer's input.

The consumer of a block's statistics changes its layers; the next block then sees what the changed ones put out. Two
ways to get there, both by the model's own forward, so that masks and positions stay the model's business:

    replay  blocks already done return what the last of their stack put out, the current one runs, the forward stops
    prefix  the whole forward up to the current block, each time: right for every model, quadratic in depth

Replay is right when nothing but the next block reads what a block puts out. That is checked, not believed: before any
weight changes the first batch is replayed through all blocks, and each must get the inputs of a plain forward bit for
bit.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import hf
from sparsekern.batches import Batch, Padding, by_name, map_tensors, read_batches
from sparsekern.experts import borrow
from sparsekern.finishing import Call, first_tensor
from sparsekern.residence import InMemory
from sparsekern.traces import Block, LayersPartedError, Reads, StoppedError, Trace, returning, watched

# what a block raises when replay feeds it something that its model never would
REPLAY_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class Walk:
    """The statistics of every layer's input, as (name, layer, stats), block by block.

    model      any nn.Module with blocks (see hf.blocks), on one device
    batches    tensors [batch, tokens] of token ids, or dicts of what forward takes by keyword; read once, kept on the
               CPU. Tokens where attention_mask is 0 do not count
    statistic  InputNorm, Gram or alike: called with (in_features, device), then add(x [tokens, in_features]);
               with experts to borrow for it has `tokens` and count(other, times)
    finish     called with a block's name, the block and its calls, one a batch, when its layers have been changed; no
               calls for a block that runs several times in one forward. It may change the block further
    over       called with a block's name when nothing of it will change any more
    residence  where the weights are when they are not in memory; blocks that it knows as finished are not yielded

    Layers that read the same tensor (q, k, v) share one stats object. An expert of a 3-D parameter (hf.Expert) counts
    the tokens routed to it, and borrows when those are few (experts.borrow). A layer may be changed from when it is
    yielded until the next block's first layer is asked for. Whoever drops `stats` by then has never more than one
    block's statistics alive. Between two layers the model is as it was given: no hooks, its own training mode.

    blocks, layers  names, as they stand in the model; for a progress bar
    how, why        "replay" or "prefix", and why not replay; None before the walk has begun
    never_called    layers that no token has reached: they are not yielded
    borrowed        what the statistics of experts with too few tokens are made of, by name

    Raises ValueError for no batches, an empty one, nothing but padding, no layer to prune, or weights on the meta
    device; TypeError for a model without blocks. A NaN or infinite activation raises ValueError with the layer and the
    batch (the first is 0) before any weight of its block has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        statistic: Callable[[int, torch.device], Any],
        finish: Callable[[str, nn.Module, list[Call]], None] | None = None,
        over: Callable[[str], None] = lambda block: None,
        residence: InMemory | None = None,
    ):
        layers = hf.layers(model)
        if not layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in hf.skipped(model)[:3])
            raise ValueError(f"{type(model).__name__} has no layer to prune ({reasons})")
        self._residence, self._over = residence or InMemory(), over
        for name, layer in layers:
            if hf.weight(layer).is_meta and self._residence.device is None:
                raise ValueError(f"{name}: weight is on the meta device; load the model without device_map offloading")
        self.layers = [name for name, _ in layers]
        self.blocks = [name for name, _ in hf.blocks(model)]
        self.how: str | None = None
        self.why: str | None = None
        self.never_called: list[str] = []
        self.borrowed: dict[str, str] = {}
        self._model, self._statistic = model, statistic
        self._device = self._residence.device or hf.weight(layers[0][1]).device
        self._blocks = [Block(name, module, layers) for name, module in hf.blocks(model)]
        self._batches = read_batches(batches)
        self._finish = finish
        if finish is not None and len(self._batches) < 2:
            raise ValueError("finishing a block needs two calibration batches at least, because one is held out; got 1")

    def __iter__(self) -> Iterator[tuple[str, hf.Layer, Any]]:
        traces = self._plain_forward()
        self.why = self._why_not_replay(traces)
        self.how = "prefix" if self.why else "replay"
        called = {trace.block.name for trace in traces}
        self.never_called = [name for block in self._blocks if block.name not in called for name in block.layers]
        done: list[Block] = []
        outputs: dict[tuple[str, int], Any] = {}
        dense: dict[tuple[str, int], Any] = {}
        to_do = [number for number, trace in enumerate(traces) if not self._residence.finished(trace.block.name)]
        for number, trace in enumerate(traces):
            block, read_on = trace.block, self.how == "replay" and number < max(to_do, default=0)
            if number in to_do:
                with self._residence.held(block.name):
                    yield from self._visit(trace, done, outputs, dense)
                    if read_on:
                        self._put_out(trace, done, outputs)
                    self._over(block.name)
            else:
                if read_on and self._finish is not None:
                    # later blocks aim at what the dense model puts out
                    with self._residence.held(block.name, dense=True):
                        self._put_out(trace, done, dense)
                if read_on:
                    self._put_out(trace, done, outputs)
                self._over(block.name)
            if read_on:
                done.append(block)

    def _visit(self, trace: Trace, done: list[Block], outputs: dict, dense: dict) -> Iterator[tuple]:
        """The layers of one block, each to be changed when it is yielded."""
        block = trace.block
        calls = self._calls(trace, done, outputs, dense) if self._finish is not None else []
        stats = self._collect(trace, done, outputs)
        self.borrowed |= borrow(block.experts, stats, self._statistic)
        self.never_called += [name for name in block.layers if name not in stats]
        for name, layer in block.layers.items():
            if name in stats:
                # popped: the consumer's reference is the last
                yield name, layer, stats.pop(name)
        if self._finish is not None:
            with hf.evaluating(self._model):
                self._finish(block.name, block.module, calls)

    def _put_out(self, trace: Trace, done: list[Block], outputs: dict) -> None:
        """Note what a block puts out on every batch."""
        with hf.evaluating(self._model):
            for number in range(len(self._batches)):
                outputs[trace.block.stack, number] = self._forward(number, trace, done, outputs)

    def first_output(self) -> Any:
        """What the model puts out on the first batch, run as the walk runs it."""
        with hf.evaluating(self._model):
            args, kwargs = self._batch(0)
            return self._model(*args, **kwargs)

    def _plain_forward(self) -> list[Trace]:
        """What an ordinary forward of the first batch does with each block, in the order they run."""
        ran: dict[str, Trace] = {}
        with hf.evaluating(self._model), ExitStack() as watches:
            for block in self._blocks:
                watches.enter_context(Trace(block).watching(ran))
            args, kwargs = self._batch(0)
            self._model(*args, **kwargs)
        if not ran:
            raise hf.UnknownModelError(f"{type(self._model).__name__} calls none of its blocks on the first batch")
        return list(ran.values())

    def _why_not_replay(self, traces: list[Trace]) -> str | None:
        """Replay the first batch through all blocks, exactly as the walk will; None when each got what it should."""
        done: list[Block] = []
        outputs: dict[tuple[str, int], Any] = {}
        for trace in traces:
            block = trace.block
            if trace.calls > 1:
                return f"{block.name} runs {trace.calls} times in one forward"
            replayed: dict[str, Trace] = {}
            try:
                with hf.evaluating(self._model), Trace(block).watching(replayed):
                    outputs[block.stack, 0] = self._forward(0, trace, done, outputs)
            except torch.OutOfMemoryError:
                raise
            except REPLAY_FAILURES as error:
                reason = " ".join(str(error).split())[:200]
                return f"{block.name} fails when replayed: {type(error).__name__}: {reason}"
            if block.name not in replayed or replayed[block.name].inputs != trace.inputs:
                return f"{block.name} does not get its inputs when replayed"
            done.append(block)
        return None

    def _collect(self, trace: Trace, done: list[Block], outputs: dict) -> dict[str, Any]:
        """The statistics of one block's layers by name, from all batches; without the layers that no token reached."""
        # left before the second try: the exception holds the statistics of the first
        with suppress(LayersPartedError):
            return self._gather(trace, trace.leaders(), done, outputs)
        # a later batch took another way through the block: then nobody shares
        return self._gather(trace, {name: name for name in trace.block.layers}, done, outputs)

    def _gather(self, trace: Trace, leaders: dict[str, str], done: list[Block], outputs: dict) -> dict[str, Any]:
        """leaders: for each layer the one whose statistics it shares, perhaps its own."""
        stats: dict[str, Any] = {}
        with hf.evaluating(self._model):
            for number in range(len(self._batches)):
                reads = Reads()
                padding = Padding(self._batches[number])

                def add(name: str, remove: Callable[..., Tensor], *x: Any, number=number) -> None:
                    try:
                        tokens = remove(*x)
                        if len(tokens) and name not in stats:
                            layer = trace.block.layers[name]
                            stats[name] = self._statistic(hf.weight(layer).shape[1], layer.weight.device)
                        if len(tokens):
                            stats[name].add(tokens)
                    except ValueError as error:
                        raise ValueError(f"{name}: calibration batch {number}: {error}") from error

                def read(name: str, x: Tensor, reads=reads, add=add, padding=padding) -> None:
                    reads.note(name, x)
                    if leaders[name] == name:
                        add(name, padding.removed, x)

                def routed(name: str, *x: Any, add=add, padding=padding) -> None:
                    add(name, padding.removed_from_some, *x)

                with watched(trace.block, padding.enter, read, reads.forget, routed):
                    self._forward(number, trace, done, outputs)
                if any(reads.of(name) != reads.of(leader) for name, leader in leaders.items()):
                    raise LayersPartedError
        return {name: stats[leader] for name, leader in leaders.items() if leader in stats}

    def _calls(self, trace: Trace, done: list[Block], outputs: dict, dense: dict) -> list[Call]:
        """How a block is called on every batch that reaches it, aiming at what it puts out while it is dense.

        outputs  of the blocks that are done
        dense    what those put out in the dense model; the block's own are added. With prefix the blocks before are
                 changed by now, and the target is what the dense block makes of their outputs
        """
        calls = []

        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            raise StoppedError((args, kwargs))

        with hf.evaluating(self._model):
            for number in range(len(self._batches)) if trace.calls == 1 else ():
                hook = trace.block.module.register_forward_pre_hook(stop, with_kwargs=True)
                with ExitStack() as stack:
                    stack.callback(hook.remove)
                    called = self._run(number, done, outputs)
                target = dense[trace.block.stack, number] = self._forward(number, trace, done, dense)
                if called is not None:
                    padding = Padding(self._batches[number])
                    padding.enter(by_name(trace.block.module, *called))
                    calls.append(Call(*called, first_tensor(target), padding.removed))
        return calls

    def _forward(self, number: int, trace: Trace, done: list[Block], outputs: dict) -> Any:
        """Run batch `number` through the model up to and including a block; returns what the block put out."""

        def stop(output: Any) -> None:
            # a block that runs several times has more to come
            if trace.calls == 1:
                raise StoppedError(output)

        with watched(trace.block, leave=stop):
            return self._run(number, done, outputs)

    def _run(self, number: int, done: list[Block], outputs: dict) -> Any:
        """Run batch `number` through the model, blocks that are done returning `outputs`, until a hook stops it.

        Returns what the hook has to say, None when none stopped it.
        """
        args, kwargs = self._batch(number)
        with ExitStack() as stack:
            for block in done:
                stack.enter_context(returning(block.module, outputs[block.stack, number]))
            try:
                self._model(*args, **kwargs)
            except StoppedError as stopped:
                return stopped.said
        return None

    def _batch(self, number: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Batch `number` on the model's device, as positional and keyword arguments."""
        batch = self._batches[number]
        extra = {"use_cache": False} if "use_cache" in inspect.signature(self._model.forward).parameters else {}
        if isinstance(batch, Tensor):
            return (batch.to(self._device),), extra
        return (), {key: map_tensors(batch[key], lambda t: t.to(self._device)) for key in batch} | extra
