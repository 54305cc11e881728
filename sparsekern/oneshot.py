"""prune(): one method over a whole model, one decoder block after the other."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from sparsekern import hf
from sparsekern.calibrate import Walk
from sparsekern.finishing import Call, Finish
from sparsekern.gradients import squared_gradients
from sparsekern.methods import Refine
from sparsekern.pattern import Pattern, Unstructured, as_pattern
from sparsekern.report import LayerReport, PruneReport, Told
from sparsekern.residence import InMemory
from sparsekern.stats import GradSquare, Gram, InputNorm


def prune(
    model: nn.Module,
    method: Any,
    pattern: Pattern | str | float | Mapping[str, Pattern | str | float],
    calibration: Iterable[Any] | None = None,
    *,
    refine: int = 0,
    finish: Finish | None = None,
    skip: Iterable[str] = (),
    errors: bool = True,
    progress: bool = False,
    residence: InMemory | None = None,
) -> PruneReport:
    """Prune the Linear layers and experts of the model's blocks in place; their weights then hold zeros.

    method       one of sparsekern.methods, e.g. SparseGPT()
    pattern      "2:4", 0.5, "50%", NM(...) or Unstructured(...); or one for each layer by name, and layers that are not
                 named stay dense
    calibration  batches of token ids [batch, tokens], or keyword batches for models that take something else; a method
                 that needs no statistics does without, and the report then holds no errors
    refine       at most this many conjugate gradient steps on what the method kept, 0 for none: Refine(method, steps)
    finish       fit what each block puts out, masks fixed, when its layers are pruned: Finish(). The layers' errors are
                 those from before it. Holds a block's input and output on all batches, and the dense model's output
    skip         names of layers to leave dense, with wildcards: "*.down_proj"
    errors       gather a Gram matrix of every input for the report; False gathers only what the method needs. A method
                 that needs gradients sees no inputs: its report holds no errors
    progress     show a progress bar on standard error
    residence    where the weights are; None: in memory. prune_streaming() prunes a checkpoint from disk to disk

    Every layer is checked before the first weight changes. Raises ValueError naming the layer when the pattern does not
    fit it, its weight or an activation is not finite, or its weight is on the meta device; ValueError when the method
    needs calibration and there is none; RuntimeError when a Hessian cannot be factored.
    """
    started = time.perf_counter()
    residence = residence or InMemory()
    method = Refine(method, refine) if refine else method
    if method.needs is not None and calibration is None:
        raise ValueError(f"{type(method).__name__} needs calibration batches, got None; Magnitude() does without")
    layers, skipped = select(model, pattern, skip, method, residence)
    names = {name for name, _ in layers}
    patterns = {name: as_pattern(pattern[name] if isinstance(pattern, Mapping) else pattern) for name in names}
    report = PruneReport(_words(method), _described(patterns), skipped=skipped, grid=_grid(method, layers))
    across = _across_the_model(method, patterns)
    differentiates = method.needs is GradSquare
    statistic = None if differentiates else Gram if errors else method.needs
    if finish is not None:
        _check_finish(method, calibration, differentiates)
        report.finish = repr(finish)
        statistic = statistic or InputNorm

    def finish_block(name: str, block: nn.Module, calls: list[Call]) -> None:
        reached = {layer.name for layer in report.layers}
        pruned = {key: layer for key, layer in layers if key in reached and key.startswith(f"{name}.")}
        # nothing but padding has nothing to aim at
        calls = [call for call in calls if len(call.counts(call.target))]
        if pruned and len(calls) > 1:
            report.blocks.append(finish.fit(name, block, pruned, calls))
        elif pruned:
            report.skipped.append((name, "not finished: it runs several times in one forward, or on one batch only"))

    told = Told(report)

    def block_over(block: str) -> None:
        if (before := residence.finished(block)) is not None:
            bar.advance(task, told.again(before))
        else:
            residence.over(block, told.since())

    walk = None
    if calibration is not None and statistic is not None:
        walk = Walk(
            model, calibration, statistic, None if finish is None else finish_block, block_over, residence=residence
        )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress, console=Console(stderr=True)) as bar:
        task = bar.add_task("pruning", total=len(layers))

        def show(done: int, total: int) -> None:
            bar.update(task, description=f"gradient {done} of {total}")

        visits = walk or _one_after_another(model, layers, residence, block_over)
        if differentiates:
            visits = squared_gradients(model, calibration, names, show)
        if across:
            # gradients are all there by now, and magnitudes need no statistics
            visits = list(visits) if differentiates else visits
            all_layers = visits if differentiates else [(name, layer, None) for name, layer in layers]
            patterns = _spread(all_layers, method, patterns)
        for name, layer, stats in visits:
            if name in names:
                bar.update(task, description=name)
                row = _prune_layer(name, layer, stats, method, patterns[name])
                report.layers.append(replace(row, fallback=walk.borrowed.get(name) if walk else None))
                bar.advance(task)
            # the loop's own name would keep a block's statistics alive while the next block's are gathered
            del stats
    if walk is not None:
        report.calibration = walk.how + (f": {walk.why}" if walk.why else "")
    elif differentiates:
        report.calibration = "gradients"
    reached = {layer.name for layer in report.layers}
    report.skipped += [(name, "never called on the calibration batches") for name, _ in layers if name not in reached]
    report.seconds = time.perf_counter() - started
    return report


def select(
    model: nn.Module,
    pattern: Pattern | str | float | Mapping[str, Pattern | str | float],
    skip: Iterable[str] = (),
    method: Any = None,
    residence: InMemory | None = None,
) -> tuple[list[tuple[str, hf.Layer]], list[tuple[str, str]]]:
    """The layers that prune() would prune, checked, and those it would leave dense with the reason; both with names.

    residence  where the weights are; None: in memory

    Raises ValueError as prune() does.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    layers, left = [], []
    for name, layer in hf.layers(model):
        (left if any(fnmatch(name, glob) for glob in skip) else layers).append((name, layer))
    for glob in skip:
        if not any(fnmatch(name, glob) for name, _ in left):
            raise ValueError(f"skip {glob!r} names no layer; the first one is {(left + layers)[0][0]}")
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer left to prune: {len(left)} skipped by name")
    unnamed = []
    if isinstance(pattern, Mapping):
        if unknown := set(pattern) - {name for name, _ in layers + left}:
            raise ValueError(
                f"pattern names {sorted(unknown)[0]!r}, which is no layer; the first one is {layers[0][0]}"
            )
        unnamed = [name for name, _ in layers if name not in pattern]
        layers = [(name, layer) for name, layer in layers if name in pattern]
    residence = residence or InMemory()
    for block, inside in _by_block(model, layers):
        with nullcontext() if residence.checked else residence.held(block):
            for name, layer in inside:
                wanted = as_pattern(pattern[name] if isinstance(pattern, Mapping) else pattern)
                _check(name, layer, wanted, method, residence)
    by_name = [(name, "skipped by name") for name, _ in left] + [(name, "no pattern names it") for name in unnamed]
    return layers, [*hf.skipped(model), *by_name]


