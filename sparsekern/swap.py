"""swap: the nn.Linear layers of a whole model for SparseLinear, where that is faster, and back."""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from sparsekern.decisions import OWN_DENSE, Decision
from sparsekern.formats import Bitmap, BitmapInt8, Dense, SemiStructured
from sparsekern.linear import SparseLinear
from sparsekern.ops import LINEAR_KERNELS, Packed, compiled, pack, to_dense
from sparsekern.plan import Plan, Unmeasured

PROBED_ROWS = 64


@dataclass
class SwapReport:
    """What sparsify() did.

    swapped    sparse layers with format, kernel and reason; with the error of their weight where values were changed
    own_dense  layers that are dense still, in our own kernel's order, likewise
    dense      layers that stay nn.Linear, with the reason
    dense_bytes, packed_bytes  of the swapped layers' weights before and after
    copied_bytes               of an output embedding that was the input embedding and is a weight of its own now
    plan       how many kinds of layer were measured, and how many were known
    """

    swapped: list[dict[str, Any]] = field(default_factory=list)
    own_dense: list[dict[str, Any]] = field(default_factory=list)
    dense: list[tuple[str, str]] = field(default_factory=list)
    dense_bytes: int = 0
    packed_bytes: int = 0
    copied_bytes: int = 0
    plan: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        own = f"{len(self.own_dense)} run dense in own panels, " if self.own_dense else ""
        lines = [f"{len(self.swapped)} layers swapped, {own}{len(self.dense)} stay dense"]
        if self.packed_bytes:
            saved = self.dense_bytes / self.packed_bytes
            lines.append(
                f"  swapped weights: {self.dense_bytes:,} -> {self.packed_bytes:,} bytes ({saved:.2f}x smaller)"
            )
        if errors := [row["error"] for row in self.swapped if row["error"]]:
            lines.append(f"  weights moved by {min(errors):.2%} to {max(errors):.2%} of their norm to have fewer bits")
        own_reasons = [(row["name"], row["reason"]) for row in self.own_dense]
        for title, rows in (("own panels", own_reasons), ("dense", self.dense)):
            for reason, names in _by_reason(rows).items():
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                lines.append(f"  {title}: {names[0]}{more}: {reason}")
        if self.copied_bytes:
            lines.append(f"  the output embedding was tied to the input's: a copy of {self.copied_bytes:,} bytes")
        if self.plan:
            lines.append(f"  {self.plan}")
        return "\n".join(lines)


