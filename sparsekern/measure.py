"""measure: what a model costs and what it is worth: bytes, perplexity, decode latency, and the Report that says so.

Perplexity follows the protocol that the papers compare by (GPTQ, https://arxiv.org/abs/2210.17323, and after it
SparseGPT and Wanda): non-overlapping windows of `seqlen` tokens, the tail dropped, and

    nll = mean cross-entropy of a window's seqlen - 1 predictions * seqlen
    perplexity = exp(sum of nll / (windows * seqlen))
"""

import hashlib
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.timing import Json, Latency, Ratio, alternate, cache_bytes

PROTOCOL = "non-overlapping windows, tail dropped, mean cross-entropy of seqlen - 1 predictions a window"
# logits are turned into float32 so many tokens at a time: a large vocabulary costs 0.5 MB a token
LOGIT_ROWS = 256
# what the kernels look for
INSTRUCTION_SETS = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512vbmi2", "avx512_vbmi2", "avx512_bf16", "avx512_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8"),
)


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with all that it depends on.

    tokens  inside windows
    sha256  of these tokens as int64, little end first
    """

    value: float
    seqlen: int
    windows: int
    tokens: int
    sha256: str
    dtype: str
    protocol: str = PROTOCOL

    def to_json(self) -> Json:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.windows} windows of {self.seqlen} tokens, {self.dtype})"


def perplexity(
    model: nn.Module, tokens: Tensor, seqlen: int = 2048, progress: Callable[[int, int], object] | None = None
) -> Perplexity:
    """The perplexity of a causal language model on `tokens`.

    tokens    [tokens] or [1, tokens], the whole text tokenised once
    progress  called after each window with the number done and the number of all

    Raises ValueError when there are fewer tokens than `seqlen`, and when the model's loss is NaN or infinite.
    """
    tokens = tokens.reshape(-1)
    if seqlen < 2:
        raise ValueError(f"seqlen must be at least 2, a token is predicted from the ones before it, got {seqlen}")
    windows = len(tokens) // seqlen
    if windows == 0:
        raise ValueError(f"perplexity needs at least seqlen = {seqlen} tokens, got {len(tokens)}; use a longer text")
    tokens = tokens[: windows * seqlen].cpu()
    device, total = device_of(model), 0.0
    with evaluating(model):
        for window in range(windows):
            ids = tokens[window * seqlen : (window + 1) * seqlen].to(device)
            mean = _cross_entropy(logits(model, ids), ids)
            if not math.isfinite(mean):
                raise ValueError(
                    f"the model's loss is {mean} in window {window} of {windows}; check the weights for NaN"
                )
            total += mean * seqlen
            if progress:
                progress(window + 1, windows)
    digest = hashlib.sha256(tokens.to(torch.int64).numpy().tobytes()).hexdigest()
    value = math.exp(total / (windows * seqlen))
    return Perplexity(value, seqlen, windows, windows * seqlen, digest, _dtype(model))


def weight_bytes(model: nn.Module) -> int:
    """The bytes of all parameters and buffers; what is tied counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        # a storage on the meta device has no address
        storages[tensor.device, storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())


def linear_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of every linear layer, dense or sparse, but the output embedding.

    A sparse layer rebuilds its weight for this: take one at a time.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        # transformers' Conv1D says nf where nn.Linear says out_features
        if module is not head and (hasattr(module, "in_features") or hasattr(module, "nf")):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2:
                yield name, weight.detach()


def linear_sparsity(model: nn.Module) -> float | None:
    """The fraction of zeros in the linear layers' weights, the output embedding left out; None without such layers."""
    zeros = size = 0
    for _, weight in linear_weights(model):
        zeros += int((weight == 0).sum())
        size += weight.numel()
    return zeros / size if size else None


def machine() -> Json:
    """What a number depends on: processor, threads, card, versions, commit. No host names and no paths."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in (_cpuinfo("flags") or "").split()],
        "cache_bytes": cache_bytes(),
        "gpu": device,
        "cuda": torch.version.cuda if device else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sparsekern": version("sparsekern"),
        "commit": _commit(),
    }


@dataclass(frozen=True)
class Report:
    """What a model costs and what it is worth, on this machine.

    bytes            parameters and buffers
    linear_sparsity  of the linear layers but the output embedding; None without any
    decode           one forward pass of one token, no cache of keys and values
    """

    perplexity: Perplexity
    bytes: int
    linear_sparsity: float | None
    decode: Latency
    dtype: str
    machine: Json

    def against(self, before: "Report") -> "Comparison":
        """This model beside what it was made from."""
        return Comparison(before, self)

    def to_json(self) -> Json:
        """What json.dumps takes."""
        parts = {"perplexity": self.perplexity.to_json(), "decode": self.decode.to_json()}
        return {**self.__dict__, **parts}

    def __str__(self) -> str:
        return _table([("", "model"), *((name, text) for name, text, _ in _rows(self))]) + "\n" + _note(self)


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side.

    They were measured in separate runs, so the speed-up says less than alternating samples would: it is marked, it
    spans from the worst to the best case of the two, and it is left out when either latency is unsteady.
    """

    before: Report
    after: Report

    @property
    def speedup(self) -> Ratio:
        old, new = self.before.decode, self.after.decode
        for name, latency in (("before", old), ("after", new)):
            if latency.unsteady:
                return Ratio.unknown(f"{name} is unsteady: {latency.unsteady}")
        if _of_speed(self.before.machine) != _of_speed(self.after.machine):
            return Ratio.unknown("measured on two machines or with other threads")
        return Ratio(old.median / new.median, old.p10 / new.p90, old.p90 / new.p10)

    def to_json(self) -> Json:
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "speedup": {**self.speedup.to_json(), "separate_runs": True},
        }

    def __str__(self) -> str:
        rows = [("", "before", "after", "")]
        for (name, old, value_old), (_, new, value_new) in zip(_rows(self.before), _rows(self.after), strict=True):
            change = f"{value_new / value_old:.2f}x" if value_old and value_new else ""
            rows.append((name, old, new, change))
        speedup = str(self.speedup) + (", separate runs" if self.speedup.median else "")
        rows[-1] = (*rows[-1][:3], speedup)
        texts = [self.before.perplexity, self.after.perplexity]
        other = texts[0].sha256 != texts[1].sha256 or texts[0].seqlen != texts[1].seqlen
        warning = "\nthe two perplexities are of different tokens or windows: do not compare them" if other else ""
        return _table(rows) + "\n" + _note(self.after) + warning


