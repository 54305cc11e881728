"""plan_cache: decisions of a plan on the disk: what they hold for, a file of them, and the user's cache.

What was measured holds for one processor, instruction set, number of threads, one version of torch and of sparsekern,
and one build of the compiled modules. The cache has a file for each such machine, and in it the decisions that were
steady when they were measured. A checkpoint's files hold none: they are hashed and travel, and would change with every
machine that measures; `Plan.save` writes a plan to wherever it is wanted.
"""

import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from sparsekern.decisions import Decision, Kind
from sparsekern.measure import machine
from sparsekern.ops import LINEAR_KERNELS, compiled
from sparsekern.timing import Json

FORMAT_VERSION = 2
# platform -> the folder of caches in a user's home
_CACHES = {"darwin": "Library/Caches", "win32": "AppData/Local"}

Decisions = dict[Kind, Decision]


def user_cache() -> Path | None:
    """Where this user's programs keep what can be made again; None: there is no home."""
    try:
        return Path.home() / _CACHES.get(sys.platform, ".cache") / "sparsekern"
    except RuntimeError:
        return None


def here() -> Json:
    """What a decision depends on beyond the kind of layer."""
    facts, cpu = machine(), compiled.cpu()
    return {
        "processor": facts["cpu"],
        "instruction_set": cpu.isa() if cpu else None,
        "threads": facts["threads"],
        "torch": facts["torch"],
        "sparsekern": facts["sparsekern"],
        "kernels": {"cpu": _digest("cpu"), "cuda": _digest("cuda")},
    }


def file_of(cache: Path) -> Path:
    """The file of this machine in `cache`."""
    facts = json.dumps(here(), sort_keys=True).encode()
    return cache / f"plan-{hashlib.sha256(facts).hexdigest()[:16]}.json"


def to_json(decisions: Decisions) -> Json:
    """What json.dumps takes: the decisions, and what they hold for."""
    entries = [{"kind": vars(kind), **decision.to_json()} for kind, decision in decisions.items()]
    return {"plan": "sparsekern", "format_version": FORMAT_VERSION, "machine": here(), "decisions": entries}


def from_json(data: Mapping) -> Decisions:
    """Raises ValueError for what is no plan, and for one of another machine, threads or versions: measure anew."""
    try:
        if data["plan"] != "sparsekern" or data["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"the plan's format_version is {data['format_version']!r}, this sparsekern reads {FORMAT_VERSION}"
            )
        # before anything else: another version may have written other decisions
        _check_machine(data["machine"])
        decisions = {Kind.from_json(entry["kind"]): _decision(entry) for entry in data["decisions"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a plan: {type(error).__name__}: {error}") from error
    _check_devices(decisions)
    return decisions


def save(decisions: Decisions, path: Path) -> None:
    """Write the decisions to a file, which is the old one or the whole new one at any moment."""
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(to_json(decisions), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's file is closed to everybody else
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)


def load(path: Path) -> Decisions:
    """Those of a file. Raises ValueError as from_json does, naming the file, and for a damaged one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no such plan: {str(path)!r}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r}: not a plan: {error}") from error
    try:
        return from_json(data)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def recall(cache: Path) -> Decisions:
    """What `cache` holds for this machine; nothing when it cannot be read, because it can be measured again."""
    try:
        return load(file_of(cache))
    except (ValueError, OSError):
        return {}


def keep(decisions: Decisions, cache: Path) -> str | None:
    """Add the steady ones to `cache`. Returns why that was not possible, or None."""
    steady = {kind: decision for kind, decision in decisions.items() if decision.steady}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # another process may have added to it meanwhile
        save({**recall(cache), **steady}, file_of(cache))
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def _digest(name: str) -> str | None:
    """Of the compiled module: another build has other kernels."""
    module = getattr(compiled, name)()
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:16] if module else None


def _check_machine(stored: Mapping) -> None:
    for name, value in here().items():
        if stored[name] != value:
            raise ValueError(
                f"the plan was measured with {name} {stored[name]!r}, here it is {value!r}; measure a new one: Plan()"
            )


def _check_devices(decisions: Decisions) -> None:
    there = {"cpu", *(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))}
    if away := {kind.device for kind in decisions} - there:
        raise ValueError(f"the plan was measured on {sorted(away)[0]!r}, which is not here; measure a new one: Plan()")


def _decision(data: Mapping) -> Decision:
    decision = Decision.from_json(data)
    known = {format.name: [kernel.name for kernel in kernels] for format, kernels in LINEAR_KERNELS.items()}
    if decision.format is not None and decision.format not in known:
        raise ValueError(f"not a plan: no format {decision.format!r}, only {', '.join(known)}")
    if decision.format is not None and decision.kernel not in known[decision.format]:
        kernels = ", ".join(known[decision.format])
        raise ValueError(f"not a plan: {decision.format} has no kernel {decision.kernel!r}, only {kernels}")
    return decision
