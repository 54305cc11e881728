"""SparseLinear: a drop-in for nn.Linear whose weight is packed; sparsify() and densify() swap a whole model."""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.lazy_weight import LazyWeight
from sparsekern.ops import LINEAR_KERNELS, compiled, pack, to_dense
from sparsekern.ops.kernel import Kernel, pick
from sparsekern.plan import Plan, Unmeasured

Packed = SemiStructured | Bitmap

# what autocast casts
_AUTOCAST = (torch.bfloat16, torch.float16, torch.float32)


class _EmptyLike(TorchFunctionMode):
    """While open, `called` becomes True when torch.empty_like is called."""

    called = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called |= func is torch.empty_like
        return func(*args, **(kwargs or {}))


class SparseLinear(nn.Module):
    """y = x W^T + bias with a packed W.

    packed  the weight in one of sparsekern.formats
    bias    [out_features] in the dtype of the values, or None
    kernel  one of LINEAR_KERNELS of the format; None takes the first that does not refuse

    Only the tensors that the kernel reads are kept; `packed` and `weight` are rebuilt from them on demand. The state
    dict holds the dense weight, so that what is saved loads everywhere. Raises ValueError with every kernel's reason
    when all refuse, and for a bias that is not the weight's.

    x gets a gradient, so that adapters beside the layer and what comes before it can be trained: backward builds the
    dense weight and is as slow as that. The packed weight and the bias are no parameters and stay as they are.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None, kernel: Kernel | None = None):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.format = type(packed)
        if bias is not None and (bias.shape != (self.out_features,) or bias.dtype != packed.dtype):
            raise ValueError(
                f"bias must be [{self.out_features}] in the weight's dtype {packed.dtype}, "
                f"got {list(bias.shape)} in {bias.dtype}"
            )
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=True)
        self._adopt(packed, kernel or pick(LINEAR_KERNELS[self.format], packed))

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: type[Packed] = Bitmap) -> "SparseLinear":
        """Pack the weight of `linear`, whatever it holds. Raises ValueError when the format cannot hold it."""
        return cls(pack(linear.weight.detach(), format), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] in the dtype of the weight -> y [..., out_features].

        Under autocast x may have another dtype, and y has autocast's, as with nn.Linear; what is multiplied has the
        weight's.
        """
        device = x.device.type
        # there is no autocast on the meta device, and asking for it is an error
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(self.dtype) if x.dtype in _AUTOCAST else x
            return self._multiply(x).to(torch.get_autocast_dtype(device))
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
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
        """The dense weight [out_features, in_features]: the same bits that were packed, rebuilt when they are read.

        It cannot be written to.
        """
        if torch.compiler.is_compiling():
            return self._dense()
        return LazyWeight((self.out_features, self.in_features), self.dtype, self.device, self._dense)

    @property
    def device(self) -> torch.device:
        """Where the packed weight is."""
        return self._buffers[self._operand_names[0]].device

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
        self.kept, self.dtype = packed.values.numel(), packed.dtype
        operands = kernel.prepare(packed)
        self._operand_names = tuple(f"operand_{i}" for i in range(len(operands)))
        for name, operand in zip(self._operand_names, operands, strict=True):
            self.register_buffer(name, operand, persistent=False)

    def _dense(self) -> Tensor:
        operands = tuple(self._buffers[name] for name in self._operand_names)
        if self.kernel.dense is None:
            return to_dense(self.packed)
        return self.kernel.dense(operands, self.out_features, self.in_features)

    def _apply(self, fn, recurse: bool = True) -> "SparseLinear":
        with _EmptyLike() as empty_like:
            # without values, it says what becomes of those
            probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if self.bias is not None:
            self.bias = fn(self.bias)
        if probe.is_meta or ((probe.dtype, probe.device) == (self.dtype, self.device) and not empty_like.called):
            # what has no values to read, as on the meta device, and what stays as it is, as in share_memory()
            for name in self._operand_names:
                self._buffers[name] = fn(self._buffers[name])
            return self
        if empty_like.called:
            # to_empty() leaves what happens to be in memory, which must not be taken for a bitmap
            packed = pack(probe.new_zeros(self.out_features, self.in_features), self.format)
        else:
            # a kernel's own order may not survive another dtype or device: go through the canonical one
            packed = self.packed
            moved = {name: fn(value) for name, value in vars(packed).items() if isinstance(value, Tensor)}
            packed = self.format(**{**vars(packed), **moved})
        before = self.kernel.name
        self._adopt(packed, pick(LINEAR_KERNELS[self.format], packed))
        if self.kernel.name == "reference" != before:
            warnings.warn(f"only the reference serves {packed.dtype} on {packed.device}, and it is slow", stacklevel=2)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._dense()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing.append(prefix + "weight")
        elif tuple(weight.shape) != (self.out_features, self.in_features):
            errors.append(f"{prefix}weight: expected {[self.out_features, self.in_features]}, got {list(weight.shape)}")
        else:
            # on the meta device nothing can be packed: the layer comes to where its values are
            device = weight.device if self.device.type == "meta" else self.device
            try:
                packed = pack(weight.detach().to(device, self.dtype), self.format)
                if device == self.device:
                    self._adopt(packed, self.kernel)
                else:
                    self._adopt(packed, pick(LINEAR_KERNELS[self.format], packed))
                    self.bias = None if self.bias is None else torch.empty_like(self.bias, device=device)
            except ValueError as error:
                errors.append(f"{prefix}weight: {error}")
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
        if self.packed_bytes:
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

    tokens  a sparse kernel must be faster than torch's linear at each of these numbers of tokens, one at least
    plan    what decides, with its measurements; None measures each kind of layer once, now, on this machine.
            Unmeasured() swaps every layer that a format can hold
    skip    layers to leave, by their full name or the last part of it, with wildcards; tied weights are never swapped

    A layer stays dense when no kernel is faster, or when hooks hang on it; the report says why for each. Raises
    ValueError for a model that is itself one layer, for no tokens, and for a weight on the meta device, before anything
    is swapped.
    """
    plan, tokens, skip = plan or Plan.for_model(model), tuple(tokens), tuple(skip)
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be one or more positive numbers, got {list(tokens)}")
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

    report, shared = SwapReport(), _shared_weights(model)
    done: dict[int, tuple[SparseLinear | None, str]] = {}
    for name, linear in layers:
        if id(linear) not in done:
            left = _left_dense(name, linear, skip, shared)
            done[id(linear)] = (None, left) if left else _swap(linear, plan, tokens)
            if (first := done[id(linear)][0]) is not None:
                report.dense_bytes += linear.weight.nbytes
                report.packed_bytes += first.nbytes
        swapped, reason = done[id(linear)]
        if swapped is None:
            report.dense.append((name, reason))
            continue
        replace_module(model, name, swapped)
        kernel = {"format": swapped.format.name, "kernel": swapped.kernel.name}
        report.swapped.append({"name": name, **kernel, "reason": reason})
    return report


def densify(model: nn.Module, layers: Iterable[str] | None = None) -> None:
    """Swap SparseLinear layers of `model` back for nn.Linear with the same bits, in place; they require no gradient.

    layers  their full names; None takes all

    Raises ValueError for a model that is itself one SparseLinear.
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
            linear.weight = nn.Parameter(module._dense(), requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias, requires_grad=False)
            done[id(module)] = linear.train(module.training)
        replace_module(model, name, done[id(module)])


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


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


