"""doctor: what was built, which kernels this machine can use, and why the others refuse."""

from typing import Any

import torch

from sparsekern.measure import machine, version
from sparsekern.ops import LINEAR_KERNELS, compiled

MODULES = ("cpu", "cuda", "wgmma")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIBRARIES = ("torch", "transformers", "triton", "safetensors", "tokenizers")


def examine() -> dict[str, Any]:
    """The facts.

    machine, libraries  what a result depends on
    modules             why a compiled module is missing; None: it is loaded
    instruction_set     which one the CPU kernels use; instruction_sets: those they could be told to use, best first
    kernels             a row for every device, format, dtype and kernel with its refusal; None: it serves, the first
                        one that does is used
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for device in devices:
        for format, kernels in LINEAR_KERNELS.items():
            for dtype in DTYPES:
                rows += _rows(device, format, dtype, kernels)
    return {
        "machine": machine(),
        "libraries": libraries(),
        "modules": {name: compiled.why_not(name) for name in MODULES},
        "instruction_set": compiled.instruction_set(),
        "instruction_sets": list(compiled.cpu().instruction_sets()) if compiled.cpu() else [],
        "kernels": rows,
    }


def libraries() -> dict[str, str | None]:
    """The versions that a result depends on; None: not installed."""
    return {name: version(name) for name in LIBRARIES}


def _rows(device: str, format: type, dtype: torch.dtype, kernels: tuple) -> list[dict[str, Any]]:
    # half of an ordinary layer's shape: what a kernel refuses here it refuses for its device or dtype
    weight = torch.zeros(64, 64, dtype=dtype, device=device)
    weight[:, ::2] = 1
    packed = format.pack(weight)
    rows, chosen = [], False
    for kernel in kernels:
        refusal = kernel.refuses(packed)
        rows.append(
            {
                "device": device,
                "format": format.name,
                "dtype": str(dtype).removeprefix("torch."),
                "kernel": kernel.name,
                "used": refusal is None and not chosen,
                "refusal": refusal,
            }
        )
        chosen = chosen or refusal is None
    return rows