def sparsify(
    model: nn.Module,
    *,
    tokens: Iterable[int] = (1,),
    plan: Plan | Unmeasured | None = None,
    values: str | None = None,
    lm_head: str | None = None,
    skip: Iterable[str] = ("lm_head",),
) -> SwapReport:
    """Swap the nn.Linear layers of `model` for SparseLinear, in place, where that is faster.

    tokens   what serves a layer is not slower than the best dense at any of these numbers of tokens, one at least
    plan     what decides, with its measurements; None measures each kind of layer once on this machine, and keeps that
             in the user's cache. Unmeasured() swaps every layer that a format can hold
    values   "int8" lets kept weights be rounded to 8 bits with a scale a row, and the report says by how much
    lm_head  what may serve the output embedding, whatever `skip` says: "dense", our own kernel with the same bits, or
             "int8". None leaves it. Where it is tied to the input embedding it becomes a copy
    skip     layers to leave, by their full name or the last part of it, with wildcards; tied weights are never swapped

    A layer stays dense when no sparse kernel wins: in own panels where those beat torch's linear, else as it is; so
    does one on which hooks hang. The report says why for each. Raises ValueError for a model that is itself one layer,
    for no tokens, for other values, and for a weight on the meta device, before anything is swapped.
    """
    plan, tokens, skip = plan or Plan.for_model(model), tuple(tokens), tuple(skip)
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be one or more positive numbers, got {list(tokens)}")
    if values not in (None, "int8"):
        raise ValueError(f'values must be "int8" or None, got {values!r}')
    if lm_head not in (None, "dense", "int8"):
        raise ValueError(f'lm_head must be "dense", "int8" or None, got {lm_head!r}')
    if type(model) is nn.Linear:
        raise ValueError("model is one nn.Linear and cannot be swapped in itself; use SparseLinear.from_linear(model)")
    # a module that stands in two places is listed twice, so that both get the same one
    layers = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear]
    for name, linear in layers:
        if linear.weight.is_meta:
            raise ValueError(
                f"{name}: weight is on the meta device; load the model without offloading (device_map=None)"
            )
    if reason := compiled.why_not("cpu"):
        warnings.warn(f"sparsekern._cpu is missing, so the reference ops serve on a CPU: {reason}", stacklevel=2)

    report, shared, head = SwapReport(), _shared_weights(model), _output_embedding(model) if lm_head else None
    done: dict[int, tuple[SparseLinear | None, str, float | None]] = {}
    for name, linear in layers:
        if id(linear) not in done:
            mine, chosen = ((), lm_head) if linear is head else (skip, values)
            left = _left_dense(name, linear, mine, set() if linear is head else shared)
            done[id(linear)] = (None, left, None) if left else _swap(linear, plan, tokens, chosen)
            first = done[id(linear)][0]
            if first is not None and first.format.name != OWN_DENSE:
                report.dense_bytes += linear.weight.nbytes
                report.packed_bytes += first.nbytes
            if first is not None and id(linear.weight) in shared:
                report.copied_bytes += first.nbytes
        swapped, reason, error = done[id(linear)]
        if swapped is None:
            report.dense.append((name, reason))
            continue
        replace_module(model, name, swapped)
        row = {"name": name, "format": swapped.format.name, "kernel": swapped.kernel.name, "reason": reason}
        (report.own_dense if swapped.format.name == OWN_DENSE else report.swapped).append({**row, "error": error})
    report.plan = str(plan) if isinstance(plan, Plan) else ""
    return report


def densify(model: nn.Module, layers: Iterable[str] | None = None) -> None:
    """Swap SparseLinear layers of `model` back for nn.Linear with the same bits, in place; they require no gradient.

    layers  their full names; None takes all

    An output embedding that the model ties is the input embedding again. Raises ValueError for a model that is itself
    one SparseLinear.
    """
    if isinstance(model, SparseLinear):
        raise ValueError("model is one SparseLinear and cannot be swapped in itself; its `weight` is the dense one")
    done: dict[int, nn.Linear] = {}
    wanted = None if layers is None else set(layers)
    sparse = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, SparseLinear)]
    for name, module in sparse:
        if wanted is not None and name not in wanted:
            continue
        if id(module) not in done:
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            embedding = is_tied_copy(model, name, module)
            linear.weight = nn.Parameter(module._dense(), requires_grad=False) if embedding is None else embedding
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias, requires_grad=False)
            done[id(module)] = linear.train(module.training)
        replace_module(model, name, done[id(module)])


