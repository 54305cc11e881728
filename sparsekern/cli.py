"""The commands. Each is a thin door to the package: it reads arguments, calls, prints a table or JSON."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from typer.core import TyperGroup

from sparsekern import demo as demo_run
from sparsekern import doctor as doctor_facts
from sparsekern import hf, shapes, text
from sparsekern.allocation import CANDIDATES, allocate
from sparsekern.card import model_card
from sparsekern.endtoend import compare_end_to_end
from sparsekern.finishing import Finish
from sparsekern.inspect import inspect as inspect_checkpoint
from sparsekern.measure import Perplexity
from sparsekern.measure import perplexity as measure_perplexity
from sparsekern.methods import GPTQ, METHODS, Refine, SparseGPT
from sparsekern.oneshot import PruneReport
from sparsekern.oneshot import prune as prune_model
from sparsekern.pattern import NM, as_pattern
from sparsekern.permute import permute as permute_model
from sparsekern.preview import preview
from sparsekern.speed import measure_speed
from sparsekern.speed import plot as plot_speed
from sparsekern.stats import GradSquare

BAD_INPUT = 2
WIDTH = 120
SEQLEN = 2048  # what published perplexities are measured at
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class _Commands(TyperGroup):
    """Bad input is one line on standard error and exit code 2; anything else is a bug and shows its traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, hf.UnknownModelError, torch.linalg.LinAlgError) as error:
            Console(stderr=True, soft_wrap=True).print("error:", str(error), style="red", markup=False, highlight=False)
            sys.exit(BAD_INPUT)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Prune a model, pack it, swap its Linear layers for sparse ones, and measure what became faster.",
)

