"""figure: score and early stop against what is left of the weights, on a log axis from all to few, as in the papers."""

from collections.abc import Mapping
from pathlib import Path

from sparsekern.tickets.experiment import CONTROLS, SERIES
from sparsekern.tickets.summary import Row, Summary

LABELS = {"ticket": r"ticket, rewound to $\theta_0$", "late rewinding": r"late rewinding, $\theta_k$"}
STYLES = {
    "ticket": ("C0", "o-"),
    "late rewinding": ("C1", "s-"),
    "learning-rate rewinding": ("C2", "^-"),
    "fine-tuning": ("C4", "v-"),
    "random re-initialisation": ("C3", "o--"),
    "random mask": ("C7", "x--"),
    "one-shot": ("C5", "d:"),
}


def plot(found: Mapping[str, Summary], path: Path) -> None:
    """Two panels a network in the PNG file `path`; bars are one standard deviation over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6 * len(found)), layout="constrained")
    for summary, axes in zip(found.values(), figure.subplots(len(found), 2, squeeze=False), strict=True):
        score, step = axes
        _draw(summary, score, "score", (*SERIES, *CONTROLS))
        # where the weights stay, training begins at its end
        _draw(summary, step, "early_step", ("ticket", "late rewinding", *CONTROLS))
        problem = summary.problem
        score.set(ylabel=f"test {problem.score} at the early stop", title=f"{problem.name}, {len(summary.seeds)} seeds")
        step.set(ylabel="step of the early stop", title="lowest validation loss")
        if problem.higher_is_better:
            score.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            # what collapses would flatten everything else
            worst = min(row.score.mean - row.score.sd for row in summary.series("ticket"))
            score.set_ylim(max(worst - 0.08, 0), 1)
        else:
            score.set_yscale("log")
            score.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            score.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        score.legend(fontsize="small", loc="lower left" if problem.higher_is_better else "upper left")
    figure.savefig(path, dpi=120)


def _draw(summary: Summary, axes, what: str, series: tuple[str, ...]) -> None:
    dense = getattr(summary.dense, what)
    axes.axhline(dense.mean, color="black", linewidth=0.8)
    axes.axhspan(dense.mean - dense.sd, dense.mean + dense.sd, color="black", alpha=0.08)
    for name in series:
        rows: list[Row] = summary.series(name)
        if not rows:
            continue
        colour, style = STYLES[name]
        spreads = [getattr(row, what) for row in rows]
        axes.errorbar(
            [100 * row.remaining for row in rows],
            [spread.mean for spread in spreads],
            [spread.sd for spread in spreads],
            fmt=style,
            color=colour,
            markersize=4,
            linewidth=1.2,
            elinewidth=0.7,
            capsize=2,
            label=LABELS.get(name, name),
        )
    ticks = [100 * row.remaining for row in summary.series("ticket")]
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(ticks[:: 1 if len(ticks) < 12 else 2], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_xlabel("% of the weights that are left")
