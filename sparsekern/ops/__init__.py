"""Operations: each file holds the contract, the reference in plain torch, and KERNELS, best first."""

from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import compiled, linear_24, linear_bitmap

# the kernels that serve a linear layer packed in each format
LINEAR_KERNELS = {SemiStructured: linear_24.KERNELS, Bitmap: linear_bitmap.KERNELS}

__all__ = ["LINEAR_KERNELS", "compiled"]