Model = Annotated[str, typer.Argument(help="directory of a checkpoint, or its name on the hub")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]
Seqlen = Annotated[int | None, typer.Option(help="tokens a window; 2048, or the model's positions if fewer")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: the checkpoint's own")]


@app.command(epilog="Example: `sparsekern prune MODEL --pattern 2:4 --calibration text.txt -o OUT`")
def prune(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to write; must not exist")],
    calibration: Annotated[str | None, typer.Option(help="text file, or dataset name[:config[:split]]")] = None,
    method: Annotated[str, typer.Option(help=" | ".join(METHODS))] = "admm",
    pattern: Annotated[str, typer.Option(help='"2:4", any N:M, or a sparsity: 0.5, "60%"')] = "2:4",
    scope: Annotated[
        str | None,
        typer.Option(help="where weights compete at a sparsity: row, block, layer or model; else the method's"),
    ] = None,
    samples: Annotated[int, typer.Option(help="calibration windows")] = 128,
    seqlen: Seqlen = None,
    seed: Annotated[int, typer.Option(help="which windows are drawn")] = 0,
    refine: Annotated[int, typer.Option(help="least-squares steps on the weights that the method kept")] = 0,
    finish: Annotated[int, typer.Option(help="passes that fit each block's output when its layers are pruned")] = 0,
    bits: Annotated[
        int | None,
        typer.Option(help="4 or 8: kept weights move to integers; sparsegpt's in its sweep, others' by GPTQ"),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="inputs that share a scale, with --bits; else a row's")] = None,
    skip: Annotated[list[str] | None, typer.Option(help='layers to leave dense, with wildcards: "*.down_proj"')] = None,
    permute: Annotated[
        bool, typer.Option("--permute", help="first reorder channels so that N:M loses less; outputs stay the same")
    ] = False,
    allocation: Annotated[
        str, typer.Option(help=f"uniform, or unequal where that lowers a held-out loss: {' | '.join(CANDIDATES)}")
    ] = "uniform",
    heldout: Annotated[str | None, typer.Option(help="text to measure perplexity on, before and after")] = None,
    dtype: Dtype = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")] = False,
    as_json: AsJson = False,
):
    """Prune MODEL and write a checkpoint that plain transformers loads; its pruned weights are zeros."""
    settings, wanted = _method(method, refine, bits, group_size), as_pattern(pattern)
    fitting = Finish(finish) if finish else None
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{str(output)!r} exists already; remove it or choose another directory")
    if (above := next(parent for parent in output.absolute().parents if parent.exists())).is_file():
        raise NotADirectoryError(f"{str(output)!r} cannot be made: {str(above)!r} is a file")
    if permute and not isinstance(wanted, NM):
        raise ValueError(f"--permute helps N:M patterns only, got --pattern {pattern}")
    if allocation not in ("uniform", *CANDIDATES):
        raise ValueError(f"allocation must be one of uniform, {', '.join(CANDIDATES)}, got {allocation!r}")
    for flag, value in (("--allocation", allocation if allocation != "uniform" else None), ("--scope", scope)):
        if value is not None and isinstance(wanted, NM):
            raise ValueError(f"{flag} {value} needs a sparsity, got --pattern {pattern}")
    if scope is not None:
        wanted = replace(wanted, scope=scope)
    if finish and bits is not None:
        raise ValueError("--finish would move weights off the grid of --bits; leave one of the two out")
    if finish and settings.needs is GradSquare:
        raise ValueError(f"--finish needs a method that reads what each layer is given, and {method} reads gradients")
    needing = {f"method {method}": METHODS[method].needs, "--refine": refine, "--bits": bits, "--finish": finish}
    needing |= {"--permute": permute, f"--allocation {allocation}": allocation != "uniform"}
    if calibration is None and any(needing.values()):
        what = next(what for what, asked in needing.items() if asked)
        raise ValueError(f"{what} needs --calibration: a text file or a dataset name")
    source = _load(model, dtype)
    tokenizer, seqlen = hf.tokenizer(model), _window(source, seqlen)
    batches = None
    if calibration is not None:
        batches = text.windows(_tokens(tokenizer, calibration), seqlen, samples, seed)
    test = _tokens(tokenizer, heldout) if heldout is not None else None
    # refuses what prune() would, before anything takes its time
    planned = preview(source, wanted, skip or [], settings)
    if dry_run:
        _print(planned.to_json(), as_json, lambda _: [str(planned), "nothing was written"])
        return

    perplexity = {"before": _perplexity(source, test, seqlen, "dense perplexity")} if heldout is not None else None
    permuted = permute_model(source, wanted, batches, seed=seed, progress=not as_json) if permute else None
    allocated = None
    if allocation != "uniform":
        compared = {"candidates": CANDIDATES[allocation], "skip": skip or [], "progress": not as_json}
        allocated = allocate(source, settings, wanted, batches, **compared)
        wanted = allocated.patterns
    report = prune_model(source, settings, wanted, batches, finish=fitting, skip=skip or [], progress=not as_json)
    if perplexity is not None:
        perplexity["after"] = _perplexity(source, test, seqlen, "pruned perplexity")

    described = f"{samples} windows of {seqlen} tokens of {_name(calibration)}, seed {seed}" if batches else "none"
    facts = _provenance(model)
    command = shlex.join(["sparsekern", *sys.argv[1:]])
    figures = None if perplexity is None else {name: value.to_json() for name, value in perplexity.items()}
    result = {"command": command, **facts, "calibration": described, "perplexity": figures, "report": report.to_json()}
    first = {name: done for name, done in (("permuted", permuted), ("allocated", allocated)) if done is not None}
    result |= {name: done.to_json() for name, done in first.items()}
    files = {
        "README.md": model_card(_name(model), command, report, described, perplexity, facts, first.values()),
        "sparsekern.json": json.dumps(result, indent=1),
    }
    hf.save(source, tokenizer, output, files)
    _print(
        result,
        as_json,
        lambda _: [*map(str, first.values()), *_prune_tables(report, perplexity), f"wrote {output}"],
    )


@app.command("eval", epilog="Example: `sparsekern eval OUT --text heldout.txt`")
def evaluate(
    model: Model,
    text_source: Annotated[str, typer.Option("--text", help="text file, or dataset name[:config[:split]]")],
    seqlen: Seqlen = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
):
    """The perplexity of MODEL on a text, by the protocol that the papers compare by."""
    tokens, source = _tokens(hf.tokenizer(model), text_source), _load(model, dtype)
    result = _perplexity(source, tokens, _window(source, seqlen), "perplexity")
    lines = [f"perplexity {result}", f"protocol: {result.protocol}"]
    _print({"model": model, **result.to_json()}, as_json, lambda _: lines)


