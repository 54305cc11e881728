"""Plan: does the sparse kernel or torch's own linear serve a layer? Measured once for each kind of layer, then fixed.

How the rest of the package uses it:

    plan = Plan.for_model(model)                         # or Plan()
    decision = plan.decide(packed, weight, tokens=(1,))  # packed: a format; weight: dense [out_features, in_features]
    decision.kernel                                      # "cpu": the name of a kernel; None: the layer stays dense
    decision.reason                                      # "cpu is 1.72x (1.65–1.80) F.linear at 1 token"
    plan.save(path); plan = Plan.load(path)              # what was measured is not measured again

Layers of one kind (format, shape, density to 5 %, dtype, device, threads, tokens) are measured once. A stored plan is
for the machine, the number of threads and the versions that it was measured with, and is refused by any other.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.measure import machine, weight_bytes
from sparsekern.ops import LINEAR_KERNELS, compiled
from sparsekern.ops.kernel import Kernel, pick
from sparsekern.timing import Json, Latency, Ratio, alternate, arena_bytes

Packed = Bitmap | SemiStructured

FORMAT_VERSION = 1
DENSE = "F.linear"
DENSITY_STEP = 0.05
# a tiny layer would need thousands of copies to fill an arena
MOST_COPIES = 256
CHECKED_ROWS = 1024  # of the weight, in float64 at a time


@dataclass(frozen=True)
class Kind:
    """What layers have in common that are as fast as each other."""

    format: str
    out_features: int
    in_features: int
    density: float
    dtype: str
    device: str
    threads: int
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, packed: Packed, tokens: Sequence[int]) -> "Kind":
        out_features, in_features = packed.shape
        density = packed.values.numel() / max(out_features * in_features, 1)
        device = packed.device
        return cls(
            format=packed.name,
            out_features=out_features,
            in_features=in_features,
            density=round(round(density / DENSITY_STEP) * DENSITY_STEP, 2),
            dtype=str(packed.dtype).removeprefix("torch."),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            threads=torch.get_num_threads(),
            tokens=tuple(tokens),
        )


@dataclass(frozen=True)
class Times:
    """The two candidates at one number of tokens, and dense / sparse: above 1 the sparse kernel is faster."""

    dense: Latency
    sparse: Latency
    ratio: Ratio

    def to_json(self) -> Json:
        return {"dense": self.dense.to_json(), "sparse": self.sparse.to_json(), "ratio": self.ratio.to_json()}

    @classmethod
    def from_json(cls, data: Mapping) -> "Times":
        return cls(*(Latency.from_json(data[name]) for name in ("dense", "sparse")), Ratio.from_json(data["ratio"]))


@dataclass(frozen=True)
class Decision:
    """Which kernel serves a layer; None: it stays dense. `times` by number of tokens, empty when none was needed."""

    kernel: str | None
    reason: str
    times: dict[int, Times]

    def to_json(self) -> Json:
        times = {str(tokens): times.to_json() for tokens, times in self.times.items()}
        return {"kernel": self.kernel, "reason": self.reason, "times": times}

    @classmethod
    def from_json(cls, data: Mapping) -> "Decision":
        times = {int(tokens): Times.from_json(entry) for tokens, entry in data["times"].items()}
        return cls(data["kernel"], data["reason"], times)


class Plan:
    """The decisions taken so far.

    seconds  to spend on one kind of layer at one number of tokens
    arena    bytes of weights to rotate through; None: four times the cache
    """

    def __init__(self, seconds: float = 0.3, arena: int | None = None):
        self.seconds = seconds
        self.arena = arena
        self.decisions: dict[Kind, Decision] = {}

    @classmethod
    def for_model(cls, model: nn.Module, seconds: float = 0.3) -> "Plan":
        """A plan for this model. One that fits the cache is measured in the cache, because there it will run."""
        device = next((parameter.device for parameter in model.parameters()), "cpu")
        return cls(seconds, min(arena_bytes(device), weight_bytes(model)))

    def decide(self, packed: Packed, weight: Tensor, tokens: Sequence[int] = (1,)) -> Decision:
        """Sparse where the first kernel that accepts `packed` is faster than F.linear at every one of `tokens`.

        weight  [out_features, in_features], what `packed` holds, dense

        Raises RuntimeError when the kernel computes something else than F.linear.
        """
        kernels = LINEAR_KERNELS[type(packed)]
        kernel = pick(kernels, packed)
        if kernel.name == "reference":
            return Decision(
                None, f"only the reference accepts it, which rebuilds the weight: {_refused(kernels, packed)}", {}
            )
        kind = Kind.of(packed, tokens)
        if kind not in self.decisions:
            times = {}
            for count, timed in self._time(kernel, packed, weight, tokens):
                ratio = timed.ratio(DENSE, kernel.name)
                times[count] = Times(timed.latency(DENSE), timed.latency(kernel.name), ratio)
            self.decisions[kind] = decision_of(kernel.name, times)
        return self.decisions[kind]

    def _time(self, kernel: Kernel, packed: Packed, weight: Tensor, tokens: Sequence[int]):
        """Yields a number of tokens and the two candidates' times, for each of `tokens`."""
        operands = kernel.prepare(packed)
        arena = arena_bytes(weight.device) if self.arena is None else self.arena
        dense, sparse = rotate((weight,), arena // 2), rotate(operands, arena // 2)
        for count in tokens:
            x = random_input(count, weight)
            check_linear(kernel.run(x, operands, None, *packed.shape), x, weight, None, f"kernel {kernel.name}")
            variants = {
                DENSE: lambda number, x=x: F.linear(x, dense[number % len(dense)][0]),
                kernel.name: lambda number, x=x: kernel.run(x, sparse[number % len(sparse)], None, *packed.shape),
            }
            timed = alternate(variants, seconds=self.seconds, device=weight.device)
            if timed.ratio(DENSE, kernel.name).median is None:
                timed = alternate(variants, seconds=2 * self.seconds, device=weight.device)
            yield count, timed

    def to_json(self) -> Json:
        """What json.dumps takes: the decisions, and what they hold for."""
        decisions = [{"kind": asdict(kind), **decision.to_json()} for kind, decision in self.decisions.items()]
        return {"plan": "sparsekern", "format_version": FORMAT_VERSION, "machine": _here(), "decisions": decisions}

    @classmethod
    def from_json(cls, data: Mapping, seconds: float = 0.3, arena: int | None = None) -> "Plan":
        """Raises ValueError for what is no plan, and for one of another machine, threads or versions: measure anew."""
        plan = cls(seconds, arena)
        try:
            if data["plan"] != "sparsekern" or data["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"the plan's format_version is {data['format_version']!r}, this sparsekern reads {FORMAT_VERSION}"
                )
            # before anything else: another version may have written other decisions
            _check_machine(data["machine"])
            for entry in data["decisions"]:
                kind = _kind(entry["kind"])
                plan.decisions[kind] = _decision(kind, entry)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan: {type(error).__name__}: {error}") from error
        _check_devices(plan.decisions)
        return plan

    def save(self, path: str | Path) -> None:
        """Write the decisions to a file, which is the old one or the whole new one at any moment."""
        path = Path(path)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self.to_json(), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp's file is closed to everybody else
            os.chmod(unfinished, 0o644)
            os.replace(unfinished, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(unfinished)

    @classmethod
    def load(cls, path: str | Path, seconds: float = 0.3, arena: int | None = None) -> "Plan":
        """The plan of a file. Raises ValueError as from_json does, naming the file, and for a damaged one."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"no such plan: {str(path)!r}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r}: not a plan: {error}") from error
        try:
            return cls.from_json(data, seconds, arena)
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error


class Unmeasured:
    """A plan that measures nothing: the first kernel that accepts a weight serves it, be it faster or not."""

    def decide(self, packed: Packed, weight: Tensor, tokens: Sequence[int] = (1,)) -> Decision:
        return Decision(pick(LINEAR_KERNELS[type(packed)], packed).name, "not measured", {})


def decision_of(name: str, times: Mapping[int, Times]) -> Decision:
    """Sparse when the kernel called `name` is faster at every number of tokens; the reason says so in words."""
    won, lost = [], []
    for tokens, entry in times.items():
        at = f"at {tokens} token" + ("" if tokens == 1 else "s")
        if entry.ratio.median is not None:
            faster, clause = entry.ratio.median > 1, f"{name} is {entry.ratio} {DENSE} {at}"
        else:
            # what disturbs only ever adds time: the fastest samples are the least disturbed
            faster = entry.sparse.p10 < entry.dense.p10
            clause = f"{name} is {'faster' if faster else 'not faster'} {at} by p10 alone ({entry.ratio.reason})"
        (won if faster else lost).append(clause)
    if lost:
        return Decision(None, "stays dense: " + ", ".join(lost), dict(times))
    return Decision(name, ", ".join(won), dict(times))


def rotate(operands: tuple[Tensor, ...], arena: int) -> list[tuple[Tensor, ...]]:
    """`operands` and so many copies of them that they fill `arena` bytes."""
    size = sum(operand.nbytes for operand in operands)
    copies = max(-(-arena // max(size, 1)), 1)
    return [operands, *(tuple(operand.clone() for operand in operands) for _ in range(min(copies, MOST_COPIES) - 1))]


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


def _refused(kernels: tuple[Kernel, ...], packed: Packed) -> str:
    reasons = ((kernel.name, kernel.refuses(packed)) for kernel in kernels)
    return "; ".join(f"{name}: {reason}" for name, reason in reasons if reason) or "no other is written"


def _here() -> Json:
    """What a decision depends on beyond the kind of layer."""
    facts = machine()
    cpu = compiled.cpu()
    return {
        "processor": facts["cpu"],
        "instruction_set": cpu.isa() if cpu else None,
        "threads": facts["threads"],
        "torch": facts["torch"],
        "sparsekern": facts["sparsekern"],
        "abi": compiled.ABI,
    }


def _check_machine(stored: Mapping) -> None:
    for name, here in _here().items():
        if stored[name] != here:
            raise ValueError(
                f"the plan was measured with {name} {stored[name]!r}, here it is {here!r}; measure a new one: Plan()"
            )


def _check_devices(decisions: Mapping[Kind, Decision]) -> None:
    here = {"cpu", *(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))}
    if away := {kind.device for kind in decisions} - here:
        raise ValueError(f"the plan was measured on {sorted(away)[0]!r}, which is not here; measure a new one: Plan()")


def _kind(data: Mapping) -> Kind:
    kind = Kind(**{**data, "tokens": tuple(data["tokens"])})
    for name, wanted in Kind.__annotations__.items():
        value = getattr(kind, name)
        if type(value) is not (tuple if name == "tokens" else wanted):
            raise ValueError(f"not a plan: {name} must be {wanted.__name__}, got {value!r}")
    return kind


def _decision(kind: Kind, data: Mapping) -> Decision:
    decision = Decision.from_json(data)
    kernels = [
        kernel.name for format, named in LINEAR_KERNELS.items() if format.name == kind.format for kernel in named
    ]
    if decision.kernel is not None and decision.kernel not in kernels:
        raise ValueError(f"not a plan: {kind.format} has no kernel {decision.kernel!r}, only {', '.join(kernels)}")
    return decision
