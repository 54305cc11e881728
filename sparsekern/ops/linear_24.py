"""linear_24: y = x W^T + bias with W packed 2:4 (formats/semi_structured.py).

`prepare` turns the packed weight into the tensors that a kernel reads, once; `restore` gives it back bit for bit.

There is no kernel of its own yet: linear_bitmap's serve, for a bitmap takes the same bytes but for 8 a row. In a group
that keeps fewer than two weights `restore` puts the zeros where SemiStructured.pack does.
"""

from torch import Tensor
from torch.nn.functional import linear

from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import bitmap_rows, cusparselt, linear_bitmap
from sparsekern.ops.bitmap_panels import from_panels, to_panels
from sparsekern.ops.kernel import Kernel, never_refuses


def reference(x: Tensor, packed: SemiStructured, bias: Tensor | None) -> Tensor:
    """Multiply by the dense weight.

    x     [..., in_features], the dtype of the values
    bias  [out_features] or None

    Returns y [..., out_features].
    """
    return linear(x, packed.to_dense(), bias)


def _bitmap(packed: SemiStructured) -> Bitmap:
    packed.validate()
    return bitmap_rows.pack(packed.to_dense())


def _to_panels(packed: SemiStructured) -> tuple[Tensor, ...]:
    return to_panels(_bitmap(packed))


def _from_panels(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> SemiStructured:
    return SemiStructured.pack(bitmap_rows.to_dense(from_panels(operands, out_features, in_features)))


def _to_rows(packed: SemiStructured) -> tuple[Tensor, ...]:
    bitmap = _bitmap(packed)
    return bitmap.values, bitmap.bitmap, bitmap.row_offsets


def _from_rows(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> SemiStructured:
    return SemiStructured.pack(bitmap_rows.to_dense(Bitmap(*operands, in_features)))


def _as_saved(packed: SemiStructured) -> tuple[Tensor, Tensor]:
    packed.validate()
    return packed.values, packed.metadata


def _from_saved(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> SemiStructured:
    return SemiStructured(*operands, in_features)


def _dense_from_saved(operands: tuple[Tensor, ...], out_features: int, in_features: int) -> Tensor:
    return SemiStructured(*operands, in_features).to_dense()


def _run(x: Tensor, operands: tuple[Tensor, ...], bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    return reference(x, SemiStructured(*operands, in_features), bias)


KERNELS = (
    Kernel("cpu", linear_bitmap.run_cpu, linear_bitmap.cpu_refuses, _to_panels, _from_panels, linear_bitmap.dense_cpu),
    Kernel(
        "cuda",
        linear_bitmap.run_cuda,
        linear_bitmap.cuda_refuses,
        _to_rows,
        _from_rows,
        linear_bitmap.dense_from_saved,
    ),
    Kernel("cusparselt", cusparselt.run, cusparselt.refuses, cusparselt.prepare, cusparselt.restore, cusparselt.dense),
    Kernel("reference", _run, never_refuses, _as_saved, _from_saved, _dense_from_saved),
)