@app.command(epilog="Example: `sparsekern inspect OUT`")
def inspect(
    directory: Annotated[Path, typer.Argument(help="directory of a checkpoint")],
    as_json: AsJson = False,
):
    """Sparsity, pattern and packed size of every matrix of a checkpoint."""
    reports = inspect_checkpoint(directory)

    def tables(_):
        table = Table("matrix", "shape", "dtype", "sparsity", "pattern", "MB", "packed MB")
        for r in reports:
            shape, sizes = f"{r.shape[0]} x {r.shape[1]}", (f"{r.bytes / 1e6:.2f}", f"{r.packed_bytes / 1e6:.2f}")
            table.add_row(r.name, shape, r.dtype, f"{r.sparsity:.2%}", r.pattern, *sizes)
        total, packed = sum(r.bytes for r in reports), sum(r.packed_bytes for r in reports)
        return [table, f"{len(reports)} matrices, {total / 1e6:.2f} MB; packed {packed / 1e6:.2f} MB"]

    _print([report.to_json() for report in reports], as_json, tables)


@app.command(epilog="Example: `sparsekern doctor`")
def doctor(as_json: AsJson = False):
    """What was built, which kernels this machine can use, and why the others refuse."""

    def tables(facts):
        about = Table("what", "", title="machine")
        for name, value in {**facts["machine"], **facts["libraries"]}.items():
            about.add_row(name, "–" if value is None else ", ".join(value) if isinstance(value, list) else str(value))
        modules = Table("module", "", title="compiled")
        for name, reason in facts["modules"].items():
            modules.add_row(f"sparsekern._{name}", reason or "loaded")
        if facts["instruction_set"]:
            modules.add_row("CPU kernels", facts["instruction_set"])
        kernels = Table("device", "format", "dtype", "kernel", "", title="kernels of a linear layer, best first")
        for row in facts["kernels"]:
            verdict = "used" if row["used"] else row["refusal"] or "serves, not needed"
            kernels.add_row(row["device"], row["format"], row["dtype"], row["kernel"], verdict)
        return [about, modules, kernels]

    _print(doctor_facts.examine(), as_json, tables)


@app.command(epilog="Example: `sparsekern bench OUT` or `sparsekern bench --config llama-3.2-1b --sparsity 0.5`")
def bench(
    model: Annotated[
        str | None, typer.Argument(help="directory of a pruned checkpoint, or its name on the hub")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help=f"random weights in real shapes: {' | '.join(shapes.MODELS)}")
    ] = None,
    sparsity: Annotated[float, typer.Option(help="of the random weights, with --config")] = 0.5,
    tokens: Annotated[str, typer.Option(help="numbers of tokens to time, comma separated")] = "1,4,16",
    dtype: Dtype = "bfloat16",
    seconds: Annotated[float, typer.Option(help="to spend on the timings")] = 100.0,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw the speed-up into, with --config")] = None,
    as_json: AsJson = False,
):
    """Time a pruned MODEL sparse against dense, or the linear layers of a real-size model with random weights."""
    if (model is None) == (config is None):
        raise ValueError("bench takes either MODEL or --config, and exactly one of them")
    try:
        counts = tuple(int(count) for count in tokens.split(","))
    except ValueError:
        raise ValueError(f"tokens must be numbers like 1,4,16, got {tokens!r}") from None
    if plot is not None and config is None:
        raise ValueError("--plot goes with --config")
    if config is None:
        pruned = _load(model, dtype)
        with _bar(f"{model}: timing") as update:
            compared = compare_end_to_end(pruned, counts, seconds, progress=update)
        _print(compared.to_json(), as_json, lambda _: [str(compared)])
        return
    shape, kind = shapes.find(config), _dtype(dtype) or torch.bfloat16
    with _bar(f"{config}: timing") as update:
        speed = measure_speed(shape, sparsity, counts, dtype=kind, seconds=seconds, progress=update)
    if plot is not None:
        plot_speed(speed, plot)
    _print(speed.to_json(), as_json, lambda _: [speed.table()])


