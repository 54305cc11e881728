"""prune_model: a whole model pruned from start to end, with its time and its peak memory by decoder block.

    python bench/prune_model.py                                    Llama-3.2-1B's shapes with random weights, 50%
    python bench/prune_model.py --method admm --pattern 2:4 --samples 32
    python bench/prune_model.py --tiny                             seconds on any CPU

Random weights take as long as trained ones. Their attention is almost uniform, so the errors are not those of a real
model. Resident memory is what Linux says of the process (VmRSS, its peak VmHWM): Python, the libraries, the model, and
what the allocator has not given back. The peak is set back before each block is walked and before it is solved, where
the kernel allows it. The last line of stdout is the result as JSON.
"""

import argparse
import json
import resource
import sys
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from model import DTYPES, random_model
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import hf, shapes
from sparsekern.measure import machine, weight_bytes
from sparsekern.methods import METHODS
from sparsekern.oneshot import LayerReport
from sparsekern.pattern import NM, Pattern
from sparsekern.preview import preview
from sparsekern.stats import GradSquare

STATUS, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# all gradients are gathered before the first layer is pruned: there is nothing to tell block by block
WALKING = [name for name, method in METHODS.items() if method.needs is not GradSquare]


def resident() -> int:
    """Of this process, in bytes."""
    return _status("VmRSS")


def peak_since_reset() -> int:
    """The most that was resident since `reset_peak`, in bytes; since the process started where that is refused."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Whether the kernel has let the peak be set back to what is resident now."""
    try:
        FORGET_PEAK.write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


@dataclass
class Turn:
    """One decoder block's turn.

    walked_peak       resident bytes, from the block before it until its own first layer is pruned
    solved_peak       from then until its last layer is pruned
    resident          afterwards, its statistics dropped
    statistics_bytes  of its layers' inputs, shared ones counted once
    """

    walked_peak: int
    statistics_bytes: int = 0
    solved_peak: int = 0
    resident: int = 0


class Watched:
    """A method that notes when each layer's turn came, and what was resident then."""

    def __init__(self, method: Any, model: nn.Module):
        self.needs, self._method = method.needs, method
        self.turns: list[Turn] = []
        # of each layer: its block's turn, and when it began
        self.began: list[tuple[Turn, float]] = []
        # weak: the walk frees a layer's statistics before the next block
        self._counted: weakref.WeakSet = weakref.WeakSet()
        self._walking = True
        self._hooks = [block.register_forward_pre_hook(self._run) for _, block in hf.blocks(model)]
        self.resets_peak, self._started = reset_peak(), time.perf_counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def prune(self, weight: Tensor, stats: Any, pattern: Pattern) -> Tensor:
        if self._walking:
            self.turns.append(Turn(walked_peak=peak_since_reset()))
            self._walking = False
            reset_peak()
        self.began.append((self.turns[-1], time.perf_counter()))
        if stats not in self._counted:
            self._counted.add(stats)
            tensors = [value for value in vars(stats).values() if isinstance(value, Tensor)]
            self.turns[-1].statistics_bytes += sum(tensor.nbytes for tensor in tensors)
        return self._method.prune(weight, stats, pattern)

    def end(self) -> None:
        """Note what is resident after the last block."""
        self._run()
        for hook in self._hooks:
            hook.remove()

    def _run(self, *_: Any) -> None:
        # the first forward after a block was pruned
        if not self._walking:
            turn = self.turns[-1]
            turn.solved_peak, turn.resident = peak_since_reset(), resident()
            # minutes apart for a large model, and the rows come at the end
            seconds, peak = time.perf_counter() - self._started, max(turn.walked_peak, turn.solved_peak)
            print(f"{len(self.turns)} blocks, {seconds:.0f} s, peak {peak / 1e6:,.0f} MB", file=sys.stderr)
            self._walking = True
            reset_peak()


