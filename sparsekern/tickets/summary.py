"""summary: what the trainings of all seeds say together: mean and standard deviation, and tickets against the rest.

A difference is taken seed by seed, because a seed's networks share their first weights and batches. "Matches" means:
on the mean, no worse than the dense network by more than the standard deviation of the dense network over the seeds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from sparsekern.tickets.experiment import CONTROLS, SERIES, Cell
from sparsekern.tickets.problem import Problem

COLUMNS = {
    "ticket": "ticket",
    "late rewinding": "late",
    "learning-rate rewinding": "lr rewind",
    "fine-tuning": "fine-tuning",
    "random re-initialisation": "re-init",
    "random mask": "random mask",
    "one-shot": "one-shot",
}
# the paper's winning tickets
WINNING = (0.10, 0.20)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over the seeds; of a single one the deviation is 0."""

    mean: float
    sd: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0, len(values))


@dataclass(frozen=True)
class Row:
    """One series at one round, over the seeds."""

    series: str
    round: int
    remaining: float
    score: Spread
    last_score: Spread
    early_step: Spread


@dataclass(frozen=True)
class Difference:
    """The ticket's score minus another's, above zero where the ticket is better; `wins` of `seeds` seeds it is."""

    other: str
    round: int
    remaining: float
    score: Spread
    wins: int
    seeds: int


class Summary:
    """One network's trainings."""

    def __init__(self, problem: Problem, cells: Sequence[Cell]):
        self.problem = problem
        own = [cell for cell in cells if cell.network == problem.name]
        groups: dict[tuple[str, int], list[Cell]] = {}
        for cell in own:
            groups.setdefault((cell.series, cell.round), []).append(cell)
        self.rows = {key: _row(group) for key, group in groups.items()}
        self._by_seed = {(cell.series, cell.round, cell.seed): cell for cell in own}
        self.seeds = sorted({cell.seed for cell in own})

    @property
    def dense(self) -> Row:
        return self.rows["ticket", 0]

    def series(self, name: str) -> list[Row]:
        """Its rows, dense first where it has that."""
        return [row for (series, _), row in sorted(self.rows.items()) if series == name]

    def matches(self, row: Row) -> bool:
        """No worse than dense by more than its standard deviation."""
        return self._better(row.score.mean, self.dense.score.mean) >= -self.dense.score.sd

    def sparsest_match(self, series: str) -> Row | None:
        """The last pruned round that matches; None without one. Rounds before it may fall short, seeds being few."""
        return next((row for row in reversed(self.series(series)) if row.round and self.matches(row)), None)

    def difference(self, other: str, round: int) -> Difference:
        """The ticket against another series at the same number of weights."""
        pairs = [(self._by_seed["ticket", round, s], self._by_seed[other, round, s]) for s in self.seeds]
        differences = [self._better(ticket.score, control.score) for ticket, control in pairs]
        wins = sum(difference > 0 for difference in differences)
        return Difference(other, round, pairs[0][0].remaining, Spread.of(differences), wins, len(pairs))

    def differences(self) -> list[Difference]:
        """Against every other series at every round that both have."""
        others = [name for name in (*SERIES, *CONTROLS) if name != "ticket"]
        return [self.difference(name, row.round) for name in others for row in self.series(name) if row.round]

    def findings(self) -> Iterator[str]:
        """What the numbers say, in words, whichever way it went."""
        shown, dense = self._shown, self.dense
        yield f"dense: {self.problem.score} {shown(dense.score)}, stopped at step {_step(dense.early_step)}"
        for name in SERIES:
            row, pruned = self.sparsest_match(name), [row for row in self.series(name) if row.round]
            where = f"last at {row.remaining:.1%} of the weights ({shown(row.score)})" if row else "nowhere"
            matching = sum(map(self.matches, pruned))
            yield f"{name}: matches the dense network {where}, in {matching} of {len(pruned)} rounds"
        for row in self.series("ticket"):
            if WINNING[0] <= row.remaining <= WINNING[1]:
                verdict = "matches" if self.matches(row) else "falls short of"
                pace = self._pace(row)
                yield (
                    f"ticket at {row.remaining:.1%}: {shown(row.score)}, {verdict} dense; stopped at step "
                    f"{_step(row.early_step)}, {pace}"
                )
        for name in (*CONTROLS, "late rewinding", "learning-rate rewinding", "fine-tuning"):
            rounds = [row.round for row in self.series(name) if row.round in self.problem.controlled]
            parts = [self._against(self.difference(name, round)) for round in rounds]
            yield f"ticket against {name}: " + "; ".join(parts)

    def table(self) -> Table:
        """Scores at the step of early stopping, and the ticket's step, against what is left of the weights."""
        unit = " in %" if self._unit else ""
        title = (
            f"{self.problem.name}: {self.problem.score}{unit} on the test set, mean ± sd of {len(self.seeds)} seeds; "
            "step: the ticket's early stop"
        )
        table = Table("weights", title=title)
        for name in COLUMNS.values():
            table.add_column(name, justify="right")
        table.add_column("step", justify="right")
        for row in self.series("ticket"):
            at = [self.rows.get((name, row.round)) for name in COLUMNS]
            scores = ("" if one is None else self._bare(one.score) for one in at)
            table.add_row(f"{row.remaining:.1%}", *scores, _step(row.early_step))
        return table

    def to_json(self) -> dict[str, Any]:
        """What json.dumps takes."""
        return {
            **self.problem.settings,
            "rounds": self.problem.rounds,
            "seeds": self.seeds,
            "rows": [asdict(row) for row in self.rows.values()],
            "ticket minus others": [asdict(difference) for difference in self.differences()],
            "findings": list(self.findings()),
        }

    def _better(self, mine: float, other: float) -> float:
        return mine - other if self.problem.higher_is_better else other - mine

    @property
    def _unit(self) -> str:
        """An accuracy is shown in per cent."""
        return " %" if self.problem.higher_is_better else ""

    def _bare(self, spread: Spread) -> str:
        if self.problem.higher_is_better:
            return f"{100 * spread.mean:.1f} ± {100 * spread.sd:.1f}"
        digits = 2 if spread.mean < 10 else 1
        return f"{spread.mean:.{digits}f} ± {spread.sd:.{digits}f}"

    def _shown(self, spread: Spread) -> str:
        return self._bare(spread) + self._unit

    def _pace(self, row: Row) -> str:
        steps = [
            self._by_seed["ticket", row.round, seed].early_step - self._by_seed["ticket", 0, seed].early_step
            for seed in self.seeds
        ]
        mean = fmean(steps)
        return f"{abs(mean):.0f} {'later' if mean > 0 else 'earlier'} than dense" if mean else "as soon as dense"

    def _against(self, difference: Difference) -> str:
        unit = 100 if self.problem.higher_is_better else 1
        score = difference.score
        return (
            f"{unit * score.mean:+.2f} ± {unit * score.sd:.2f}{self._unit} at {difference.remaining:.1%} "
            f"({difference.wins} of {difference.seeds} seeds)"
        )


def summaries(problems: Sequence[Problem], cells: Sequence[Cell]) -> Mapping[str, Summary]:
    """One for each network."""
    return {problem.name: Summary(problem, cells) for problem in problems}


def _row(cells: Sequence[Cell]) -> Row:
    first = cells[0]
    return Row(
        first.series,
        first.round,
        first.remaining,
        Spread.of(cell.score for cell in cells),
        Spread.of(cell.last_score for cell in cells),
        Spread.of(cell.early_step for cell in cells),
    )


def _step(spread: Spread) -> str:
    return f"{spread.mean:.0f} ± {spread.sd:.0f}"