@app.command(epilog="Example: `sparsekern demo`")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="directory for demo.json and demo.png")] = Path("demo"),
    speed_seconds: Annotated[float, typer.Option(help="to spend on timing the layers of a real-size model")] = 100.0,
    windows: Annotated[int | None, typer.Option(help="held-out windows for the perplexity; all when not given")] = None,
    as_json: AsJson = False,
):
    """Prune the model that ships with the package, swap it, and time layers of a real size; no network needed."""
    if speed_seconds <= 0 or (windows is not None and windows < 1):
        raise ValueError(f"speed-seconds and windows must be positive, got {speed_seconds} and {windows}")
    hf.quiet()
    with _bar("load") as update:
        result = demo_run.run(lambda what, done, all: update(done, all, what), speed_seconds, windows)
    output.mkdir(parents=True, exist_ok=True)
    (output / "demo.json").write_text(json.dumps(result.to_json(), indent=1))
    demo_run.plot(result, output / "demo.png")
    _print(result.to_json(), as_json, lambda _: [*result.tables(), f"wrote {output}/demo.json and {output}/demo.png"])


def _print(result: Any, as_json: bool, tables: Callable[[Any], list[Any]]) -> None:
    """JSON alone, or what `tables` makes of the result."""
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    # a pipe or a file has no width of its own, and the tables need more than the 80 columns that rich assumes
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for part in tables(result):
        console.print(part, highlight=False, markup=False)


def _method(name: str, refine: int, bits: int | None, group_size: int | None) -> Any:
    """A method by its name, with what refines and what quantises it; ValueError for what does not go together."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    if group_size is not None and bits is None:
        raise ValueError(f"--group-size {group_size} goes with --bits")
    if (refine or bits is not None) and METHODS[name].needs is GradSquare:
        flag = "--refine" if refine else "--bits"
        raise ValueError(f"{flag} needs a method that reads what each layer is given, and {name} reads gradients")
    joint = bits is not None and name == "sparsegpt"
    method = SparseGPT(bits=bits, group_size=group_size) if joint else METHODS[name]()
    method = Refine(method, refine) if refine else method
    return method if bits is None or joint else GPTQ(bits, group_size, first=method)


def _prune_tables(report: PruneReport, perplexity: dict[str, Perplexity] | None) -> list[Any]:
    table = Table("layer", "shape", "sparsity", "error", "held-out", "damping", "dead inputs", "s")
    for row in report.layers:
        errors = ("–" if value is None else f"{value:.4f}" for value in (row.error, row.held_out_error, row.damping))
        dead = "–" if row.dead_inputs is None else str(row.dead_inputs)
        shape = f"{row.out_features} x {row.in_features}"
        table.add_row(row.name, shape, f"{row.sparsity:.2%}", *errors, dead, f"{row.seconds:.2f}")
    lines = [f"stays dense: {name}: {reason}" for name, reason in report.skipped]
    lines += [f"statistics of {row.name}: {row.fallback}" for row in report.layers if row.fallback]
    if perplexity is not None:
        lines.append(f"perplexity {perplexity['before']} -> {perplexity['after']}")
    return [table, *lines, str(report)]


def _load(model: str, dtype: str):
    hf.quiet()
    return hf.load(model, dtype=_dtype(dtype))


def _dtype(name: str) -> torch.dtype | None:
    if name not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES.get(name)


def _window(model, seqlen: int | None) -> int:
    """Raises ValueError for a window that the model has no positions for."""
    positions = hf.positions(model)
    if seqlen is not None and positions is not None and seqlen > positions:
        raise ValueError(f"seqlen must be at most the model's {positions} positions, got {seqlen}")
    if seqlen is not None and seqlen < 2:
        raise ValueError(f"seqlen must be at least 2, got {seqlen}")
    return seqlen or min(SEQLEN, positions or SEQLEN)


def _tokens(tokenizer, source: str) -> torch.Tensor:
    return text.tokenize(tokenizer, text.read_text(source))


@contextmanager
def _bar(description: str) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error: yields what to call with the number done, the number of all, and what."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, all, what=None: bar.update(task, completed=done, total=all, description=what)


def _perplexity(model, tokens, seqlen: int, description: str) -> Perplexity:
    with _bar(description) as update:
        return measure_perplexity(model, tokens, seqlen, update)


def _name(source: str) -> str:
    """What a card calls a model or a text: a local one by its last part, no paths of this machine."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def _provenance(model: str) -> dict[str, Any]:
    """What a reader needs to do the same again: versions and the hashes of the dense model's files."""
    facts = {name: version for name, version in doctor_facts.libraries().items() if version}
    directory = Path(model).expanduser()
    hashes = hf.fingerprint(directory) if directory.is_dir() else {}
    return {**facts, **{f"sha256 of the dense {name}": digest for name, digest in hashes.items()}}