def prune_watched(model: nn.Module, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune the model; the blocks' rows and the totals."""
    pattern = sk.as_pattern(arguments.pattern)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    # one sequence a batch: the first one's logits are computed over the whole vocabulary
    batches = [torch.randint(vocabulary, (1, arguments.seqlen), generator=generator) for _ in range(arguments.samples)]
    estimate = preview(model, pattern).statistics_bytes
    watched = Watched(METHODS[arguments.method](), model)
    started = time.perf_counter()
    report = sk.prune(model, watched, pattern, batches)
    watched.end()
    layers = dict(hf.layers(model))
    exact = {row.name: is_exact(hf.weight(layers[row.name]), pattern) for row in report.layers}
    blocks = [name for name, _ in hf.blocks(model)]
    done, rows = started, []
    for turn in watched.turns:
        numbers = [number for number, (its, _) in enumerate(watched.began) if its is turn]
        pruned = [report.layers[number] for number in numbers]
        rows.append(
            {
                "block": next(name for name in blocks if pruned[0].name.startswith(f"{name}.")),
                "walk_seconds": watched.began[numbers[0]][1] - done,
                "solve_seconds": sum(layer.seconds for layer in pruned),
                **asdict(turn),
                "layers": len(pruned),
                "exact_layers": sum(exact[layer.name] for layer in pruned),
                "held_out_error": mean_held_out_error(pruned),
            }
        )
        done = watched.began[numbers[-1]][1] + pruned[-1].seconds
    return {
        "tokens": arguments.samples * arguments.seqlen,
        "calibration": report.calibration,
        "seconds": report.seconds,
        "layers": len(report.layers),
        "exact_layers": sum(exact.values()),
        "sparsity": report.sparsity,
        "held_out_error": report.held_out_error,
        "preview_statistics_bytes": estimate,
        "statistics_bytes": max(row["statistics_bytes"] for row in rows),
        "peak_resets": watched.resets_peak,
        "peak_bytes": max(max(row["walked_peak"], row["solved_peak"]) for row in rows),
        "blocks": rows,
    }


def is_exact(weight: Tensor, pattern: Pattern) -> bool:
    """Whether the zeros are as many as the pattern says, in every group for N:M."""
    if isinstance(pattern, NM):
        return bool(((weight.reshape(-1, pattern.m) != 0).sum(dim=1) == pattern.n).all())
    return int((weight != 0).sum()) == pattern.kept(weight.numel())


def mean_held_out_error(layers: list[LayerReport]) -> float | None:
    errors = [layer.held_out_error for layer in layers if layer.held_out_error is not None]
    return sum(errors) / len(errors) if errors else None


def show(result: dict[str, Any]) -> None:
    head = (
        "block",
        "walk s",
        "solve s",
        "walk peak MB",
        "solve peak MB",
        "after MB",
        "statistics MB",
        "exact",
        "error",
    )
    table = [head]
    for row in result["blocks"]:
        megabytes = (row[key] for key in ("walked_peak", "solved_peak", "resident", "statistics_bytes"))
        seconds = (f"{row[key]:.1f}" for key in ("walk_seconds", "solve_seconds"))
        error = "" if row["held_out_error"] is None else f"{row['held_out_error']:.4f}"
        exact = f"{row['exact_layers']}/{row['layers']}"
        table.append((row["block"], *seconds, *(f"{size / 1e6:,.0f}" for size in megabytes), exact, error))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)))
    parts = {
        "Python and the libraries": result["program_bytes"],
        "the model": result["model_bytes"],
        "outputs of one block, kept for the next": result["activation_bytes"],
        "one block's statistics": result["statistics_bytes"],
    }
    print(f"peak {result['peak_bytes'] / 1e6:,.0f} MB")
    for name, size in parts.items():
        print(f"  {size / 1e6:8,.0f} {name}")
    print(
        f"  {(result['peak_bytes'] - sum(parts.values())) / 1e6:8,.0f} the rest: what a forward or the solver works in"
    )
    print(f"statistics: at most {result['preview_statistics_bytes'] / 1e6:,.0f} MB by preview, as if none were shared")
    print(
        f"{result['method']} {result['pattern']}: {result['exact_layers']} of {result['layers']} layers exact, "
        f"{result['seconds']:.1f} s, {result['tokens']} tokens, {result['machine']['threads']} threads, "
        f"{result['machine']['cpu']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=shapes.MODELS, default="llama-3.2-1b")
    parser.add_argument("--method", choices=WALKING, default="sparsegpt")
    parser.add_argument("--pattern", default="50%", help='as "50%%" or "2:4"')
    parser.add_argument("--samples", type=int, default=8, help="sequences of random token ids")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in each")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--output", type=Path, help="also write the JSON to this file, as bench/results/prune_model-llama-3.2-1b.json"
    )
    parser.add_argument("--tiny", action="store_true", help="the tiny model, few tokens")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.model, arguments.samples, arguments.seqlen = "tiny", 2, 64
    if not STATUS.exists():
        parser.error(f"resident memory is read from {STATUS}, which only Linux has")

    shape = shapes.find(arguments.model)
    torch.manual_seed(0)
    model = random_model(shape, DTYPES[arguments.dtype])
    model_bytes = weight_bytes(model)
    facts = {key: getattr(arguments, key) for key in ("model", "method", "pattern", "samples", "seqlen", "dtype")}
    result = {
        **facts,
        # making the model has imported what was left to import
        "program_bytes": resident() - model_bytes,
        "model_bytes": model_bytes,
        "activation_bytes": arguments.samples * arguments.seqlen * shape.hidden * DTYPES[arguments.dtype].itemsize,
        **prune_watched(model, arguments),
        # of the whole process, the making of the model as well
        "max_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "machine": machine(),
    }
    show(result)
    line = json.dumps(result)
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
