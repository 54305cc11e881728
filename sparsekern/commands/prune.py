"""sparsekern prune: a checkpoint in, a pruned checkpoint out."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparsekern import doctor, documents, hf
from sparsekern.allocation import CANDIDATES, allocate
from sparsekern.card import model_card
from sparsekern.commands.arguments import (
    AsJson,
    Dtype,
    Model,
    Seqlen,
    calibration_of,
    dtype_of,
    load,
    tokens_of,
    window,
)
from sparsekern.commands.output import measured_perplexity, print_result
from sparsekern.finishing import Finish
from sparsekern.measure import Perplexity
from sparsekern.methods import GPTQ, METHODS, Refine, SparseGPT
from sparsekern.model_files import UnreadableError
from sparsekern.oneshot import prune as prune_model
from sparsekern.pattern import NM, as_pattern
from sparsekern.permute import permute as permute_model
from sparsekern.preview import preview
from sparsekern.publish import lock, refuse_existing
from sparsekern.report import PruneReport
from sparsekern.stats import GradSquare
from sparsekern.streaming import OnDisk, prune_streaming, why_not_streaming, work_directory

EXAMPLE = "`sparsekern prune MODEL --pattern 2:4 --calibration text.txt -o OUT`"


def command(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to write; must not exist")],
    calibration: Annotated[
        str | None,
        typer.Option(help="text.txt, data.jsonl, data.parquet[:column], or dataset name[:config[:split[:column]]]"),
    ] = None,
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
    restart: Annotated[
        bool, typer.Option("--restart", help="throw away what a run that was killed has done, instead of going on")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")] = False,
    as_json: AsJson = False,
):
    """Prune MODEL and write a checkpoint that plain transformers loads; its pruned weights are zeros.

    A local MODEL is pruned a block at a time from disk to disk, where the settings allow it: it may be larger than the
    memory, and the same command goes on after it was killed.
    """
    settings, wanted = _method(method, refine, bits, group_size), as_pattern(pattern)
    fitting = Finish(finish) if finish else None
    if not work_directory(output).exists():
        refuse_existing(output)
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
        raise ValueError(f"{what} needs --calibration: a file of text, .jsonl or .parquet, or a dataset name")
    on_disk, whole = _on_disk(model, output, dtype, settings, wanted, permute, allocation)
    source = load(model, dtype) if on_disk is None else on_disk.model
    reads_text = calibration is not None or heldout is not None
    tokenizer = hf.tokenizer(model) if reads_text or hf.has_tokenizer(model) else None
    seqlen = window(source, seqlen)
    batches = None
    if calibration is not None:
        batches = calibration_of(tokenizer, calibration, samples, seqlen, seed)
    test = tokens_of(tokenizer, heldout) if heldout is not None else None
    if dry_run or on_disk is None:
        # refuses what prune() would, before anything takes its time
        planned = preview(source, wanted, skip or [], settings, on_disk)
    if dry_run:
        print_result(planned.to_json(), as_json, lambda _: [str(planned), "nothing was written"])
        return
    if whole is not None:
        words = f"the whole model is in memory, and a run that is killed starts over: {whole}"
        Console(stderr=True, soft_wrap=True).print(words, markup=False, highlight=False)
    if on_disk is None:
        # prune_streaming takes it by itself
        context.with_resource(lock(output))

    perplexity = (
        {"before": measured_perplexity(source, test, seqlen, "dense perplexity")} if heldout is not None else None
    )
    permuted = permute_model(source, wanted, batches, seed=seed, progress=not as_json) if permute else None
    allocated = None
    if allocation != "uniform":
        compared = {"candidates": CANDIDATES[allocation], "skip": skip or [], "progress": not as_json}
        allocated = allocate(source, settings, wanted, batches, **compared)
        wanted = allocated.patterns
    first = {name: done for name, done in (("permuted", permuted), ("allocated", allocated)) if done is not None}
    described = (
        f"{samples} windows of {seqlen} tokens of {documents.title(calibration)}, seed {seed}" if batches else "none"
    )
    facts = _provenance(model, on_disk)
    command = shlex.join(["sparsekern", *sys.argv[1:]])
    result: dict[str, Any] = {}

    def files(report: PruneReport) -> dict[str, str]:
        figures = None
        if perplexity is not None:
            perplexity["after"] = measured_perplexity(source, test, seqlen, "pruned perplexity")
            figures = {name: value.to_json() for name, value in perplexity.items()}
        result.update({"command": command, **facts, "calibration": described, "perplexity": figures})
        result.update({"report": report.to_json(), **{name: done.to_json() for name, done in first.items()}})
        return {
            "README.md": model_card(_name(model), command, report, described, perplexity, facts, first.values()),
            "sparsekern.json": json.dumps(result, indent=1),
            **hf.processor_files(model),
        }

    how = {"finish": fitting, "skip": skip or [], "progress": not as_json}
    if on_disk is None:
        report = prune_model(source, settings, wanted, batches, **how)
        hf.save(source, tokenizer, output, files(report))
    else:
        beside = {"tokenizer": tokenizer, "files": files, "restart": restart}
        report = prune_streaming(on_disk, output, settings, wanted, batches, **how, **beside)
    print_result(
        result,
        as_json,
        lambda _: [*map(str, first.values()), *_prune_tables(report, perplexity), f"wrote {output}"],
    )


def _on_disk(
    model: str, output: Path, dtype: str, method: Any, pattern: Any, permute: bool, allocation: str
) -> tuple[OnDisk | None, str | None]:
    """The model, if it can be pruned a block at a time; else why it must be in memory as a whole."""
    hf.quiet()
    whole = why_not_streaming(method, pattern)
    if permute:
        whole = "--permute moves channels of all layers"
    elif allocation != "uniform":
        whole = f"--allocation {allocation} compares pruned models"
    elif not Path(model).expanduser().is_dir():
        whole = f"{model!r} is no local directory"
    if whole is None:
        try:
            return OnDisk(model, dtype_of(dtype)), None
        except UnreadableError as error:
            whole = str(error)
    # no name of an unfinished run may be taken
    refuse_existing(output)
    return None, whole


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


def _name(source: str) -> str:
    """What a card calls a model or a text: a local one by its last part, no paths of this machine."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def _provenance(model: str, on_disk: OnDisk | None) -> dict[str, Any]:
    """What a reader needs to do the same again: versions and the hashes of the dense model's files."""
    facts = {name: version for name, version in doctor.libraries().items() if version}
    directory = Path(model).expanduser()
    hashes = hf.fingerprint(directory) if directory.is_dir() and on_disk is None else {}
    hashes |= {} if on_disk is None else on_disk.fingerprint
    return {**facts, **{f"sha256 of the dense {name}": digest for name, digest in hashes.items()}}
