"""report: what pruning did to a model, layer by layer, and how a run that goes on says again what was said before."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from sparsekern.finishing import BlockReport


@dataclass(frozen=True)
class LayerReport:
    """What pruning did to one layer.

    error           ||X (W - W')^T|| / ||X W^T|| on the calibration tokens, None without statistics
    held_out_error  the same on tokens that the method did not see
    damping         what the factorisation of H took, None where none was needed
    retries         how often that had to be raised, ten times each time, before H could be factored
    dead_inputs     inputs that were zero on every token
    fallback        what the statistics of an expert with too few tokens are made of; None: of its own tokens alone
    """

    name: str
    out_features: int
    in_features: int
    sparsity: float
    error: float | None
    held_out_error: float | None
    damping: float | None
    dead_inputs: int | None
    seconds: float
    fallback: str | None = None
    retries: int | None = None


@dataclass
class PruneReport:
    """What pruning did to a model: `layers` in order, `skipped` ones with the reason, `blocks` that were finished.

    calibration  how it went: replay, or prefix and why
    finish       what the blocks were finished by, None for nothing
    grid         the integers that kept weights were moved to, and how they are stored; None for none
    """

    method: str
    pattern: str
    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    calibration: str = "none"
    seconds: float = 0.0
    blocks: list[BlockReport] = field(default_factory=list)
    finish: str | None = None
    grid: str | None = None

    @property
    def sparsity(self) -> float:
        """Over all pruned layers, by weights."""
        sizes = [layer.out_features * layer.in_features for layer in self.layers]
        zeros = [layer.sparsity * size for layer, size in zip(self.layers, sizes, strict=True)]
        return sum(zeros) / max(sum(sizes), 1)

    @property
    def held_out_error(self) -> float | None:
        """The mean over the layers."""
        errors = [layer.held_out_error for layer in self.layers if layer.held_out_error is not None]
        return sum(errors) / len(errors) if errors else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sparsity": self.sparsity, "held_out_error": self.held_out_error}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "PruneReport":
        """What `to_json` returned."""
        own = {field.name: facts[field.name] for field in fields(cls)}
        own["layers"] = [LayerReport(**row) for row in own["layers"]]
        own["blocks"] = [BlockReport(**row) for row in own["blocks"]]
        own["skipped"] = [(name, reason) for name, reason in own["skipped"]]
        return cls(**own)

    def __str__(self) -> str:
        error = f", held-out error {self.held_out_error:.4f} a layer" if self.held_out_error is not None else ""
        raised = sum(bool(layer.retries) for layer in self.layers)
        error += f", {raised} layers needed more damping" if raised else ""
        borrowed = sum(layer.fallback is not None for layer in self.layers)
        error += f", {self.grid}" if self.grid else ""
        error += f", {sum(block.kept for block in self.blocks)} blocks finished" if self.blocks else ""
        error += f", {borrowed} experts fell back" if borrowed else ""
        return (
            f"{self.method} {self.pattern}: {len(self.layers)} layers, sparsity {self.sparsity:.2%}{error}, "
            f"{len(self.skipped)} skipped, {self.seconds:.1f} s"
        )


class Told:
    """What a report says of one block: taken out when it is over, put in again when a run goes on."""

    def __init__(self, report: PruneReport):
        self._parts = {"layers": LayerReport, "blocks": BlockReport, "skipped": lambda name, reason: (name, reason)}
        self._report = report
        self._said = self._lengths()

    def since(self) -> dict[str, list]:
        """What was said since the last call, as JSON can hold it."""
        new = {part: getattr(self._report, part)[self._said[part] :] for part in self._parts}
        self._said = self._lengths()
        return {part: [asdict(row) if is_dataclass(row) else list(row) for row in rows] for part, rows in new.items()}

    def again(self, told: Mapping[str, list]) -> int:
        """Say what `since` returned; the number of layers in it."""
        for part, rows in told.items():
            make = self._parts[part]
            made = [make(**row) if isinstance(row, dict) else make(*row) for row in rows]
            getattr(self._report, part).extend(made)
        self._said = self._lengths()
        return len(told["layers"])

    def _lengths(self) -> dict[str, int]:
        return {part: len(getattr(self._report, part)) for part in self._parts}
