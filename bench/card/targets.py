"""targets: what is wanted of the kernels on a card, and what a run's rows say of it.

A target holds for a range of rows and is judged by the worst of them. Without a row it is not measured, and that is
what stands there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Json = dict
NOT_MEASURED = "not measured"
LARGE_BYTES = 100e6
# of the variants' names, those that are not kernels of ours
NOT_OURS = ("cusparselt", "cuSPARSELt", "cuda_expanded")


@dataclass(frozen=True)
class Target:
    """`values` yields a number for each row in the range, with where it stands; `at_least` or `at_most` bounds them."""

    what: str
    bound: float
    values: Callable[[list[Json]], Iterator[tuple[float, str]]]
    unit: str = "x"
    at_most: bool = False

    def verdict(self, rows: list[Json]) -> tuple[str, str]:
        """The worst value in words, and met, missed or not measured."""
        found = list(self.values(rows))
        if not found:
            return NOT_MEASURED, NOT_MEASURED
        worst, place = (max if self.at_most else min)(found)
        met = worst <= self.bound if self.at_most else worst >= self.bound
        count = f", worst of {len(found)} rows" if len(found) > 1 else ""
        return f"{_number(worst, self.unit)} ({place}{count})", "met" if met else "missed"

    @property
    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {_number(self.bound, self.unit)}"


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.0%}"
    return f"{value:.3g}{'' if unit == 'x' else ' '}{unit}"


def layers(rows: list[Json], most: int, least: int = 1, large: bool = False) -> Iterator[Json]:
    """The rows of layers with this many tokens; `large`: of dense weights of 100 MB and more."""
    for row in rows:
        if row["stage"].startswith("layers") and "times" in row and least <= row["tokens"] <= most:
            if not large or 2 * row["out_features"] * row["in_features"] >= LARGE_BYTES:
                yield row


def ours(row: Json, label: str) -> str | None:
    """The name of our fastest kernel for weights of this kind in a row; None without any."""
    names = [name for name in row["times"] if name.startswith(f"{label} ") and not name.endswith(NOT_OURS)]
    return min(names, key=lambda name: row["times"][name]["median"], default=None)


def place(row: Json) -> str:
    return f"{row['out_features']}x{row['in_features']}, {row['tokens']} token" + "s" * (row["tokens"] > 1)


def over_linear(label: str, most: int, least: int = 1, large: bool = False, shape: tuple | None = None):
    """F.linear's time over our kernel's."""

    def values(rows: list[Json]) -> Iterator[tuple[float, str]]:
        for row in layers(rows, most, least, large):
            name = ours(row, label)
            ratio = row["speedup"].get(name, {}).get("median") if name else None
            if ratio and shape in (None, (row["out_features"], row["in_features"])):
                yield ratio, place(row)

    return values


def over_library(label: str, most: int, least: int = 1):
    """The time of cuSPARSELt's best algorithm over our kernel's."""

    def values(rows: list[Json]) -> Iterator[tuple[float, str]]:
        for row in layers(rows, most, least):
            name, library = ours(row, label), row["times"].get(f"{label} cuSPARSELt")
            if name and library:
                yield library["median"] / row["times"][name]["median"], place(row)

    return values


def share_of_floor(label: str, most: int):
    """The bytes that must be read and written, a second, over the copy's: large weights only."""

    def values(rows: list[Json]) -> Iterator[tuple[float, str]]:
        copied = rate(rows, "copy")
        for row in layers(rows, most, large=True) if copied else ():
            if name := ours(row, label):
                yield row["bytes"][name] / row["times"][name]["median"] / copied, place(row)

    return values


def rate(rows: list[Json], name: str) -> float | None:
    """A ceiling of this run: bytes or operations a second."""
    for row in rows:
        if row["stage"] == "ceilings" and name in row.get("times", {}):
            return row["work"][name] / row["times"][name]["median"]
    return None


def solver(what: str, name: str, ratio: bool = False):
    """Seconds, or with `ratio` the column loop's time over it, of the solver's rows."""

    def values(rows: list[Json]) -> Iterator[tuple[float, str]]:
        for row in rows:
            if row["stage"] == "solver" and row.get("what") == what:
                if ratio and (median := row["speedup"].get(name, {}).get("median")):
                    yield median, row["pattern"]
                elif not ratio and name in row["times"]:
                    yield row["times"][name]["median"] * (1e6 if what == "block" else 1e3), row["pattern"]

    return values


def of_copy(*endings: str, stage: str = "conversions"):
    """A conversion's bytes a second over the copy's of the same run."""

    def values(rows: list[Json]) -> Iterator[tuple[float, str]]:
        copied = rate(rows, "copy")
        for row in rows if copied else ():
            if row["stage"] == stage and "times" in row:
                for name, latency in row["times"].items():
                    if name.endswith(endings) and not name.startswith("torch "):
                        at = f"{row['format']} {name}, {row['out_features']}x{row['in_features']}"
                        yield row["work"][name] / latency["median"] / copied, at

    return values


TARGETS = (
    Target("2:4 decode: of the byte floor, weights from 100 MB, to 32 tokens", 0.85, share_of_floor("2:4", 32), "%"),
    Target("2:4 decode over cuBLAS, weights from 100 MB, to 32 tokens", 1.5, over_linear("2:4", 32, large=True)),
    Target("2:4 decode over cuBLAS, 4096x4096, to 32 tokens", 1.3, over_linear("2:4", 32, shape=(4096, 4096))),
    Target("2:4 decode over cuSPARSELt's best, to 16 tokens", 1.3, over_library("2:4", 16)),
    Target("2:4 prefill over cuSPARSELt's best, from 2048 tokens", 0.95, over_library("2:4", 4096, 2048)),
    Target("2:4 prefill over cuBLAS, from 2048 tokens", 1.2, over_linear("2:4", 4096, 2048)),
    Target("sweep of a block of 4096 rows", 30.0, solver("block", "obs_sweep"), "us", at_most=True),
    Target("SparseGPT of a 4096x4096 layer", 5.0, solver("layer", "SparseGPT"), "ms", at_most=True),
    Target("SparseGPT over the column loop", 100.0, solver("layer", "SparseGPT", ratio=True)),
    Target("prune mask, pack, unpack: of the copy's bandwidth", 0.7, of_copy("prune mask", "pack", "to_dense"), "%"),
    Target(
        "the same, kernels by themselves: of the copy's bandwidth",
        0.7,
        of_copy("mask", "pack", "bits", "values", "fragments", stage="packing"),
        "%",
    ),
    Target("expand to dense: of the copy's bandwidth", 0.7, of_copy(" expand"), "%"),
    Target("50 % decode over cuBLAS, to 8 tokens", 1.2, over_linear("50%", 8)),
    Target("60 % decode over cuBLAS, to 8 tokens", 1.5, over_linear("60%", 8)),
    Target("70 % decode over cuBLAS, to 8 tokens", 2.0, over_linear("70%", 8)),
)
