"""preview(): what prune() would do to a model, without doing it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sparsekern import hf
from sparsekern.measure import weight_bytes
from sparsekern.oneshot import select
from sparsekern.pattern import Pattern
from sparsekern.residence import InMemory
from sparsekern.stats import GradSquare


@dataclass(frozen=True)
class Preview:
    """What would be pruned and what that would cost and buy.

    layers            name, shape and number of weights that would become zero
    skipped           name and reason
    statistics_bytes  the most that the statistics of one decoder block can take, if all its inputs are distinct; of a
                      method that reads gradients, one number for every weight to be pruned
    output_bytes      of the checkpoint: zeros are stored
    packed_bytes      of the model with its pruned layers packed as bitmaps
    decode_ceiling    how much faster the pruned layers could read their weights at 1 token, by bytes; not measured
    """

    layers: list[tuple[str, tuple[int, int], int]]
    skipped: list[tuple[str, str]]
    statistics_bytes: int
    output_bytes: int
    packed_bytes: int
    decode_ceiling: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(name) for name, *_ in (*self.layers, *self.skipped))
        rows = [f"{name:{width}}  {out} x {in_}: {zeros:,} zeros" for name, (out, in_), zeros in self.layers]
        rows += [f"{name:{width}}  stays dense: {reason}" for name, reason in self.skipped]
        return "\n".join(
            [
                *rows,
                f"statistics: at most {self.statistics_bytes / 1e6:,.1f} MB at a time",
                f"checkpoint: {self.output_bytes / 1e6:,.1f} MB, zeros are stored; "
                f"packed {self.packed_bytes / 1e6:,.1f} MB",
                f"speed-up of the pruned layers at 1 token: at most {self.decode_ceiling:.2f}x, by bytes, not measured",
            ]
        )


def preview(
    model: nn.Module,
    pattern: Pattern,
    skip: Iterable[str] = (),
    method: Any = None,
    residence: InMemory | None = None,
) -> Preview:
    """What prune() would do by `method`; None: by any that reads inputs. Raises ValueError where prune() would.

    residence  where the weights are; None: in memory
    """
    layers, skipped = select(model, pattern, skip, method, residence)
    weights = {name: hf.weight(layer) for name, layer in layers}
    # transformers' Conv1D is pruned, and no SparseLinear takes its place
    packable = [hf.weight(layer) for _, layer in layers if type(layer) is nn.Linear]
    dense = sum(weight.nbytes for weight in packable)
    # the kept values and one bit a weight (formats/bitmap.py; the row offsets do not show)
    packed = sum(weight.nbytes * (1 - pattern.sparsity) + weight.numel() / 8 for weight in packable)
    # two float32 matrices an input: the calibration tokens' and the held-out ones'
    every = {name: hf.weight(layer) for name, layer in hf.layers(model)}
    statistics = max(
        sum(2 * 4 * weight.shape[1] ** 2 for name, weight in every.items() if name.startswith(f"{block}."))
        for block, _ in hf.blocks(model)
    )
    if method is not None and method.needs is GradSquare:
        statistics = sum(4 * weight.numel() for weight in weights.values())
    size = weight_bytes(model)
    return Preview(
        layers=[(n, tuple(w.shape), round(pattern.sparsity * w.numel())) for n, w in weights.items()],
        skipped=skipped,
        statistics_bytes=statistics,
        output_bytes=size,
        packed_bytes=round(size - dense + packed),
        decode_ceiling=dense / packed if packed else 1.0,
    )