def measure(
    model: nn.Module,
    heldout: Tensor,
    seqlen: int = 2048,
    rounds: int = 50,
    progress: Callable[[int, int], object] | None = None,
) -> Report:
    """Measure a causal language model.

    heldout  [tokens] or [1, tokens]: text the model was neither trained nor calibrated on
    seqlen   of the perplexity windows
    rounds   of the decode latency

    Raises ValueError as `perplexity` does.
    """
    worth = perplexity(model, heldout, seqlen, progress)
    device = device_of(model)
    token = heldout.reshape(-1)[:1].to(device)
    with evaluating(model):
        timed = alternate({"decode": lambda _: logits(model, token)}, rounds=rounds, seconds=30, device=device)
    return Report(
        perplexity=worth,
        bytes=weight_bytes(model),
        linear_sparsity=linear_sparsity(model),
        decode=timed.latency("decode"),
        dtype=_dtype(model),
        machine=machine(),
    )


def _rows(report: Report) -> list[tuple[str, str, float | None]]:
    """Name, text and the number whose ratio is of interest. The latency stands last."""
    sparsity = "–" if report.linear_sparsity is None else f"{report.linear_sparsity:.1%}"
    return [
        ("perplexity", f"{report.perplexity.value:.3f}", report.perplexity.value),
        ("weights", f"{report.bytes / 1e6:.1f} MB", report.bytes),
        ("sparsity of linear weights", sparsity, None),
        ("decode, 1 token", str(report.decode), None),
    ]


def _note(report: Report) -> str:
    facts, worth = report.machine, report.perplexity
    note = (
        f"perplexity on {worth.windows} windows of {worth.seqlen} tokens; {report.dtype}; "
        f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"
    )
    cache = facts["cache_bytes"]
    if not facts["gpu"] and isinstance(cache, int) and report.bytes < cache:
        note += "\nthe weights fit the cache: reading less of them buys less than it would in a model that does not"
    return note


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _of_speed(facts: Json) -> tuple[object, ...]:
    return tuple(facts.get(key) for key in ("cpu", "threads", "gpu"))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] of one sequence ids [tokens]."""
    cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    out = model(ids[None], **cache)
    if not isinstance(out, Tensor) and not hasattr(out, "logits"):
        raise ValueError(
            f"{type(model).__name__} puts out no logits; perplexity and decode need a causal language model"
        )
    return (out if isinstance(out, Tensor) else out.logits)[0]


def _cross_entropy(logits: Tensor, ids: Tensor) -> float:
    """The mean over the predictions of ids[1:], in float32."""
    total = 0.0
    for start in range(0, len(ids) - 1, LOGIT_ROWS):
        wanted = ids[start + 1 : start + 1 + LOGIT_ROWS]
        rows = logits[start : start + len(wanted)].float()
        total += F.cross_entropy(rows, wanted, reduction="sum").item()
    return total / (len(ids) - 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without gradients; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _first(model: nn.Module) -> Tensor | None:
    return next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), None)


def device_of(model: nn.Module) -> torch.device:
    first = _first(model)
    return torch.device("cpu") if first is None else first.device


def _dtype(model: nn.Module) -> str:
    first = _first(model)
    return "none" if first is None else str(first.dtype).removeprefix("torch.")


def _cpuinfo(key: str) -> str | None:
    if sys.platform != "linux":
        return None
    with open("/proc/cpuinfo") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None


def version(package: str) -> str | None:
    """Of an installed package; None where it is not installed, as this one where it runs from its sources."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this runs from, "+" behind it when tracked files differ; None outside of one."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # an installed package may lie inside of somebody else's checkout
    if not os.path.exists(os.path.join(root, ".git")):
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: str, *command: str) -> str:
    ran = subprocess.run(("git", "-C", root, *command), capture_output=True, text=True, check=True, timeout=10)
    return ran.stdout.strip()
