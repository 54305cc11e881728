"""endtoend: a whole pruned model, dense against sparse, forward passes of one and of many tokens.

Both models share all tensors but the weights that were swapped. They run in alternation (timing.py), after their logits
were seen to agree. A forward pass here keeps no keys and values: of 1 token it is decode, of many it is prefill, and
attention to a long past is in neither.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

from sparsekern.measure import device_of, evaluating, logits, machine, weight_bytes
from sparsekern.plan import Plan, Unmeasured
from sparsekern.swap import sparsify
from sparsekern.timing import Json, Latency, Ratio, alternate

ROUNDS = 50
DENSE, SPARSE = "dense", "sparse"
# of the root mean square of the logits; several layers of rounding lie between a weight and a logit
LARGEST_DIFFERENCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Pass:
    """A forward pass of `tokens` tokens. difference: of the logits, root mean square, relative to the dense ones."""

    tokens: int
    dense: Latency
    sparse: Latency
    speedup: Ratio
    difference: float


@dataclass(frozen=True)
class EndToEnd:
    """What `compare_end_to_end` found. `swap`: which layers are sparse, which stay dense and why."""

    passes: tuple[Pass, ...]
    dense_bytes: int
    sparse_bytes: int
    swap: Json
    swap_text: str
    machine: Json
    date: str

    def to_json(self) -> Json:
        """What json.dumps takes."""
        return {key: value for key, value in asdict(self).items() if key != "swap_text"}

    def __str__(self) -> str:
        rows = [("tokens", "dense", "sparse", "speed-up", "logits differ by")]
        for each in self.passes:
            times = (str(each.dense), str(each.sparse), str(each.speedup))
            rows.append((str(each.tokens), *times, f"{each.difference:.1e}"))
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        facts = self.machine
        size = f"model: {self.dense_bytes / 1e6:.1f} MB -> {self.sparse_bytes / 1e6:.1f} MB"
        where = f"{facts['gpu'] or facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, {self.date}"
        return "\n".join([*lines, size, self.swap_text, where])


def compare_end_to_end(
    model: nn.Module,
    tokens: Sequence[int] = (1, 4, 16),
    seconds: float = 60.0,
    plan: Plan | Unmeasured | None = None,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], object] | None = None,
) -> EndToEnd:
    """Time `model`, a causal language model whose linear layers hold zeros, as it is and with sparse layers.

    tokens   of the forward passes; a layer is swapped when sparse is faster at each of them
    seconds  for the timings together, the swap not counted
    plan     what decides about each layer; None measures

    `model` is left as it is. Raises ValueError for no tokens, RuntimeError when the logits disagree.
    """
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be one or more positive numbers, got {list(tokens)}")
    sparse = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    report = sparsify(sparse, tokens=tokens, plan=plan)
    passes = []
    with evaluating(model), evaluating(sparse):
        for done, count in enumerate(tokens, 1):
            ids = _random_ids(model, count)
            difference = check_logits(logits(model, ids), logits(sparse, ids), count)
            variants = {
                DENSE: lambda _, ids=ids: logits(model, ids),
                SPARSE: lambda _, ids=ids: logits(sparse, ids),
            }
            timed = alternate(variants, rounds, seconds / len(tokens), device_of(model))
            latencies = (timed.latency(DENSE), timed.latency(SPARSE))
            passes.append(Pass(count, *latencies, timed.ratio(DENSE, SPARSE), difference))
            if progress:
                progress(done, len(tokens))
    return EndToEnd(
        passes=tuple(passes),
        dense_bytes=weight_bytes(model),
        sparse_bytes=weight_bytes(sparse),
        swap=report.to_json(),
        swap_text=str(report),
        machine=machine(),
        date=datetime.now(timezone.utc).date().isoformat(),
    )


def check_logits(dense: Tensor, sparse: Tensor, tokens: int, whose: str = "sparse and dense") -> float:
    """The relative difference of the logits. Raises RuntimeError when rounding does not explain it."""
    allowed = LARGEST_DIFFERENCE[dense.dtype]
    dense, sparse = dense.double(), sparse.double()
    difference = float((sparse - dense).square().mean().sqrt() / dense.square().mean().sqrt())
    # NaN is not within anything
    if not difference <= allowed:
        raise RuntimeError(f"logits of {tokens} tokens, {whose}, differ by {difference:.2g}, allowed is {allowed}")
    return difference


def _random_ids(model: nn.Module, tokens: int) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(vocabulary, (tokens,), generator=generator).to(device_of(model))
