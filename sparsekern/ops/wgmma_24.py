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
from sparsekern.ops.kernel import device_refuses
from sparsekern.ops.linear_call import CudaLinear, laid_out

ATOM_ROWS = 64
ATOM_INPUTS = 128
INPUTS_MULTIPLE = 16
OUTPUTS_MULTIPLE = 8
_ALIGNMENT_BYTES = 16
# positions 0 and 1 in each of a word's four groups, as SemiStructured.pack leaves groups without inputs
_EMPTY_WORD = 0x4444


def refuses(packed: SemiStructured) -> str | None:
    """Why this kernel cannot serve a weight; None: it can."""
    if reason := device_refuses(packed, "cuda", (torch.bfloat16,)):
        return reason
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


def _multiply(
    x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    x, bias, y = laid_out(x, bias, out_features)
    values, metadata = map(_aligned, operands)
    compiled.launch(
        compiled.wgmma().linear_24_bf16,
        x=_aligned(x),
        values=values,
        metadata=metadata.data_ptr(),
        metadata_bytes=metadata.nbytes,
        bias=None if bias is None else _aligned(bias),
        y=y,
        tokens=x.shape[:-1].numel(),
        out_features=out_features,
        in_features=in_features,
    )
    return y


_LINEAR = CudaLinear("linear_24_wgmma", ("values", "metadata"), "values", _multiply, dense)


def run(x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """y [..., out_features] by wgmma.sp, from what `prepare` has made."""
    return _LINEAR.run(x, operands, bias, out_features, in_features)