def _described(patterns: Mapping[str, Pattern]) -> str:
    """One pattern by its own words, several unstructured ones by the range of their sparsities."""
    by_sparsity = sorted(set(patterns.values()), key=lambda pattern: pattern.sparsity)
    words = list(dict.fromkeys(map(str, by_sparsity)))
    if len(words) <= 2:
        return " and ".join(words)
    return f"{len(words)} patterns from {words[0]} to {words[-1]}"


def _grid(method: Any, layers: list[tuple[str, hf.Layer]]) -> str | None:
    """What a method that quantises leaves in a weight: no format holds the integers, and the model's dtype rounds."""
    if getattr(method, "bits", None) is None:
        return None
    shared = f"every {method.group_size} inputs" if method.group_size else "a row"
    dtypes = " and ".join(sorted({str(hf.weight(layer).dtype).removeprefix("torch.") for _, layer in layers}))
    return f"{method.bits} bits with a scale for {shared}, stored dequantised in {dtypes}"


def _check_finish(method: Any, calibration: Any, differentiates: bool) -> None:
    if calibration is None or differentiates:
        raise ValueError(f"finish needs calibration batches and a method that walks them, got {type(method).__name__}")
    if getattr(method, "bits", None) is not None:
        raise ValueError(f"finish would move weights off the {method.bits}-bit grid; leave one of the two out")


