"""sparsekern: prune a model, pack it, swap its Linear layers for sparse ones, and measure what became faster."""

from sparsekern.methods import Magnitude, SparseGPT, Wanda
from sparsekern.pattern import NM, Unstructured

__all__ = ["NM", "Magnitude", "SparseGPT", "Unstructured", "Wanda"]
