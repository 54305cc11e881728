"""solver: what pruning costs on the card: a block of the sweep, a layer against the plain column loop, a decoder block.

The column loop is bench/solver.py's: SparseGPT as published, in torch, a few small launches a column. Both prune the
same weight with the same Hessian, and must reach the same error before anything is timed.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from solver import BLOCK, DAMPING, MOST_WORSE, column_loop, fresh
from torch import Tensor

from card.clock import time_variants
from card.worker import Case, Json, Setting, errors_of
from sparsekern import shapes
from sparsekern.methods import ADMM, SparseGPT
from sparsekern.ops import inverse_cholesky, keep_largest, obs_blocks, obs_sweep, triton
from sparsekern.ops.kernel import pick
from sparsekern.pattern import NM, Unstructured
from sparsekern.stats import Gram
from sparsekern.timing import Latency, Sample

PATTERNS = (Unstructured(0.5), NM(2, 4))
MODEL = "llama-3-8b"
BLOCK_ROUNDS = 8
# of inverse_cholesky: the sizes at which the library may take over from the halves
CORNERS = (256, 512, 1024, 2048)
LIBRARY = "library"
# an entry of U^T U H may be from the identity's
MOST_OFF = 0.05


def cases(setting: Setting) -> Iterator[Case]:
    size = 160 if setting.tiny else 4096
    for pattern in PATTERNS:
        yield Case(f"block {pattern}", lambda pattern=pattern: block(size, pattern, setting))
    for pattern in PATTERNS:
        yield Case(f"blocks {pattern}", lambda pattern=pattern: blocks(size, pattern, setting))
    yield Case("inverse_cholesky", lambda: factor(size, setting))
    for pattern in PATTERNS[1:] if setting.tiny else PATTERNS:
        yield Case(f"layer {pattern}", lambda pattern=pattern: layer(size, pattern, setting))
    for method in (SparseGPT(), ADMM()):
        yield Case(f"decoder block {type(method).__name__}", lambda method=method: decoder_block(method, setting))


def problem(out_features: int, in_features: int, setting: Setting) -> tuple[Tensor, Gram]:
    """A weight and the statistics of correlated inputs, four for each one that a layer has."""
    generator = torch.Generator(setting.device).manual_seed(in_features)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=setting.device)

    rank = max(1, in_features // 8)
    mix, stats = normal(rank, in_features), Gram(in_features, setting.device)
    for _ in range(4):
        stats.add((normal(in_features, rank) @ mix / rank**0.5 + 0.3 * normal(in_features, in_features)).bfloat16())
    return 0.02 * normal(out_features, in_features), stats


def block(size: int, pattern: Unstructured | NM, setting: Setting) -> Iterator[Json]:
    """One block of 128 columns of a layer: the sweep, and for a sparsity the threshold, which N:M does not need."""
    weight, stats = problem(size, size, setting)
    u, _ = stats.inverse_cholesky(DAMPING)
    here, corner = weight[:, :BLOCK], u[:BLOCK, :BLOCK].contiguous()
    nm = (pattern.n, pattern.m) if isinstance(pattern, NM) else None
    saliency = (here / corner.diagonal()).square().view(1, -1)
    kept = torch.tensor([saliency.shape[1] // 2], device=setting.device)
    threshold = pick(keep_largest.KERNELS, saliency)
    mask = torch.ones_like(here, dtype=torch.bool) if nm else threshold.run(saliency, kept).view(here.shape)
    sweep = pick(obs_sweep.KERNELS, here, corner)
    expected, _ = obs_sweep.reference(here.double(), corner.double(), mask, nm)
    pruned, _ = sweep.run(here, corner, mask, nm)
    # a near tie may fall to either side, and then the row is another one
    same = ((pruned - expected).abs() < 1e-3).all(dim=1).float().mean()
    if not same > 0.99:
        raise RuntimeError(f"{1 - same:.1%} of the rows are not those of float64")
    facts = {"what": "block", "rows": size, "columns": here.shape[1], "pattern": str(pattern)}
    timed = time_variants({"obs_sweep": lambda _: sweep.run(here, corner, mask, nm)}, None, setting)
    yield {**facts, "kernel": sweep.name, **timed.to_json()}
    if not nm:
        variants = {"keep_largest": lambda _: threshold.run(saliency, kept)}
        timed = time_variants(variants, None, setting, capture=False)
        yield {**facts, "kernel": threshold.name, **timed.to_json()}


def blocks(size: int, pattern: Unstructured | NM, setting: Setting) -> Iterator[Json]:
    """All blocks of a layer, from U on; on a card captured, with the launches and the time that were counted for it."""
    weight, stats = problem(size, size, setting)
    u, _ = stats.inverse_cholesky(DAMPING)
    starts = range(0, size, BLOCK)
    kept = None if isinstance(pattern, NM) else [size * min(BLOCK, size - start) // 2 for start in starts]
    choice = obs_blocks.Choice(nm=(2, 4)) if kept is None else obs_blocks.Choice(kept=kept)
    kernel, w = pick(obs_blocks.KERNELS, weight, u, BLOCK, choice), weight.clone()
    run, facts = kernel.run, {}
    if triton.why_not() is None:
        from sparsekern.ops.triton.obs_blocks import enqueue, launches, model_us

        chain, products = launches(size, BLOCK, kept is not None)
        facts = {"launches": chain + products, "model_us": model_us(size, size, BLOCK, kept is not None)}
        # what `run` does, but for asking the card at the end
        run = enqueue if kernel.name == "triton" else run
    timed = time_variants({"obs_blocks": lambda _: run(w.copy_(weight), u, BLOCK, choice)}, None, setting)
    share = float((w == 0).float().mean())
    if not abs(share - 0.5) < 1e-3:
        raise RuntimeError(f"{share:.1%} of the weights are zero")
    facts |= {"what": "blocks", "rows": size, "columns": size, "pattern": str(pattern), "kernel": kernel.name}
    yield {**facts, **timed.to_json()}


def factor(size: int, setting: Setting) -> Iterator[Json]:
    """U of a layer's Hessian: the whole by the library, and by halves down to each size of a corner."""
    _, stats = problem(16, size, setting)
    h = stats.hessian.clone()
    h.diagonal().mul_(1 + DAMPING)
    ways = {LIBRARY: inverse_cholesky.reference}
    for corner in (32, 64) if setting.tiny else CORNERS:
        ways[f"by_halves to {corner}"] = partial(inverse_cholesky.by_halves, corner=corner)

    def check(factor: Callable) -> None:
        u, failed = factor(h.clone())
        off = float(((u.T @ (u @ h)) - torch.eye(size, device=h.device)).abs().max())
        if bool(failed) or not off < MOST_OFF:
            raise RuntimeError(f"U^T U H is off the identity by {off:.2g}, allowed is {MOST_OFF}")

    wrong = dict(errors_of({name: partial(check, factor) for name, factor in ways.items()}))
    right = {name: lambda _, factor=factor: factor(h.clone()) for name, factor in ways.items() if name not in wrong}
    timed = time_variants(right, LIBRARY, setting, seconds=4.0, capture=False).to_json()
    timed["errors"] = {**wrong, **timed["errors"]}
    yield {"what": "inverse_cholesky", "columns": size, **timed}