def _words(method: Any) -> str:
    """The method and its settings other than the default's: "SparseGPT", "Refine(method=Wanda, steps=10)"."""
    if not is_dataclass(method):
        return repr(method)
    changed = [(f.name, getattr(method, f.name)) for f in fields(method) if getattr(method, f.name) != _default(f)]
    settings = [f"{name}={_words(value) if is_dataclass(value) else repr(value)}" for name, value in changed]
    return type(method).__name__ + (f"({', '.join(settings)})" if settings else "")


def _default(setting: Field) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def _across_the_model(method: Any, patterns: Mapping[str, Pattern]) -> bool:
    """Whether the weights of all layers compete, and the method can rank them before the first is pruned."""
    if not any(isinstance(pattern, Unstructured) and pattern.scope == "model" for pattern in patterns.values()):
        return False
    if len(set(patterns.values())) > 1:
        raise ValueError('scope "model" is one pattern for all layers; give them other scopes to tell them apart')
    if method.needs not in (None, GradSquare) or not hasattr(method, "saliency"):
        raise ValueError(
            f'{type(method).__name__} cannot rank the weights of all layers at once, as scope "model" needs: what a'
            " layer reads depends on those before it; Magnitude and OBD can"
        )
    return True


def _spread(
    visits: list[tuple[str, hf.Layer, Any]], method: Any, patterns: Mapping[str, Pattern]
) -> dict[str, Pattern]:
    """Each layer's share of a pattern of scope "model"."""
    saliencies = {}
    for name, layer, stats in visits:
        try:
            saliencies[name] = method.saliency(hf.weight(layer), stats)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return next(iter(patterns.values())).spread(saliencies)


def _by_block(model: nn.Module, layers: list[tuple[str, hf.Layer]]) -> Iterator[tuple[str, list[tuple[str, hf.Layer]]]]:
    for block, _ in hf.blocks(model):
        yield block, [(name, layer) for name, layer in layers if name.startswith(f"{block}.")]


def _one_after_another(
    model: nn.Module, layers: list[tuple[str, hf.Layer]], residence: InMemory, over: Callable[[str], None]
) -> Iterator[tuple[str, hf.Layer, None]]:
    """The layers without statistics, as Walk yields them with."""
    for block, inside in _by_block(model, layers):
        if residence.finished(block) is None:
            with residence.held(block):
                yield from ((name, layer, None) for name, layer in inside)
                over(block)
        else:
            over(block)


def _check(name: str, layer: hf.Layer, pattern: Pattern, method: Any, residence: InMemory) -> None:
    weight = hf.weight(layer)
    if weight.is_meta and residence.device is None:
        raise ValueError(f"{name}: weight is on the meta device; load the model without offloading (device_map=None)")
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        raise ValueError(f"{name}: weight is expanded: several of its elements lie in one place; clone it first")
    try:
        pattern.check(weight.shape[1])
        if hasattr(method, "check"):
            method.check(weight.shape[1], pattern)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; leave the layer dense with skip") from None
    if not residence.checked and not weight.isfinite().all():
        raise ValueError(f"{name}: weight holds {int((~weight.isfinite()).sum())} NaN or infinite values")


@torch.no_grad()
def _prune_layer(name: str, layer: hf.Layer, stats: Any, method: Any, pattern: Pattern) -> LayerReport:
    started = time.perf_counter()
    weight = hf.weight(layer)
    try:
        # the model's dtype rounds what the method found: the report is about what the layer now holds; + 0.0 turns
        # -0.0, which a packed format would take for a zero with a sign, into 0.0
        pruned = method.prune(weight, stats, pattern).to(weight.dtype) + 0.0
        if not pruned.isfinite().all():
            raise ValueError(f"the repaired weight overflows {weight.dtype}; load the model in bfloat16 or float32")
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{name}: {error}") from error
    measured = _errors(weight, pruned, stats)
    weight.copy_(pruned)
    return LayerReport(
        name=name,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        sparsity=float((pruned == 0).float().mean()),
        seconds=time.perf_counter() - started,
        **measured,
    )


def _errors(weight: Tensor, pruned: Tensor, stats: Any) -> dict[str, Any]:
    if not isinstance(stats, Gram):
        return {"error": None, "held_out_error": None, "damping": None, "dead_inputs": None}
    return {
        "error": stats.error(weight, pruned),
        "held_out_error": stats.held_out_error(weight, pruned),
        "damping": stats.damping,
        "retries": stats.retries,
        "dead_inputs": int(stats.dead.sum()),
    }