def reconsider(model: nn.Module, plan: Plan | Unmeasured, tokens: Iterable[int]) -> None:
    """Let `plan` decide about every SparseLinear of `model` again, as sparsify does about nn.Linear, in place."""
    for name in [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]:
        module = model.get_submodule(name)
        packed = module.packed
        # a plain dense tensor, because a LazyWeight is slower to multiply by than what densify() makes
        weight = to_dense(packed)
        decision = plan.decide((packed,), weight, tuple(tokens))
        if decision.format is None:
            densify(model, (name,))
        elif (decision.format, decision.kernel) != (packed.name, module.kernel.name):
            replace_module(model, name, _served((packed,), weight, module.bias, decision).train(module.training))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_tied_copy(model: nn.Module, name: str, module: SparseLinear) -> Tensor | None:
    """The input embedding, where `module` was made from it: the model ties its output embedding, which this is."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if f"{name}.weight" not in tied or module is not _output_embedding(model):
        return None
    weight = model.get_input_embeddings().weight
    return weight if weight.shape == (module.out_features, module.in_features) else None


def _output_embedding(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _left_dense(name: str, linear: nn.Linear, skip: tuple[str, ...], shared: set[int]) -> str | None:
    """Why `linear` is not even tried, or None."""
    last = name.rpartition(".")[2]
    if any(fnmatch(name, glob) or fnmatch(last, glob) for glob in skip):
        return "skipped by name"
    if id(linear.weight) in shared:
        return "its weight is tied"
    if linear.bias is not None and linear.bias.dtype != linear.weight.dtype:
        return f"its bias is {linear.bias.dtype}, its weight {linear.weight.dtype}: torch multiplies no such two"
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        return "it has forward hooks, or its forward was replaced"
    return None


def _swap(
    linear: nn.Linear, plan: Plan | Unmeasured, tokens: tuple[int, ...], values: str | None
) -> tuple[SparseLinear | None, str, float | None]:
    """What serves `linear` best or None, the reason for either, and the error of its weight where that was changed."""
    weight = linear.weight.detach()
    packings, reasons = _packings(weight, values)
    decision: Decision = plan.decide(packings, weight, tokens)
    reason = "; ".join([decision.reason, *reasons])
    if decision.format is None:
        return None, reason, None
    swapped = _served(packings, weight, linear.bias, decision).train(linear.training)
    error = _error(weight, swapped._dense()) if swapped.format is BitmapInt8 else None
    return swapped, decision.reason, error


def _served(packings: Sequence[Packed], weight: Tensor, bias: Tensor | None, decision: Decision) -> SparseLinear:
    """The layer that was decided on."""
    packed = next((packed for packed in packings if packed.name == decision.format), None)
    # own dense panels need no packing
    packed = Dense.pack(weight) if packed is None else packed
    kernel = next(kernel for kernel in LINEAR_KERNELS[type(packed)] if kernel.name == decision.kernel)
    return SparseLinear(packed, bias, kernel)


def _packings(weight: Tensor, values: str | None) -> tuple[list[Packed], list[str]]:
    """`weight` in the formats that hold it in fewer bytes, the smallest first, and why the others do not."""
    if values == "dense":
        return [Dense.pack(weight)], []
    packings, reasons = [], []
    for format in (*((BitmapInt8,) if values == "int8" else ()), SemiStructured, Bitmap):
        try:
            if format is SemiStructured and len(weight) > PROBED_ROWS:
                # what is not 2:4 at all is not looked through to its end
                pack(weight[:PROBED_ROWS], format)
            packed = pack(weight, format)
        except ValueError as error:
            reasons.append(f"{format.name}: {error}")
            continue
        if packed.nbytes < weight.nbytes:
            packings.append(packed)
        else:
            reasons.append(f"{format.name}: packed it would take {packed.nbytes:,} bytes, dense {weight.nbytes:,}")
    # 2:4 takes as many bytes for a few weights as for half of them
    return sorted(packings, key=lambda packed: packed.nbytes), reasons


def _error(weight: Tensor, rounded: Tensor) -> float:
    """By how much of its norm the weight was moved."""
    return float((rounded.float() - weight.float()).norm() / weight.float().norm().clamp(min=1e-30))


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of the parameters that more than one module uses, or whose memory overlaps another's."""
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    shared = {parameter for parameter, count in users.items() if count > 1}
    # what is empty or on the meta device has no address
    placed = [p for p in model.parameters() if p.data_ptr()]
    spans = sorted((str(p.device), p.data_ptr(), p.data_ptr() + p.nbytes, id(p)) for p in placed)
    device, end, owner = "", 0, 0
    for here, start, stop, parameter in spans:
        if here == device and start < end:
            shared |= {owner, parameter}
        if here != device or stop > end:
            device, end, owner = here, stop, parameter
    return shared


def _by_reason(dense: list[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in dense:
        grouped.setdefault(reason, []).append(name)
    return grouped
