"""SparseLinear: a drop-in for nn.Linear whose weight is packed, or dense in a kernel's own order."""

import warnings

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsekern.formats import Bitmap, BitmapInt8
from sparsekern.lazy_weight import LazyWeight
from sparsekern.ops import LINEAR_KERNELS, Packed, pack, to_dense
from sparsekern.ops.kernel import Kernel, pick

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
        device = "cpu" if x.is_cpu else x.device.type
        # there is no autocast on the meta device, and asking for it is an error
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(self.dtype) if x.dtype in _AUTOCAST else x
            return self._multiply(x).to(torch.get_autocast_dtype(device))
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        buffers = self._buffers
        # by its name, nn.Module would look for the bias in three places, for as long as a product's own call takes
        operands = tuple([buffers[name] for name in self._operand_names])
        return self._run(x, operands, buffers["bias"], self.out_features, self.in_features)

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
        self.dtype = packed.dtype
        # a dense weight keeps all
        self.kept = packed.values.numel() if hasattr(packed, "values") else packed.shape.numel()
        # inputs that share a scale, where there are scales
        self.group_size = getattr(packed, "group_size", None)
        operands = kernel.prepare(packed)
        self._operand_names = tuple(f"operand_{i}" for i in range(len(operands)))
        for name, operand in zip(self._operand_names, operands, strict=True):
            self.register_buffer(name, operand, persistent=False)

    def _pack(self, weight: Tensor) -> Packed:
        return pack(weight, self.format) if self.group_size is None else self.format.pack(weight, self.group_size)

    def _holds(self, weight: Tensor) -> bool:
        return self.format is BitmapInt8 and torch.equal(self._dense(), weight)

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
                # a memory format is for images: what has as many dimensions by chance stays in its order
                self._buffers[name] = fn(self._buffers[name]).contiguous()
            return self
        if empty_like.called:
            # to_empty() leaves what happens to be in memory, which must not be taken for a bitmap
            packed = self._pack(probe.new_zeros(self.out_features, self.in_features))
        else:
            # a kernel's own order may not survive another dtype or device: go through the canonical one
            packed = self.packed
            if isinstance(packed, BitmapInt8):
                # a cast is of x and y; the scales keep their float32
                packed = packed.to(probe.device, probe.dtype)
            else:
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
                weight = weight.detach().to(device, self.dtype)
                # what a layer of fewer bits gave away rounded is not rounded again
                packed = self.packed if device == self.device and self._holds(weight) else self._pack(weight)
                if device == self.device:
                    self._adopt(packed, self.kernel)
                else:
                    self._adopt(packed, pick(LINEAR_KERNELS[self.format], packed))
                    self.bias = None if self.bias is None else torch.empty_like(self.bias, device=device)
            except ValueError as error:
                errors.append(f"{prefix}weight: {error}")
        rest = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
