"""Plan: what serves a layer, a sparse kernel, own dense panels or torch's own linear? Measured once a kind of layer.

How the rest of the package uses it:

    plan = Plan.for_model(model)                          # or Plan(): nothing is read from or written to a cache
    decision = plan.decide((packed,), weight, tokens=(1,))  # the formats that hold the weight; weight: dense
    decision.format, decision.kernel                      # "bitmap", "cpu"; None, None: the layer stays as it is
    decision.reason                                       # "bitmap cpu is 1.72x (1.65–1.80) dense cpu at 1 token"
    plan.save(path); plan = Plan.load(path)               # what was measured is not measured again

Every compiled kernel of every format that can hold the weight is a candidate, own dense panels and F.linear too; they
run in alternation at each number of tokens, after each was checked, and decisions.py decides. Layers of one kind
(shape, density to 5 %, dtype, candidates, device, threads, tokens) are measured once; plan_cache.py keeps that for the
next run.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern import plan_cache
from sparsekern.baselines import PREPACKED as ONEDNN
from sparsekern.decisions import DENSE, OWN_DENSE, PREPACKED, Decision, Kind, Times, decision_of
from sparsekern.formats import Bitmap, BitmapInt8, Dense
from sparsekern.formats.dense import DTYPES
from sparsekern.measure import weight_bytes
from sparsekern.ops import LINEAR_KERNELS, Packed, compiled, to_dense
from sparsekern.ops.kernel import Kernel, pick
from sparsekern.plan_cache import user_cache
from sparsekern.timing import Json, alternate, arena_bytes

# a tiny layer would need thousands of copies to fill an arena
MOST_COPIES = 256
CHECKED_ROWS = 1024  # of the weight, in float64 at a time


class Plan:
    """The decisions taken so far.

    seconds  to spend on one kind of layer at one number of tokens
    arena    bytes of weights to rotate through; None: four times the cache
    cache    a directory: what was measured before on this machine is read from it, and what is measured is added. One
             that cannot be read or written is done without, and `not_cached` says why

    measured and recalled count the kinds of layer that were measured, and those that were known.
    """

    def __init__(self, seconds: float = 0.3, arena: int | None = None, cache: str | Path | None = None):
        self.seconds = seconds
        self.arena = arena
        self.cache = None if cache is None else Path(cache)
        self.decisions: dict[Kind, Decision] = {} if self.cache is None else plan_cache.recall(self.cache)
        self.measured = self.recalled = 0
        self.not_cached: str | None = None
        self._known = set(self.decisions)

    @classmethod
    def for_model(cls, model: nn.Module, seconds: float = 0.3, cache: str | Path | None = None) -> "Plan":
        """A plan for this model. One that fits the cache is measured in the cache, because there it will run.

        cache  as for Plan; None: this user's own, ~/.cache/sparsekern on Linux
        """
        device = next((parameter.device for parameter in model.parameters()), "cpu")
        return cls(seconds, min(arena_bytes(device), weight_bytes(model)), user_cache() if cache is None else cache)

    def decide(self, packings: Sequence[Packed], weight: Tensor, tokens: Sequence[int] = (1,)) -> Decision:
        """What serves a layer best at every one of `tokens`.

        packings  the weight in the formats that may hold it; its own dense panels need not be among them
        weight    [out_features, in_features], as the layer has it now

        Raises RuntimeError when a kernel computes something else than F.linear with the weight that it holds.
        """
        own = (Dense.pack(weight),) if weight.dtype in DTYPES else ()
        found = _compiled_kernels((*packings, *own))
        refused = [_refused(packed) for packed in packings if not _accepting(packed)]
        only = f"only the reference accepts it, which rebuilds the weight: {'; '.join(refused)}" if refused else ""
        if not found:
            return Decision(None, None, only or "no compiled kernel accepts it", {})
        arena = arena_bytes(weight.device) if self.arena is None else self.arena
        kept = next((packed.values.numel() for packed in packings if isinstance(packed, Bitmap)), None)
        kind = Kind.of(list(found), weight, arena, tokens, kept)
        if kind in self._known:
            self._known.discard(kind)
            self.recalled += 1
        if kind not in self.decisions:
            times = dict(self._time(found, weight, arena, tokens))
            names = {name: (packed.name, kernel.name) for name, (packed, kernel) in found.items()}
            self.decisions[kind] = decision_of(names, times)
            self.measured += 1
            if self.cache is not None:
                self.not_cached = plan_cache.keep({kind: self.decisions[kind]}, self.cache)
        decision = self.decisions[kind]
        return replace(decision, reason=f"{decision.reason}; {only}") if only else decision

    def _time(
        self, found: Mapping[str, tuple[Packed, Kernel]], weight: Tensor, arena: int, tokens: Sequence[int]
    ) -> Iterator[tuple[int, Times]]:
        """Yields a number of tokens and the candidates' times, for each of `tokens`."""
        onednn = ONEDNN if ONEDNN.refuses(weight) is None else None
        share = arena // (len(found) + 1 + (onednn is not None))
        dense = rotate((weight,), share)
        variants = {DENSE: lambda x, number: F.linear(x, dense[number % len(dense)][0])}
        if onednn:
            prepared = [onednn.prepare(weight, None, 1) for _ in dense]
            variants[PREPACKED] = lambda x, number: onednn.run(x, prepared[number % len(prepared)], None)
        for name, (packed, kernel) in found.items():
            variants[name] = partial(_run, kernel, rotate(kernel.prepare(packed), share), packed.shape)
        for count in tokens:
            x = random_input(count, weight)
            for name, (packed, _) in found.items():
                check_linear(variants[name](x, 0), x, _exact(packed), None, f"kernel {name}")
            at = {name: partial(variant, x) for name, variant in variants.items()}
            able = [DENSE, *(name for name, (packed, _) in found.items() if packed.name == OWN_DENSE)]
            times = Times.of(alternate(at, seconds=self.seconds, device=weight.device), able)
            if not times.steady:
                times = Times.of(alternate(at, seconds=2 * self.seconds, device=weight.device), able)
            yield count, times

    def __str__(self) -> str:
        kinds = f"{self.measured} kinds of layer measured now, {self.recalled} known from before"
        return kinds + (f"; not kept for the next time: {self.not_cached}" if self.not_cached else "")

    def to_json(self) -> Json:
        """What json.dumps takes: the decisions, and what they hold for."""
        return plan_cache.to_json(self.decisions)

    @classmethod
    def from_json(cls, data: Mapping, seconds: float = 0.3, arena: int | None = None) -> "Plan":
        """Raises ValueError for what is no plan, and for one of another machine, threads or versions: measure anew."""
        return cls(seconds, arena)._knowing(plan_cache.from_json(data))

    def save(self, path: str | Path) -> None:
        """Write the decisions to a file, which is the old one or the whole new one at any moment."""
        plan_cache.save(self.decisions, Path(path))

    @classmethod
    def load(cls, path: str | Path, seconds: float = 0.3, arena: int | None = None) -> "Plan":
        """The plan of a file. Raises ValueError as from_json does, naming the file, and for a damaged one."""
        return cls(seconds, arena)._knowing(plan_cache.load(Path(path)))

    def _knowing(self, decisions: dict[Kind, Decision]) -> "Plan":
        self.decisions, self._known = decisions, set(decisions)
        arenas = {kind.arena for kind in decisions}
        if self.arena is None and len(arenas) == 1:
            # where the stored ones were measured, those to come are
            self.arena = arenas.pop()
        return self


