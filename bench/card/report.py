"""report: a run's rows as text: a line each while it runs, a block for the README, and a page with every number."""

from collections.abc import Iterator
from pathlib import Path

from card.figures import draw
from card.targets import NOT_MEASURED, TARGETS, Json, rate

BASELINE = "F.linear"
MODEL_PATTERNS = ("2:4", "50%", "60%", "70%")
# in the block; the page has all of them
MOST_ERRORS = 12


def line(row: Json) -> str:
    """A row as it is printed while the run goes on."""
    name = " ".join(str(row[key]) for key in ("stage", "what", "case", "pass") if key in row)
    if "tokens" in row:
        name += f", {row['tokens']} tokens"
    for key in ("error", "left_out"):
        if key in row:
            return f"{name}: {key.replace('_', ' ')}: {row[key]}"
    if "times" not in row:
        return f"{name}: " + ", ".join(f"{key} {row[key]}" for key in row if key not in ("stage", "what", "skips"))
    times = [f"{variant} {_time(latency)}" for variant, latency in row["times"].items()]
    errors = [f"{variant}: {reason}" for variant, reason in row["errors"].items()]
    return f"{name}: {', '.join(times) or NOT_MEASURED}" + (f" [{'; '.join(errors)}]" if errors else "")


def block(data: Json | None) -> str:
    """What is wanted and what was measured, and the whole model: for the README. None: no card has measured it yet."""
    rows = data["rows"] if data and not data["tiny"] else []
    lines = [f"{_where(data)}\n" if rows else "No card has measured this yet.\n"]
    lines += ["| on a card | wanted | measured | |", "|---|---:|---|---|"]
    for target in TARGETS:
        value, verdict = target.verdict(rows)
        lines.append(f"| {target.what} | {target.wanted} | {value} | {'' if verdict == value else verdict} |")
    lines += ["", "| Llama-3-8B's shape, tokens a second | decode | prefill |", "|---|---:|---:|"]
    passes = {(row["pattern"], row["pass"]): row for row in rows if row["stage"] == "model" and row.get("times")}
    for pattern in ("dense", *MODEL_PATTERNS):
        cells = [_tokens_a_second(passes, pattern, name) for name in ("decode", "prefill")]
        lines.append(f"| {pattern} | {' | '.join(cells)} |")
    failed = list(dict.fromkeys(errors(rows)))
    more = [f"- and {len(failed) - MOST_ERRORS} more"] * (len(failed) > MOST_ERRORS)
    return "\n".join([*lines, *(["", "What failed:", ""] if failed else []), *failed[:MOST_ERRORS], *more])


def errors(rows: list[Json]) -> Iterator[str]:
    """A line for each row that is an error, and for each variant of a row that has one."""
    for row in rows:
        name = " ".join(str(row[key]) for key in ("stage", "case", "what") if key in row)
        for variant, reason in ({"": row["error"]} if "error" in row else row.get("errors", {})).items():
            # "NAME, captured" was timed as it is launched
            first = str(reason).partition("\n")[0]
            if not variant.endswith(", captured"):
                yield f"- {name}{', ' * bool(variant)}{variant}: {first[:200]}"


def page(data: Json) -> str:
    """Every number of a run, as Markdown."""
    rows = data["rows"]
    parts = [f"# {data['where']['gpu'] or 'no card'}, {data['where']['date']}", "", *_facts(data), ""]
    if data["tiny"]:
        parts += ["A tiny run: it shows that every stage runs, and measures nothing.", ""]
    parts += [block(data), "", "## The build, the tests, compute-sanitizer", ""]
    parts += [f"- {line(row)}" for row in rows if row["stage"] in ("build", "tests", "sanitizer")]
    parts += ["", "## Ceilings", "", *_ceilings(rows), ""]
    for stage in dict.fromkeys(row["stage"] for row in rows if "out_features" in row and "tokens" in row):
        parts += [f"## {stage}", "", CELLS, "", *_layers([row for row in rows if row["stage"] == stage], rows)]
    parts += [*_factored(rows), "## Conversions, the solver, the model", ""]
    parts += [f"- {line(row)}" for row in rows if row["stage"] in ("conversions", "packing", "solver", "model")]
    missing = [row for row in rows if "error" in row or "left_out" in row]
    parts += ["", "## What has no number", "", *(f"- {line(row)}" for row in missing)]
    return "\n".join(parts) + "\n"