def layer(size: int, pattern: Unstructured | NM, setting: Setting) -> Iterator[Json]:
    """A whole layer: SparseGPT, with the factorisation, against the column loop; and ADMM."""
    weight, stats = problem(size, size, setting)
    hessian = stats.hessian
    variants = {
        "column loop": lambda _: column_loop(weight, hessian, pattern),
        "SparseGPT": lambda _: SparseGPT().prune(weight, fresh(stats), pattern),
        "ADMM": lambda _: ADMM().prune(weight, fresh(stats), pattern),
    }
    found = {name: float(stats.error(weight, run(0))) for name, run in variants.items()}
    if not found["SparseGPT"] <= MOST_WORSE * found["column loop"]:
        raise RuntimeError(f"SparseGPT does worse than the column loop: {found}")
    # the loop is the longest by far: as few rounds as say anything of it, and more of SparseGPT alone
    alone = time_variants({"SparseGPT": variants["SparseGPT"]}, None, setting, seconds=4.0, capture=False)
    against = time_variants(variants, "column loop", setting, rounds=8, seconds=1.0, capture=False)
    facts = {"what": "layer", "rows": size, "columns": size, "pattern": str(pattern), "error_of": found}
    yield {**facts, **against.to_json()}
    yield {**facts, **alone.to_json()}


def decoder_block(method: SparseGPT | ADMM, setting: Setting) -> Iterator[Json]:
    """All linear layers of a decoder block, one after the other; the layers with the same input share its Hessian."""
    model = shapes.find("tiny" if setting.tiny else MODEL)
    problems = {size: problem(16, size, setting)[1] for size in {layer.in_features for layer in model.layers}}
    weights = [
        (0.02 * torch.randn(layer.out_features, layer.in_features, device=setting.device), layer.in_features)
        for layer in model.layers
    ]
    for pattern in PATTERNS:
        samples = []
        for _ in range(BLOCK_ROUNDS if setting.timed else 1):
            start = time.perf_counter()
            once = {size: fresh(stats) for size, stats in problems.items()}
            for weight, size in weights:
                pruned = method.prune(weight, once[size], pattern)
            if setting.timed:
                torch.cuda.synchronize()
            samples.append(Sample(time.perf_counter() - start))
            zeros = float((pruned == 0).float().mean())
            if not abs(zeros - 0.5) < 1e-3:
                raise RuntimeError(f"{zeros:.1%} of the last layer's weights are zero")
            if setting.seconds_left <= 0:
                break
        name = type(method).__name__
        facts = {"what": "decoder block", "model": model.name, "pattern": str(pattern)}
        # the first one compiles and loads
        taken = samples[1:] or samples
        times = {name: Latency.of(taken).to_json()} if setting.timed else {}
        yield {**facts, "times": times, "speedup": {}, "errors": {}, "eager": [name]}
