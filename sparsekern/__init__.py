"""sparsekern: prune a model, pack it, swap its Linear layers for sparse ones, and measure what became faster."""

# registers the plug-in, so that transformers loads what sparsekern has saved
from sparsekern import hf_quantizer as hf_quantizer
from sparsekern.allocation import allocate
from sparsekern.checkpoint import load, save
from sparsekern.finishing import Finish
from sparsekern.fixed_masks import FixedMasks
from sparsekern.gradual import CubicSchedule, GradualMagnitude
from sparsekern.linear import SparseLinear
from sparsekern.lottery import Ticket, find_ticket
from sparsekern.measure import measure
from sparsekern.methods import ADMM, GPTQ, OBD, OBS, LayerOBD, Magnitude, Refine, SparseGPT, Wanda
from sparsekern.oneshot import prune
from sparsekern.pattern import NM, Unstructured, as_pattern
from sparsekern.permute import permute
from sparsekern.plan import Plan, Unmeasured
from sparsekern.streaming import prune_streaming
from sparsekern.swap import densify, sparsify
from sparsekern.text import read_calibration

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "CubicSchedule",
    "Finish",
    "FixedMasks",
    "GPTQ",
    "GradualMagnitude",
    "GradualPruning",
    "KeepZeros",
    "NM",
    "OBD",
    "OBS",
    "LayerOBD",
    "Magnitude",
    "Plan",
    "Refine",
    "SparseGPT",
    "SparseLinear",
    "Ticket",
    "Unmeasured",
    "Unstructured",
    "Wanda",
    "allocate",
    "as_pattern",
    "densify",
    "find_ticket",
    "load",
    "measure",
    "permute",
    "prune",
    "prune_streaming",
    "read_calibration",
    "save",
    "sparsify",
]


def __getattr__(name: str):
    # transformers' part of them takes its time, and only those who train want it
    if name in ("GradualPruning", "KeepZeros"):
        from sparsekern import hf_trainer

        return getattr(hf_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
