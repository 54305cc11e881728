"""wgmma_24: linear_24 by Hopper's own sparse product, wgmma.sp, for builds that found CUTLASS.

It is made for many tokens and serves every number of them; a layer has one order of its weight, so the plan measures
whether this kernel or linear_24's other one is the better for the numbers that are asked for.

    values    [out_features, in_features / 2] bfloat16, as they are saved
    metadata  [ceil(in_features / 128), ceil(out_features / 64), 4, 2, 8, 4, 2] int16

The metadata's saved words, 16 inputs each, are laid in atoms of 64 outputs x 128 inputs. With output = 16 a + 8 b + c
and word = 2 d + e within an atom, its dimensions are a, e, c, d, b. What fills the last atoms has positions 0 and 1.

What is not kept is not multiplied: NaN and inf in x reach y through kept weights only. TMA and wgmma are emulated
nowhere: without a card it is shown that the weight lies as CUTLASS's layout says and that the compiler makes HGMMA.SP.

Source: CUTLASS 4.2, cutlass/gemm/collective/builders/sm90_sparse_config.inl, TensorEAtom_16bit and fill_layoutE.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekern.formats import SemiStructured
from sparsekern.ops import compiled

ATOM_ROWS = 64
ATOM_INPUTS = 128
INPUTS_MULTIPLE = 16
OUTPUTS_MULTIPLE = 8
_ALIGNMENT_BYTES = 16
# positions 0 and 1 in each of a word's four groups, as SemiStructured.pack leaves groups without inputs
_EMPTY_WORD = 0x4444


def refuses(packed: SemiStructured) -> str | None:
    """Why this kernel cannot serve a weight; None: it can."""
    if packed.device.type != "cuda":
        return f"the weight must be on a CUDA device, got {packed.device}"
    if packed.dtype != torch.bfloat16:
        return f"the weight must be bfloat16, got {packed.dtype}"
    capability = torch.cuda.get_device_capability(packed.device)
    if capability != (9, 0):
        return f"the card must have compute capability 9.0, got {capability[0]}.{capability[1]}"
    for name, size, multiple in zip(
        ("out_features", "in_features"), packed.shape, (OUTPUTS_MULTIPLE, INPUTS_MULTIPLE), strict=True
    ):
        if size == 0 or size % multiple:
            return f"{name} must be a positive multiple of {multiple}, got {size}"
    return compiled.why_not("wgmma")


def prepare(packed: SemiStructured) -> tuple[Tensor, Tensor]:
    """What `run` reads. Raises ValueError as SemiStructured.validate does."""
    packed.validate()
    rows, words = _atoms(*packed.shape)
    saved = packed.metadata
    filled = pad(saved, (0, words * 8 - saved.shape[1], 0, rows * ATOM_ROWS - len(saved)), value=_EMPTY_WORD)
    # rows are (atom, a, b, c), words (atom, d, e)
    atoms = filled.view(rows, 4, 2, 8, words, 4, 2).permute(4, 0, 1, 6, 3, 5, 2)
    return packed.values.contiguous(), atoms.contiguous()


def restore(operands: tuple[Tensor, Tensor], out_features: int, in_features: int) -> SemiStructured:
    """The inverse of `prepare`, bit for bit. Raises ValueError when the operands are not of this size."""
    values, metadata = operands
    rows, words = _atoms(out_features, in_features)
    wanted = [words, rows, 4, 2, 8, 4, 2]
    if metadata.dtype != torch.int16 or list(metadata.shape) != wanted:
        raise ValueError(f"metadata must be int16 {wanted}, got {metadata.dtype} {list(metadata.shape)}")
    saved = metadata.permute(1, 2, 6, 4, 0, 5, 3).reshape(rows * ATOM_ROWS, words * 8)
    return SemiStructured(values, saved[:out_features, : -(-in_features // 16)].contiguous(), in_features)


def dense(operands: tuple[Tensor, Tensor], out_features: int, in_features: int) -> Tensor:
    """The dense weight [out_features, in_features] of what `prepare` has made."""
    return restore(operands, out_features, in_features).to_dense()


def _atoms(out_features: int, in_features: int) -> tuple[int, int]:
    return -(-out_features // ATOM_ROWS), -(-in_features // ATOM_INPUTS)


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT_BYTES else x


def _linear(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must end with in_features = {in_features}, got shape {list(x.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (values.dtype, values.device):
            raise ValueError(
                f"{name} must be {values.dtype} on {values.device} as the weight is, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    x, values, metadata = _aligned(x), _aligned(values), _aligned(metadata)
    bias = None if bias is None else _aligned(bias)
    y = x.new_empty(*x.shape[:-1], out_features)
    # a launch goes to the current device
    with torch.cuda.device(x.device):
        compiled.wgmma().linear_24_bf16(
            x=x.data_ptr(),
            x_size=x.numel(),
            values=values.data_ptr(),
            values_size=values.numel(),
            metadata=metadata.data_ptr(),
            metadata_bytes=metadata.nbytes,
            bias=0 if bias is None else bias.data_ptr(),
            bias_size=0 if bias is None else bias.numel(),
            y=y.data_ptr(),
            y_size=y.numel(),
            tokens=x.shape[:-1].numel(),
            out_features=out_features,
            in_features=in_features,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return y


def _fake(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    _, values, metadata, _, *ctx.sizes = inputs
    ctx.save_for_backward(values, metadata)


def _backward(ctx, g: Tensor) -> tuple:
    gx = g @ dense(ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[0] else None
    gb = g.sum_to_size(g.shape[-1]) if ctx.needs_input_grad[3] else None
    return gx, None, None, gb, None, None


_LIBRARY = torch.library.Library("sparsekern", "FRAGMENT")
_LIBRARY.define(
    "linear_24_wgmma(Tensor x, Tensor values, Tensor metadata, Tensor? bias, int out_features, int in_features) "
    "-> Tensor"
)
_LIBRARY.impl("linear_24_wgmma", _linear, "CUDA")
torch.library.register_fake("sparsekern::linear_24_wgmma", _fake, lib=_LIBRARY)
torch.library.register_autograd("sparsekern::linear_24_wgmma", _backward, setup_context=_keep, lib=_LIBRARY)


def run(x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """y [..., out_features] by wgmma.sp, from what `prepare` has made."""
    return torch.ops.sparsekern.linear_24_wgmma(x, *operands, bias, out_features, in_features)
