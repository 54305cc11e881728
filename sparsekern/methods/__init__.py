"""Pruning methods: a frozen dataclass holds the settings, prune(weight, stats, pattern) returns the pruned weight."""

from sparsekern.methods.admm import ADMM
from sparsekern.methods.gptq import GPTQ
from sparsekern.methods.magnitude import Magnitude
from sparsekern.methods.obd import OBD, LayerOBD
from sparsekern.methods.obs import OBS
from sparsekern.methods.refine import Refine
from sparsekern.methods.sparsegpt import SparseGPT
from sparsekern.methods.wanda import Wanda

METHODS = {
    "magnitude": Magnitude,
    "obd": OBD,
    "layer-obd": LayerOBD,
    "obs": OBS,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "admm": ADMM,
}

__all__ = ["ADMM", "GPTQ", "METHODS", "OBD", "OBS", "LayerOBD", "Magnitude", "Refine", "SparseGPT", "Wanda"]
