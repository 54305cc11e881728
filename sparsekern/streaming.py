"""prune_streaming(): from a checkpoint to a pruned one, a decoder block in memory at a time, resumed after a kill.

In memory are one block, its statistics, the cached activations, and what is outside the blocks. Beside the output OUT
lies .OUT.unfinished while the run lasts: a shard for every block that is done, and a journal of them. A block counts
from when its shard and its line in the journal are on the disk. A run that finds them recomputes the activations from
the finished blocks, bit for bit, and goes on.
"""

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekern import hf, model_files
from sparsekern.batches import Batch, read_batches
from sparsekern.finishing import Finish
from sparsekern.hf_weights import use_generation_config
from sparsekern.journal import Journal
from sparsekern.measure import version
from sparsekern.methods import Refine
from sparsekern.model_files import UnreadableError
from sparsekern.oneshot import prune
from sparsekern.ops import compiled
from sparsekern.paging import OUTSIDE, Pager
from sparsekern.pattern import Pattern, Unstructured, as_pattern
from sparsekern.publish import lock, move, refuse_existing
from sparsekern.report import PruneReport
from sparsekern.residence import InMemory
from sparsekern.shards import read_header
from sparsekern.stats import GradSquare
from sparsekern.traces import fingerprint

JOURNAL = "journal"
LIBRARIES = ("torch", "transformers", "sparsekern")
NOTHING = {"layers": [], "blocks": [], "skipped": []}


class OnDisk(InMemory):
    """A checkpoint's model whose blocks' weights stay on disk until they are needed.

    source  directory of the checkpoint
    dtype   of the weights; None keeps the checkpoint's own

    model        runs like any; its blocks' weights come when they are called, and are on the meta device in between
    fingerprint  sha256 of each of its files, by name

    Raises ValueError when there is no such model, UnreadableError when prune() may take it and this cannot.
    """

    device = torch.device("cpu")

    def __init__(self, source: str | Path, dtype: torch.dtype | None = None):
        self.source = Path(source).expanduser()
        stored = model_files.tensors_of(self.source)
        self.model: nn.Module = hf.skeleton(self.source, dtype)
        if dtype is None and self.model.config.dtype is None:
            # a config that does not say: what transformers does then
            floats = [tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point]
            self.model = hf.skeleton(self.source, next(iter(floats), torch.float32))
        if getattr(self.model.config, "quantization_config", None) is not None:
            # the names and shapes of its tensors may be a dense model's, and their values are not
            raise UnreadableError(f"{str(self.source)!r} is quantised")
        self.pager = Pager(self.model, self.source)

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        return hf.fingerprint(self.source)

    @contextmanager
    def held(self, block: str, dense: bool = False) -> Iterator[None]:
        with self.pager.held(block, dense):
            yield


def why_not_streaming(method: Any, pattern: Pattern | Mapping[str, Pattern]) -> str | None:
    """Why these need the whole model in memory; None when a block at a time will do."""
    patterns = pattern.values() if isinstance(pattern, Mapping) else [pattern]
    if method.needs is GradSquare:
        return f"{type(method).__name__} reads gradients of the whole model's loss"
    # prune() refuses methods that need statistics for that
    if method.needs is None and any(isinstance(one, Unstructured) and one.scope == "model" for one in patterns):
        return 'scope "model" ranks the weights of all layers at once'
    return None


def work_directory(output: str | Path) -> Path:
    """Where a run keeps what is done until `output` appears."""
    output = Path(os.path.abspath(output))
    return output.parent / f".{output.name}.unfinished"