def _swap(linear: nn.Linear, plan: Plan | Unmeasured, tokens: tuple[int, ...]) -> tuple[SparseLinear | None, str]:
    """The best SparseLinear for `linear`, or None, and the reason for either."""
    weight = linear.weight.detach()
    packings, reasons, last_resort = [], [], None
    for format in (SemiStructured, Bitmap):
        try:
            packings.append(pack(weight, format))
        except ValueError as error:
            reasons.append(f"{format.name}: {error}")
    # 2:4 takes as many bytes for a few weights as for half of them
    for packed in sorted(packings, key=lambda packed: packed.nbytes):
        if packed.nbytes >= weight.nbytes:
            reasons.append(f"{packed.name}: packed it would take {packed.nbytes:,} bytes, dense {weight.nbytes:,}")
            continue
        decision = plan.decide(packed, weight, tokens)
        if decision.kernel is None:
            reasons.append(f"{packed.name}: {decision.reason}")
            continue
        kernel = next(k for k in LINEAR_KERNELS[type(packed)] if k.name == decision.kernel)
        swapped = SparseLinear(packed, linear.bias, kernel).train(linear.training)
        if kernel.name != "reference":
            return swapped, decision.reason
        # another format may have a compiled kernel
        last_resort = last_resort or (swapped, decision.reason)
    return last_resort or (None, "; ".join(reasons))


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
