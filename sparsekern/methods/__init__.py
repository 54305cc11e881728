"""Pruning methods: a frozen dataclass holds the settings, prune(weight, stats, pattern) returns the pruned weight."""

from sparsekern.methods.magnitude import Magnitude
from sparsekern.methods.sparsegpt import SparseGPT
from sparsekern.methods.wanda import Wanda

METHODS = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}

__all__ = ["METHODS", "Magnitude", "SparseGPT", "Wanda"]