def prune_streaming(
    source: str | Path | OnDisk,
    output: str | Path,
    method: Any,
    pattern: Pattern | str | float | Mapping[str, Pattern | str | float],
    calibration: Iterable[Batch] | None = None,
    *,
    refine: int = 0,
    finish: Finish | None = None,
    skip: Iterable[str] = (),
    errors: bool = True,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    files: Callable[[PruneReport], Mapping[str, str]] = lambda report: {},
    restart: bool = False,
    progress: bool = False,
) -> PruneReport:
    """Prune a local checkpoint into a new one, one decoder block in memory at a time; weights as prune() makes them.

    source     directory of a checkpoint, safetensors; or an OnDisk, which serves one run
    output     directory that appears by one rename, complete; plain transformers loads it
    dtype      of a directory's weights; None keeps the checkpoint's own
    tokenizer  or processor, saved beside the model; None for none
    files      called with the report, returns name -> text of files to write beside the model
    restart    throw away what an earlier run has left in work_directory(output)
    method, pattern, calibration, refine, finish, skip, errors, progress  as for prune()

    When it is killed, interrupted or fails, at any point, the same call goes on after the last block that was done, and
    what appears is the same, bit for bit. Its report covers all blocks.

    Raises FileExistsError when the output exists; LockedError when another process writes it; ValueError for what
    prune() refuses, for what needs the whole model in memory, and when what an earlier run left was begun with another
    model, calibration, setting, version or number of threads: it names what has changed.
    """
    output = Path(os.path.abspath(output))
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    if isinstance(pattern, Mapping):
        pattern = {name: as_pattern(one) for name, one in pattern.items()}
    else:
        pattern = as_pattern(pattern)
    method = Refine(method, refine) if refine else method
    if reason := why_not_streaming(method, pattern):
        raise ValueError(f"{reason}: load the model and use prune()")
    batches = None if calibration is None else read_batches(calibration)
    work = work_directory(output)
    with lock(output):
        if restart:
            shutil.rmtree(work, ignore_errors=True)
        made = source if isinstance(source, OnDisk) else OnDisk(source, dtype)
        run = _Run(made, work, output, _facts(made, method, pattern, batches, finish, skip, errors))
        try:
            report = run.report()
            if report is None:
                settings = {"finish": finish, "skip": skip, "errors": errors, "progress": progress}
                report = prune(made.model, method, pattern, batches, residence=run, **settings)
                run.complete(report)
            run.publish(tokenizer, files(report))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted: {run.kept()}") from None
        except OSError as error:
            raise type(error)(error.errno, f"{error.strerror or error}: {run.kept()}", error.filename) from error
        finally:
            run.close()
        return report