CELLS = (
    "us of a call, cold L2, median; times faster than F.linear in the same rounds (– is unsteady); share of the byte "
    "floor, which is what must be read and written at the speed of the copy. Fewer than 100 rounds: their number."
)


def write(data: Json, path: Path) -> list[Path]:
    """The page and the drawings beside the JSON file `path`."""
    text = path.with_suffix(".md")
    text.write_text(page(data), encoding="utf-8")
    return [text, *draw(data, path)]


def _where(data: Json) -> str:
    where = data["where"]
    versions = ", ".join(f"{name} {where.get(name)}" for name in ("driver", "cuda", "torch", "triton", "transformers"))
    return f"{where['gpu']}, {versions}, commit {where.get('commit') or 'unknown'}, {where['date']}."


def _facts(data: Json) -> Iterator[str]:
    yield _where(data)
    yield f"The run took {data['seconds']} s." if data["seconds"] else "The run was cut off."


def _tokens_a_second(passes: Json, pattern: str, name: str) -> str:
    if pattern == "dense":
        found = [(row, "dense") for (_, each), row in passes.items() if each == name and "dense" in row["times"]]
    else:
        row = passes.get((pattern, name))
        found = [(row, "sparse")] if row and "sparse" in row["times"] else []
    if not found:
        return NOT_MEASURED
    row, variant = found[0]
    text = f"{row['tokens'] / row['times'][variant]['median']:.0f}"
    if variant == "sparse":
        ratio = row["speedup"].get("sparse", {}).get("median")
        text += f", {ratio:.2f}x" if ratio else ", –"
        text += f" ({row['swapped']} of {row['swapped'] + row['stay_dense']} layers sparse)"
    return text


def _ceilings(rows: list[Json]) -> Iterator[str]:
    for name, unit, scale in (("copy", "TB/s", 1e12), ("read", "TB/s", 1e12), ("product", "TFLOP/s bf16", 1e12)):
        value = rate(rows, name)
        yield f"- {name}: " + (f"{value / scale:.2f} {unit}" if value else NOT_MEASURED)


def _factored(rows: list[Json]) -> Iterator[str]:
    """What ops/inverse_cholesky.py should take as the size of a corner on this card."""
    for row in rows:
        if row.get("what") == "inverse_cholesky" and "times" in row:
            yield from (f"## U of a {row['columns']}x{row['columns']} Hessian", "", "| | time |", "|---|---:|")
            for name in {**row["times"], **row["errors"]}:
                yield f"| {name} | {_time(row['times'][name]) if name in row['times'] else 'error'} |"
            fastest = min(row["times"], key=lambda name: row["times"][name]["median"], default=NOT_MEASURED)
            yield from ("", f"The fastest: {fastest}.", "")


def _layers(rows: list[Json], everything: list[Json]) -> Iterator[str]:
    copied = rate(everything, "copy")
    groups: dict[tuple[int, int], list[Json]] = {}
    for row in rows:
        if "times" in row:
            groups.setdefault((row["out_features"], row["in_features"]), []).append(row)
    for (out_features, in_features), group in groups.items():
        names = list(dict.fromkeys(name for row in group for name in row["bytes"]))
        yield f"{', '.join(group[0]['layers'])}: {out_features}x{in_features}"
        yield ""
        yield f"| tokens | {' | '.join(names)} |"
        yield "|---:|" + "---:|" * len(names)
        for row in sorted(group, key=lambda row: row["tokens"]):
            yield f"| {row['tokens']} | {' | '.join(_cell(row, name, copied) for name in names)} |"
        yield ""
        for name, reason in {k: why for row in group for k, why in {**row["refused"], **row["errors"]}.items()}.items():
            yield f"- {name}: {reason}"
        yield ""


def _cell(row: Json, name: str, copied: float | None) -> str:
    latency = row["times"].get(name)
    if latency is None:
        return "error" if name in row["errors"] else NOT_MEASURED
    parts = [_time(latency)]
    if name != BASELINE:
        ratio = row["speedup"].get(name, {}).get("median")
        parts.append(f"{ratio:.2f}x" if ratio else "–")
    if copied:
        parts.append(f"{row['bytes'][name] / latency['median'] / copied:.0%}")
    return " ".join(parts)


def _time(latency: Json) -> str:
    seconds, few = latency["median"], latency["rounds"]
    text = f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
    return ("" if latency["steady"] else "~") + text + (f" ({few})" if few < 100 else "")
