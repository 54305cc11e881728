"""SparseLinear: a drop-in for nn.Linear whose weight is packed; sparsify() and densify() swap a whole model."""

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import LINEAR_KERNELS, compiled
from sparsekern.ops.kernel import Kernel, pick
from sparsekern.plan import Plan, Unmeasured

Packed = SemiStructured | Bitmap


class SparseLinear(nn.Module):
    """y = x W^T + bias with a packed W, for inference.

    packed  the weight in one of sparsekern.formats
    bias    [out_features] in the dtype of the values, or None
    kernel  one of LINEAR_KERNELS of the format; None takes the first that does not refuse

    Only the tensors that the kernel reads are kept; `packed` and `weight` are rebuilt from them on demand. The state
    dict holds the dense weight, so that what is saved loads everywhere. Raises ValueError with every kernel's reason
    when all refuse.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None, kernel: Kernel | None = None):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.format = type(packed)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=True)
        self._adopt(packed, kernel or pick(LINEAR_KERNELS[self.format], packed))

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: type[Packed] = Bitmap) -> "SparseLinear":
        """Pack the weight of `linear`, whatever it holds. Raises ValueError when the format cannot hold it."""
        return cls(format.pack(linear.weight.detach()), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] in the dtype of the weight -> y [..., out_features]."""
        buffers = self._buffers
        operands = tuple(buffers[name] for name in self._operand_names)
        return self._run(x, operands, self.bias, self.out_features, self.in_features)

    @property
    def packed(self) -> Packed:
        """The weight in its canonical format."""
        operands = tuple(self._buffers[name] for name in self._operand_names)
        return self.kernel.restore(operands, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], rebuilt: the same bits that were packed."""
        return self.packed.to_dense()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight as this layer's kernel reads it."""
        return sum(self._buffers[name].nbytes for name in self._operand_names)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format.name}, kernel={self.kernel.name}"
        )

    def _adopt(self, packed: Packed, kernel: Kernel) -> None:
        self.kernel, self._run = kernel, kernel.run
        operands = kernel.prepare(packed)
        self._operand_names = tuple(f"operand_{i}" for i in range(len(operands)))
        for name, operand in zip(self._operand_names, operands, strict=True):
            self.register_buffer(name, operand, persistent=False)

    def _apply(self, fn, recurse: bool = True) -> "SparseLinear":
        # a kernel's own order may not survive another dtype or device: go through the canonical one, and pick again
        packed = self.packed
        moved = {name: fn(value) for name, value in vars(packed).items() if isinstance(value, Tensor)}
        if self.bias is not None:
            self.bias = fn(self.bias)
        packed = self.format(**{**vars(packed), **moved})
        self._adopt(packed, pick(LINEAR_KERNELS[self.format], packed))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing.append(prefix + "weight")
        elif tuple(weight.shape) != (self.out_features, self.in_features):
            errors.append(f"{prefix}weight: expected {[self.out_features, self.in_features]}, got {list(weight.shape)}")
        else:
            own = self.packed
            self._adopt(self.format.pack(weight.to(own.device, own.dtype)), self.kernel)
        rest = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)


@dataclass
class SwapReport:
    """What sparsify() did: `swapped` layers with kernel and reason, `dense` ones with the reason, bytes of both."""

    swapped: list[dict[str, Any]] = field(default_factory=list)
    dense: list[tuple[str, str]] = field(default_factory=list)
    dense_bytes: int = 0
    packed_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} layers swapped, {len(self.dense)} stay dense"]
        if self.swapped:
            saved = self.dense_bytes / self.packed_bytes
            lines.append(
                f"  swapped weights: {self.dense_bytes:,} -> {self.packed_bytes:,} bytes ({saved:.2f}x smaller)"
            )
        for reason, names in _by_reason(self.dense).items():
            lines.append(f"  dense: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}")
        return "\n".join(lines)


def sparsify(
    model: nn.Module,
    *,
    tokens: Iterable[int] = (1,),
    plan: Plan | Unmeasured | None = None,
    skip: Iterable[str] = ("lm_head",),
) -> SwapReport:
    """Swap the nn.Linear layers of `model` for SparseLinear, in place, where a sparse kernel wins.

    tokens  a sparse kernel must be faster than torch's linear at each of these numbers of tokens
    plan    what decides, with its measurements; None measures each kind of layer once, now, on this machine.
            Unmeasured() swaps every layer that a format can hold
    skip    names of layers to leave, with wildcards; tied weights are never swapped

    A layer stays dense when no format makes it smaller or no kernel is faster; the report says why for each.
    """
    if reason := compiled.why_not("cpu"):
        warnings.warn(f"sparsekern._cpu is missing, so the reference ops serve on a CPU: {reason}", stacklevel=2)
    plan, tokens, skip = plan or Plan.for_model(model), tuple(tokens), tuple(skip)
    report = SwapReport()
    shared = _shared_weights(model)
    layers = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, linear in layers:
        reason = None
        if any(fnmatch(name, glob) for glob in skip):
            reason = "skipped by name"
        elif linear.weight.data_ptr() in shared:
            reason = "its weight is tied"
        elif linear.weight.is_meta:
            raise ValueError(
                f"{name}: weight is on the meta device; load the model without offloading (device_map=None)"
            )
        if reason is None:
            swapped, reason = _swap(linear, plan, tokens, name)
        else:
            swapped = None
        if swapped is None:
            report.dense.append((name, reason))
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, swapped)
        report.swapped.append(
            {"name": name, "format": swapped.format.name, "kernel": swapped.kernel.name, "reason": reason}
        )
        report.dense_bytes += linear.weight.nbytes
        report.packed_bytes += swapped.nbytes
    return report


def densify(model: nn.Module) -> None:
    """Swap every SparseLinear of `model` back for nn.Linear with the same bits, in place."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, SparseLinear)]:
        weight = module.weight
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias, requires_grad=False)
        linear.train(module.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)


def _swap(
    linear: nn.Linear, plan: Plan | Unmeasured, tokens: tuple[int, ...], name: str
) -> tuple[SparseLinear | None, str]:
    """The best SparseLinear for `linear`, or None, and the reason for either."""
    weight = linear.weight.detach()
    reasons = []
    for format in (SemiStructured, Bitmap):
        try:
            packed = format.pack(weight)
        except ValueError as error:
            reasons.append(f"{format.name}: {error}")
            continue
        decision = plan.decide(packed, weight, tokens)
        if decision.kernel is not None:
            kernel = next(k for k in LINEAR_KERNELS[format] if k.name == decision.kernel)
            swapped = SparseLinear(packed, linear.bias, kernel)
            swapped.train(linear.training)
            return swapped, decision.reason
        reasons.append(f"{format.name}: {decision.reason}")
    return None, "; ".join(reasons)


def _shared_weights(model: nn.Module) -> set[int]:
    """Addresses of the weights that more than one module uses."""
    seen, shared = set(), set()
    for _, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            address = parameter.data_ptr()
            (shared if address in seen else seen).add(address)
    return shared


def _by_reason(dense: list[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in dense:
        grouped.setdefault(reason, []).append(name)
    return grouped