class Unmeasured:
    """A plan that measures nothing: the first kernel that accepts a weight serves it, be it faster or not.

    format  the only one to take, own dense panels among them; None: whichever comes first that is not dense and has a
            compiled kernel
    """

    def __init__(self, format: type[Packed] | None = None):
        self.format = format

    def decide(self, packings: Sequence[Packed], weight: Tensor, tokens: Sequence[int] = (1,)) -> Decision:
        if self.format is Dense:
            packings = (Dense.pack(weight),)
        elif self.format is not None:
            packings = [packed for packed in packings if type(packed) is self.format]
        picked = [(packed, pick(LINEAR_KERNELS[type(packed)], packed)) for packed in packings]
        # another format may have a compiled kernel
        picked.sort(key=lambda pair: pair[1].name == "reference")
        if not picked:
            why = f"{self.format.name} does not hold it" if self.format else "no format holds it in fewer bytes"
            return Decision(None, None, why, {})
        packed, kernel = picked[0]
        return Decision(packed.name, kernel.name, "not measured", {})


def rotate(operands: tuple[Tensor, ...], arena: int) -> list[tuple[Tensor, ...]]:
    """`operands` and so many copies of them that they fill `arena` bytes."""
    size = sum(operand.nbytes for operand in operands)
    copies = max(-(-arena // max(size, 1)), 1)
    return [operands, *(tuple(map(compiled.copy, operands)) for _ in range(min(copies, MOST_COPIES) - 1))]


def random_input(tokens: int, weight: Tensor) -> Tensor:
    """x [tokens, in_features] of standard normal numbers, always the same ones."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, weight.shape[1], generator=generator).to(weight)


def check_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, who: str) -> None:
    """Is y = x weight^T + bias, within float32 accumulation and one rounding to the dtype of y?

    Raises RuntimeError naming `who`, the largest error and where it stands.
    """
    epsilon = torch.finfo(y.dtype).eps
    exact_x = x.double()
    for start, rows in zip(itertools.count(0, CHECKED_ROWS), weight.split(CHECKED_ROWS), strict=False):
        rows = rows.double()
        exact = exact_x @ rows.T
        if bias is not None:
            exact += bias[start : start + len(rows)].double()
        # float32 sums of in_features products lose a few bits of the sum of their magnitudes
        magnitudes = exact_x.abs() @ rows.abs().T
        allowed = epsilon * exact.abs() + 1e-5 * magnitudes
        # a processor may take subnormals for zero
        allowed += torch.finfo(y.dtype).tiny * (1 + exact_x.abs().sum(dim=1, keepdim=True))
        if y.device.type == "cuda":
            # cuBLAS may split a sum, and rounds the parts to the dtype of y before it adds them up
            allowed += 4 * epsilon * exact.square().mean(dim=1, keepdim=True).sqrt()
        here = y[:, start : start + len(rows)]
        # what overflows is infinite in both, and nothing is known of it when float32 sums overflow on the way
        unknown = (here == exact.to(y.dtype)) | (magnitudes > torch.finfo(torch.float32).max)
        error = (here.double() - exact).abs().masked_fill_(unknown, 0.0)
        # NaN is not within anything
        if not (error <= allowed).all():
            token, row = divmod(int((error - allowed).nan_to_num(torch.inf).argmax()), len(rows))
            raise RuntimeError(
                f"{who} is wrong: y[{token}, {start + row}] is {y[token, start + row].item():.6g}, "
                f"should be {exact[token, row].item():.6g}"
            )


def _compiled_kernels(packings: Sequence[Packed]) -> dict[str, tuple[Packed, Kernel]]:
    """The candidates by name. A kernel that serves two formats is one candidate: the first of them."""
    found, seen = {}, set()
    for packed in packings:
        for kernel in _accepting(packed):
            if kernel.run not in seen:
                found[f"{packed.name} {kernel.name}"] = (packed, kernel)
                seen.add(kernel.run)
    return found


def _accepting(packed: Packed) -> list[Kernel]:
    """The compiled kernels that do not refuse it."""
    kernels = LINEAR_KERNELS[type(packed)]
    return [kernel for kernel in kernels if kernel.name != "reference" and kernel.refuses(packed) is None]


def _exact(packed: Packed) -> Tensor:
    """What a kernel multiplies by: of integers and scales, not yet rounded to the dtype of x."""
    return packed.dequantised() if isinstance(packed, BitmapInt8) else to_dense(packed)


def _run(kernel: Kernel, copies: list[tuple[Tensor, ...]], shape: torch.Size, x: Tensor, number: int) -> Tensor:
    return kernel.run(x, copies[number % len(copies)], None, *shape)


def _refused(packed: Packed) -> str:
    reasons = ((kernel.name, kernel.refuses(packed)) for kernel in LINEAR_KERNELS[type(packed)])
    return "; ".join(f"{name}: {reason}" for name, reason in reasons if reason) or "no other is written"
