"""figures: speed-ups of the layers against the number of tokens, and the whole model's tokens a second."""

from pathlib import Path

from card.targets import Json

COLOURS = {"2:4": "tab:blue", "50%": "tab:green", "60%": "tab:olive", "70%": "tab:orange"}
LINES = {"cuSPARSELt": ":", "cusparselt": "-.", "cuda_expanded": "--"}


def draw(data: Json, path: Path) -> list[Path]:
    """The PNG files that the rows are enough for, named after `path`."""
    if data["tiny"]:
        return []
    made = []
    for stage in dict.fromkeys(row["stage"] for row in data["rows"] if row["stage"].startswith("layers")):
        rows = [row for row in data["rows"] if row["stage"] == stage and row.get("speedup")]
        if rows:
            made.append(path.with_name(f"{path.stem}-{stage.removeprefix('layers ')}.png"))
            layers(rows, data["where"], made[-1])
    rows = [row for row in data["rows"] if row["stage"] == "model" and row.get("speedup")]
    if rows:
        made.append(path.with_name(f"{path.stem}-model.png"))
        model(rows, data["where"], made[-1])
    return made


def layers(rows: list[Json], where: Json, path: Path) -> None:
    """A panel for each shape: how many times faster than F.linear each variant is."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row["out_features"], row["in_features"]) for row in rows))
    figure = Figure(figsize=(5 * len(shapes), 4.4), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
    for axes, shape in zip(panels, shapes, strict=True):
        here = [row for row in rows if (row["out_features"], row["in_features"]) == shape]
        for name in dict.fromkeys(name for row in here for name in row["speedup"]):
            label, _, kernel = name.partition(" ")
            points = [(row["tokens"], ratio) for row in here if (ratio := row["speedup"].get(name, {}).get("median"))]
            if points:
                style = LINES.get(kernel, "-")
                axes.plot(*zip(*sorted(points), strict=True), style, marker=".", color=COLOURS.get(label), label=name)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_title(f"{shape[0]} x {shape[1]}")
    panels[0].set_ylabel("times faster than cuBLAS")
    panels[0].set_ylim(bottom=0)
    panels[-1].legend(fontsize="x-small")
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['dtype']}, {where['gpu']}, {where['date']}")
    figure.savefig(path, dpi=110)


def model(rows: list[Json], where: Json, path: Path) -> None:
    """Tokens a second of the whole model, dense and by pattern, for decode and for prefill."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        here = [row for row in rows if row["pass"] == name]
        bars = {"dense": here[0]["tokens"] / here[0]["times"]["dense"]["median"]} if here else {}
        bars |= {row["pattern"]: row["tokens"] / row["times"]["sparse"]["median"] for row in here}
        drawn = axes.bar(list(bars), list(bars.values()), color=["grey", *[COLOURS.get(bar) for bar in bars][1:]])
        axes.bar_label(drawn, fmt="%.0f")
        axes.set_ylabel("tokens a second")
        axes.set_title(name)
    figure.suptitle(f"{rows[0]['model']}'s shape, random weights, {where['gpu']}, {where['date']}")
    figure.savefig(path, dpi=110)
