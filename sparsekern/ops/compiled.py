"""The doors to the compiled modules, sparsekern._cpu and sparsekern._cuda, and why one is shut.

A module is missing for one of three reasons, told apart in words: it was not built, it cannot be loaded, or it was
built for another version of Python or of this package.
"""

import functools
import importlib
import importlib.machinery
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# first: its OpenMP runtime is then the one the modules share
import torch

# what the Python side expects of the binding: kAbi of csrc/ops.h, raised with every change of a function's arguments
ABI = 7

_PACKAGE = Path(__file__).parent.parent
_REBUILD = "install sparsekern again"


def cpu() -> ModuleType | None:
    """sparsekern._cpu, or None; `why_not("cpu")` says why."""
    return _load("cpu")[0]


def cuda() -> ModuleType | None:
    """sparsekern._cuda, or None; `why_not("cuda")` says why. That it loads does not say that there is a card."""
    return _load("cuda")[0]


def wgmma() -> ModuleType | None:
    """sparsekern._wgmma, built where CUTLASS was found, or None; `why_not("wgmma")` says why."""
    return _load("wgmma")[0]


def instruction_set() -> str | None:
    """The one that linear_bitmap's CPU kernels use; None where sparsekern._cpu is missing."""
    return cpu().isa() if cpu() else None


@contextmanager
def using(isa: str | None) -> Iterator[None]:
    """Within this block the CPU kernels use the instruction set `isa` and those that every processor with it has.

    To compare sets, or to see what another machine would do; None: what was used so far. It holds for the process, its
    other threads too. Packed weights stay as they are, because all sets read one layout; a Plan is for the set that it
    was measured with.

    Raises ValueError for one that this machine does not have, RuntimeError where sparsekern._cpu is missing.
    """
    if isa is None:
        yield
        return
    module = cpu()
    if module is None:
        raise RuntimeError(f"no instruction set can be chosen without sparsekern._cpu: {why_not('cpu')}")
    before = module.use(isa)
    try:
        yield
    finally:
        module.use(before)


# in quotes: this module is also tried with a torch that holds nothing
def in_huge_pages(fresh: "torch.Tensor") -> "torch.Tensor":
    """`fresh`, contiguous and not yet written, which will lie in pages of 2 MB where the system grants them.

    A weight that is read once a token misses the address cache on every 4 KB: on Zen 5 at 50 % sparsity and one token a
    fifth of the bandwidth. On another device, and without sparsekern._cpu, nothing is asked.
    """
    if fresh.device.type == "cpu" and (module := cpu()) is not None:
        module.prefer_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def copy(tensor: "torch.Tensor") -> "torch.Tensor":
    """A contiguous copy, in huge pages."""
    return in_huge_pages(torch.empty_like(tensor, memory_format=torch.contiguous_format)).copy_(tensor)


def launch(start: Callable[..., None], **arguments: Any) -> None:
    """Call a function of the compiled modules that starts a kernel, for the card of its tensors and the current stream.

    It is given a tensor as its address and, with _size behind the name, its number of elements; None as 0 and 0.
    """
    given = {}
    for name, argument in arguments.items():
        if argument is None:
            given[name] = given[name + "_size"] = 0
        elif isinstance(argument, (int, str)):
            given[name] = argument
        else:
            given[name], given[name + "_size"] = argument.data_ptr(), argument.numel()
            card = argument.get_device()
    # a launch goes to the current device. torch.cuda.current_stream() makes an object, for longer than all of this
    with torch.cuda.device(card):
        start(**given, stream=torch._C._cuda_getCurrentRawStream(card))


def why_not(name: str) -> str | None:
    """None when sparsekern._`name` is loaded, else the reason in words. name is "cpu", "cuda" or "wgmma"."""
    return _load(name)[1]


def how_built(name: str) -> dict[str, Any]:
    """What setup.py wrote of sparsekern._`name`: built, compiler, flags or why_not; empty when it wrote nothing."""
    record = _PACKAGE / "_build.json"
    return json.loads(record.read_text(encoding="utf-8")).get(name, {}) if record.exists() else {}


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    full_name = f"sparsekern._{name}"
    try:
        module = importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            return None, f"cannot be loaded: {error}"
        return None, _not_there(name)
    except ImportError as error:
        return None, f"cannot be loaded: {str(error).splitlines()[0]}"
    abi = getattr(module, "ABI", None)
    if abi != ABI:
        return None, f"built for another version: its binding is {abi}, this package's is {ABI}; {_REBUILD}"
    return module, None


def _not_there(name: str) -> str:
    others = [f.name for f in sorted(_PACKAGE.glob(f"_{name}.*")) if f.suffix in (".so", ".pyd")]
    if others:
        wanted = importlib.machinery.EXTENSION_SUFFIXES[0]
        return f"built for another version: found {others[0]}, this Python wants _{name}{wanted}; {_REBUILD}"
    how = how_built(name)
    if how.get("built"):
        return f"not built: it was, with {how['compiler']}, but its file is gone; {_REBUILD}"
    return f"not built: {how.get('why_not', 'the package was not installed, only found')}"
