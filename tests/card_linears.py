"""The linear ops of a card, which the tests also give tensors of the CPU."""

from sparsekern.ops import cusparselt, linear_24, linear_bitmap, linear_bitmap_fragments, wgmma_24
from sparsekern.ops.linear_call import CudaLinear

_MODULES = (linear_24, wgmma_24, cusparselt, linear_bitmap_fragments, linear_bitmap)
CARD_LINEARS = {op.name: op for module in _MODULES for op in vars(module).values() if isinstance(op, CudaLinear)}