class _Run(OnDisk):
    """A checkpoint's model on its way to another, and what is done of it.

    work    directory of what is done: a journal, and the output's files so far
    output  exists already when an earlier run was killed before it could tidy up, and then only that is left to do
    """

    def __init__(self, made: OnDisk, work: Path, output: Path, facts: Mapping[str, Any]):
        self.model, self.pager, self.source = made.model, made.pager, made.source
        self._work, self._output, self._folder = work, output, work / "checkpoint"
        self._started = time.perf_counter()
        groups = [OUTSIDE, *self.pager.blocks]
        self._files = {
            group: f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number, group in enumerate(groups, 1)
        }
        published = (work / JOURNAL).exists() and not self._folder.exists()
        if not published and (output.exists() or output.is_symlink()):
            if not self._folder.exists():
                # killed when there was nothing left but an empty directory
                _remove(work)
            refuse_existing(output)
        work.mkdir(exist_ok=True)
        remedy = f"remove {str(work)!r} to start over, or ask for that with restart=True (--restart)"
        try:
            self._journal = Journal(work / JOURNAL, facts)
        except ValueError as error:
            refuse_existing(output)
            raise ValueError(f"what an earlier run has left cannot go on, because {error}; {remedy}") from None
        if self.report() is None or not published:
            refuse_existing(output)
            self._folder.mkdir(exist_ok=True)
        for block, done in self._blocks():
            path = (self._folder if self._folder.exists() else output) / self._files[block]
            if not path.is_file() or model_files.digest(path) != done["sha256"]:
                raise ValueError(f"{str(path)!r} is not what an earlier run wrote there; {remedy}")
            self.pager.read_from(path)
        _sync(work)
        self.checked = bool(self._journal.done)
        self._before = max((done["seconds"] for _, done in self._blocks()), default=0.0)

    def finished(self, block: str) -> Any | None:
        done = self._journal.done.get(f"block {block}")
        return None if done is None else done["told"]

    def over(self, block: str, told: Any) -> None:
        unfinished, path = self._work / "shard", self._folder / self._files[block]
        sha256 = self.pager.write(block, unfinished)
        os.replace(unfinished, path)
        _sync(self._folder)
        self._journal.add(f"block {block}", {"sha256": sha256, "seconds": self._seconds(), "told": told})
        self.pager.read_from(path)

    def report(self) -> PruneReport | None:
        """Of an earlier run that had done everything but to give the output its name."""
        done = self._journal.done.get("report")
        return None if done is None else PruneReport.from_json(done)

    def complete(self, report: PruneReport) -> None:
        """Write what the walk had nothing to do with, and note that nothing is left to compute."""
        for block in self.pager.blocks:
            if self.finished(block) is None:
                with self.held(block):
                    self.over(block, NOTHING)
        if self.finished(OUTSIDE) is None:
            self.over(OUTSIDE, NOTHING)
        report.seconds = self._seconds()
        self._journal.add("report", report.to_json())

    def publish(self, tokenizer: Any, files: Mapping[str, str]) -> None:
        """Write what stands beside the weights and give the directory its name; remove what is left."""
        if self._folder.exists():
            # in a directory of its own, so that nothing of a kill gets in
            beside = self._work / "beside"
            _remove(beside)
            beside.mkdir()
            use_generation_config(self.model, self.source)
            hf.write_config(self.model, beside)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
            for name, text in {model_files.INDEX: self._index(), **files}.items():
                (beside / name).write_text(text, encoding="utf-8")
            for path in sorted(beside.iterdir()):
                _remove(self._folder / path.name)
                os.rename(path, self._folder / path.name)
            move(self._folder, self._output)
        # the journal is the last to go: without it nobody would know whose the rest is
        for path in sorted(self._work.iterdir(), key=lambda path: path.name == JOURNAL):
            _remove(path)
        self._work.rmdir()

    def kept(self) -> str:
        """What is left of the run if it ends now."""
        done = len(dict(self._blocks()).keys() - {OUTSIDE})
        if not done:
            return "no block was finished, and nothing was kept"
        return f"{done} of {len(self.pager.blocks)} blocks are kept in {str(self._work)!r}, and the same call goes on"

    def close(self) -> None:
        self._journal.close()
        if not self._journal.done:
            shutil.rmtree(self._work, ignore_errors=True)

    def _blocks(self) -> list[tuple[str, dict]]:
        done = self._journal.done.items()
        return [(name.removeprefix("block "), said) for name, said in done if name.startswith("block ")]

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def _index(self) -> str:
        tensors = {file: read_header(self._folder / file) for file in self._files.values()}
        places = {name: file for file, inside in tensors.items() for name in inside}
        size = sum(tensor.nbytes for inside in tensors.values() for tensor in inside.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        return json.dumps(index, indent=2) + "\n"


def _facts(
    made: OnDisk,
    method: Any,
    pattern: Pattern | Mapping[str, Pattern],
    batches: list[Batch] | None,
    finish: Finish | None,
    skip: tuple[str, ...],
    errors: bool,
) -> dict[str, Any]:
    """What the bits of a result depend on."""
    tokens = None
    if batches is not None:
        tokens = {"batches": len(batches), "sha256": hashlib.sha256(repr(fingerprint(batches)).encode()).hexdigest()}
    return {
        "model": made.fingerprint,
        "dtype": str(made.model.dtype),
        "method": repr(method) if is_dataclass(method) else type(method).__qualname__,
        "pattern": {name: repr(one) for name, one in pattern.items()}
        if isinstance(pattern, Mapping)
        else repr(pattern),
        "calibration": tokens,
        "finish": None if finish is None else repr(finish),
        "skip": list(skip),
        "errors": errors,
        **{f"version of {name}": version(name) for name in LIBRARIES},
        # sums are taken in another order
        "number of threads": torch.get_num_threads(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "compiled kernels": compiled.cpu().isa() if compiled.cpu() else compiled.why_not("cpu"),
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
