"""calibrate: walk tokens through a model block by block and gather statistics of every layer's input.

The consumer of a block's statistics changes its layers; the next block then sees what the changed ones put out. Two
ways to get there, both by the model's own forward, so that masks and positions stay the model's business:

    replay  blocks already done return what the last of their stack put out, the current one runs, the forward stops
    prefix  the whole forward up to the current block, each time: right for every model, quadratic in depth

Replay is right when nothing but the next block reads what a block puts out. That is checked, not believed: before any
weight changes the first batch is replayed through all blocks, and each must get the inputs of a plain forward bit for
bit.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import hf
from sparsekern.batches import Batch, Padding, by_name, map_tensors, read_batches
from sparsekern.experts import Expert, RoutedTokens, borrow
from sparsekern.finishing import Call, first_tensor

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
    ):
        layers = hf.layers(model)
        if not layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in hf.skipped(model)[:3])
            raise ValueError(f"{type(model).__name__} has no layer to prune ({reasons})")
        for name, layer in layers:
            if hf.weight(layer).is_meta:
                raise ValueError(f"{name}: weight is on the meta device; load the model without device_map offloading")
        self.layers = [name for name, _ in layers]
        self.blocks = [name for name, _ in hf.blocks(model)]
        self.how: str | None = None
        self.why: str | None = None
        self.never_called: list[str] = []
        self.borrowed: dict[str, str] = {}
        self._model, self._statistic, self._device = model, statistic, hf.weight(layers[0][1]).device
        self._blocks = [_Block(name, module, layers) for name, module in hf.blocks(model)]
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
        done: list[_Block] = []
        outputs: dict[tuple[str, int], Any] = {}
        dense: dict[tuple[str, int], Any] = {}
        for trace in traces:
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
                del calls
            if self.how == "replay" and trace is not traces[-1]:
                with hf.evaluating(self._model):
                    for number in range(len(self._batches)):
                        outputs[block.stack, number] = self._forward(number, trace, done, outputs)
                done.append(block)

    def first_output(self) -> Any:
        """What the model puts out on the first batch, run as the walk runs it."""
        with hf.evaluating(self._model):
            args, kwargs = self._batch(0)
            return self._model(*args, **kwargs)

    def _plain_forward(self) -> "list[_Trace]":
        """What an ordinary forward of the first batch does with each block, in the order they run."""
        ran: dict[str, _Trace] = {}
        with hf.evaluating(self._model), ExitStack() as watches:
            for block in self._blocks:
                watches.enter_context(_Trace(block).watching(ran))
            args, kwargs = self._batch(0)
            self._model(*args, **kwargs)
        if not ran:
            raise hf.UnknownModelError(f"{type(self._model).__name__} calls none of its blocks on the first batch")
        return list(ran.values())

    def _why_not_replay(self, traces: "list[_Trace]") -> str | None:
        """Replay the first batch through all blocks, exactly as the walk will; None when each got what it should."""
        done: list[_Block] = []
        outputs: dict[tuple[str, int], Any] = {}
        for trace in traces:
            block = trace.block
            if trace.calls > 1:
                return f"{block.name} runs {trace.calls} times in one forward"
            replayed: dict[str, _Trace] = {}
            try:
                with hf.evaluating(self._model), _Trace(block).watching(replayed):
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

    def _collect(self, trace: "_Trace", done: "list[_Block]", outputs: dict) -> dict[str, Any]:
        """The statistics of one block's layers by name, from all batches; without the layers that no token reached."""
        # left before the second try: the exception holds the statistics of the first
        with suppress(_LayersPartedError):
            return self._gather(trace, trace.leaders(), done, outputs)
        # a later batch took another way through the block: then nobody shares
        return self._gather(trace, {name: name for name in trace.block.layers}, done, outputs)

    def _gather(self, trace: "_Trace", leaders: dict[str, str], done: "list[_Block]", outputs: dict) -> dict[str, Any]:
        """leaders: for each layer the one whose statistics it shares, perhaps its own."""
        stats: dict[str, Any] = {}
        with hf.evaluating(self._model):
            for number in range(len(self._batches)):
                reads = _Reads()
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

                with _watched(trace.block, padding.enter, read, reads.forget, routed):
                    self._forward(number, trace, done, outputs)
                if any(reads.of(name) != reads.of(leader) for name, leader in leaders.items()):
                    raise _LayersPartedError
        return {name: stats[leader] for name, leader in leaders.items() if leader in stats}

    def _calls(self, trace: "_Trace", done: "list[_Block]", outputs: dict, dense: dict) -> list[Call]:
        """How a block is called on every batch that reaches it, aiming at what it puts out while it is dense.

        outputs  of the blocks that are done
        dense    what those put out in the dense model; the block's own are added. With prefix the blocks before are
                 changed by now, and the target is what the dense block makes of their outputs
        """
        calls = []

        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            raise _StoppedError((args, kwargs))

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

    def _forward(self, number: int, trace: "_Trace", done: "list[_Block]", outputs: dict) -> Any:
        """Run batch `number` through the model up to and including a block; returns what the block put out."""

        def stop(output: Any) -> None:
            # a block that runs several times has more to come
            if trace.calls == 1:
                raise _StoppedError(output)

        with _watched(trace.block, leave=stop):
            return self._run(number, done, outputs)

    def _run(self, number: int, done: "list[_Block]", outputs: dict) -> Any:
        """Run batch `number` through the model, blocks that are done returning `outputs`, until a hook stops it.

        Returns what the hook has to say, None when none stopped it.
        """
        args, kwargs = self._batch(number)
        with ExitStack() as stack:
            for block in done:
                stack.enter_context(_returning(block.module, outputs[block.stack, number]))
            try:
                self._model(*args, **kwargs)
            except _StoppedError as stopped:
                return stopped.said
        return None

    def _batch(self, number: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Batch `number` on the model's device, as positional and keyword arguments."""
        batch = self._batches[number]
        extra = {"use_cache": False} if "use_cache" in inspect.signature(self._model.forward).parameters else {}
        if isinstance(batch, Tensor):
            return (batch.to(self._device),), extra
        return (), {key: map_tensors(batch[key], lambda t: t.to(self._device)) for key in batch} | extra


class _StoppedError(Exception):
    """The forward has come as far as it is wanted."""

    def __init__(self, said: Any):
        super().__init__()
        self.said = said


class _LayersPartedError(Exception):
    """Layers that shared an input on the first batch do not on another."""


class _Block:
    def __init__(self, name: str, module: nn.Module, layers: list[tuple[str, hf.Layer]]):
        self.name, self.module = name, module
        # blocks of one ModuleList hand on to each other; an encoder's last output is still read when a decoder runs
        self.stack = name.rpartition(".")[0]
        self.layers = {layer_name: layer for layer_name, layer in layers if layer_name.startswith(f"{name}.")}
        self.experts = {layer_name: layer for layer_name, layer in self.layers.items() if isinstance(layer, Expert)}


class _Trace:
    """What a forward did with a block: how often it ran, on what, and which tensors its layers read."""

    def __init__(self, block: _Block):
        self.block, self.calls = block, 0
        self.inputs: list[Any] = []
        self._reads = _Reads()

    @contextmanager
    def watching(self, ran: "dict[str, _Trace]") -> Iterator[None]:
        """While open, note what happens; a block that runs enters itself in `ran`."""

        def enter(arguments: Mapping[str, Any]) -> None:
            ran[self.block.name] = self
            self.calls += 1
            self.inputs.append(_fingerprint(arguments))

        with _watched(self.block, enter=enter, read=self._reads.note, leave=self._reads.forget):
            yield

    def leaders(self) -> dict[str, str]:
        """For each layer the first one that reads the same tensors; itself for one that reads none."""
        first: dict[tuple[int, ...], str] = {}
        return {name: first.setdefault(self._reads.of(name) or (name,), name) for name in self.block.layers}


class _Reads:
    """Which tensor each layer reads, as numbers: the same number is the same memory, not written to in between."""

    def __init__(self):
        self._numbers: dict[str, list[int]] = {}
        # kept alive, or an address could come back with other content
        self._alive: dict[tuple, tuple[int, Tensor]] = {}
        self._next = 0

    def note(self, name: str, x: Tensor) -> None:
        key = (x.data_ptr(), x.dtype, x.shape, x.stride(), x._version)
        if key not in self._alive:
            self._alive[key] = self._next, x
            self._next += 1
        self._numbers.setdefault(name, []).append(self._alive[key][0])

    def of(self, name: str) -> tuple[int, ...]:
        return tuple(self._numbers.get(name, ()))

    def forget(self, _: Any = None) -> None:
        self._alive.clear()


@contextmanager
def _watched(
    block: _Block,
    enter: Callable[[Mapping[str, Any]], None] = lambda arguments: None,
    read: Callable[[str, Tensor], None] | None = None,
    leave: Callable[[Any], None] = lambda output: None,
    routed: Callable[[str, Tensor, Tensor | None, int], None] | None = None,
) -> Iterator[None]:
    """While open, call `enter` with the block's arguments by name, `read` with its layers' inputs, `leave` after it.

    routed  as RoutedTokens calls it, for the block's experts
    """
    running = False

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal running
        running = True
        enter(by_name(module, args, kwargs))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal running
        running = False
        leave(output)

    def reader(name: str) -> Callable:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            # a layer may be shared with another block, whose turn this is not
            if running:
                read(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    with ExitStack() as hooks:
        hooks.callback(block.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(block.module.register_forward_hook(after).remove)
        if routed is not None and block.experts:
            hooks.enter_context(RoutedTokens(block.experts, lambda *what: routed(*what) if running else None))
        layers = {name: layer for name, layer in block.layers.items() if name not in block.experts}
        for name, layer in layers.items() if read is not None else ():
            hooks.callback(layer.register_forward_pre_hook(reader(name), with_kwargs=True).remove)
        yield


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """While open, the module does nothing but return a copy of `output`."""
    own = module.__dict__.get("forward")
    # a copy: what comes after may write to it
    module.forward = lambda *args, **kwargs: map_tensors(output, Tensor.clone)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _fingerprint(value: Any) -> Any:
    """Equal for equal values, tensors bit for bit, at the size of a hash."""
    if isinstance(value, Tensor):
        octets = value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        return value.dtype, value.shape, hashlib.sha256(octets).digest()
    if isinstance(value, tuple | list):
        return tuple(_fingerprint(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, _fingerprint(item)) for key, item in value.items())
    return value if isinstance(value, int | float | str | None) else type(value)
