"""finetune: how much of the perplexity that pruning costs comes back when the model is trained on with its zeros kept.

    python bench/finetune.py                     the table: every variant, three seeds
    python bench/finetune.py learning-rates      how the rates below were chosen
    python bench/finetune.py --tiny

The model that ships is trained on for 200 steps of 4 windows of 512 tokens, by transformers' Trainer with AdamW in
bfloat16 autocast over float32 weights, warmup over 5 % of the steps and then a half cosine to zero, norms clipped at 1:

    dense                          nothing is pruned: what more training alone brings
    SparseGPT, ADMM  + KeepZeros   pruned in one shot on 64 windows, then trained with the masks fixed
    gradual                        pruned by magnitude on the way, every 10 steps, over the first 60 % of them

Three texts, no file in two of them. Training: the files of the standard library that the model was trained on, which it
has seen about three times; the calibration text is part of it. Held out: heldout.txt of the model, which decides
nothing here. Learning rates were chosen on a third one, the sources of pip in the wheel that Python ships in ensurepip,
without the files that share lines with the standard library. A seed draws the calibration windows and the training
windows. Perplexities are of the weights in bfloat16, as they would be saved; on the way, on the first 30 windows.

--output writes the JSON to a file as well, after every run, and a PNG beside it: the same command goes on with what is
missing there. The last line of stdout is the same.
"""

import argparse
import copy
import json
import statistics
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import train_demo_model as corpus
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import sparsekern as sk
from sparsekern import demo, hf, text
from sparsekern.hf_trainer import GradualPruning, KeepZeros
from sparsekern.measure import machine, perplexity

ONE_SHOT = {"SparseGPT": sk.SparseGPT(), "ADMM": sk.ADMM()}
VARIANTS = (
    ("dense", None),
    ("SparseGPT", "2:4"),
    ("ADMM", "2:4"),
    ("gradual", "2:4"),
    ("SparseGPT", "60%"),
    ("gradual", "60%"),
)
# of the rates tried, the best for each on the validation text; ADMM has SparseGPT's, and 60 % that of 2:4
LEARNING_RATES = {"dense": 1e-4, "SparseGPT": 3e-4, "ADMM": 3e-4, "gradual": 1e-3}
TRIED = {"dense": (3e-5, 1e-4, 3e-4), "SparseGPT": (1e-4, 3e-4, 1e-3), "gradual": (3e-4, 1e-3, 3e-3)}
SEEDS = (0, 1, 2)
SEQLEN = 512


@dataclass(frozen=True)
class Size:
    """`batch`, `calibration`, the text to judge by (None: all of it) and the part of it for curves, in windows."""

    steps: int = 200
    batch: int = 4
    evaluate_every: int = 50
    calibration: int = 64
    judged: int | None = None
    curve: int = 30
    files: int | None = None
    every: int = 10


TINY = Size(steps=4, batch=1, evaluate_every=2, calibration=2, judged=2, curve=1, files=40, every=1)


class Curve(TrainerCallback):
    """Perplexities on the way, of a copy in bfloat16."""

    def __init__(self, tokens: Tensor, every: int):
        self.tokens, self.every, self.points = tokens, every, []

    def on_train_begin(self, args, state, control, model=None, **others) -> None:
        self.measure(0, model)

    def on_step_end(self, args, state, control, model=None, **others) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(state.global_step, model)

    def measure(self, step: int, model: nn.Module) -> None:
        self.points.append((step, perplexity(copy.deepcopy(model).bfloat16(), self.tokens, SEQLEN).value))


@cache
def held_out() -> Tensor:
    return _tokens(text.read_text(demo.MODEL / "heldout.txt"))


@cache
def training(files: int | None) -> tuple[Tensor, bool]:
    """The tokens to train on, and whether they are of the very files that the model was trained on.

    Without the files that are held out, by name and by the lines that they share.
    """
    found = corpus.read_corpus(files)
    facts = json.loads((demo.MODEL / "training.json").read_text())
    listed = "".join(f"{corpus.sha256(content)}  {name}\n" for name, content in found.items())
    apart = corpus.shingles(text.read_text(demo.MODEL / "heldout.txt"))
    names = [name for name in found if name not in facts["heldout_files"] and _is_new(found[name], apart)]
    tokens = corpus.encode(hf.tokenizer(demo.MODEL), names, found).long()
    return tokens, corpus.sha256(listed) == facts["sha256"]["corpus_list"]


@cache
def validation() -> Tensor:
    """pip's own sources, as far as they are not the standard library's or held out."""
    known = set().union(*map(corpus.shingles, corpus.read_corpus(None).values()))
    known |= corpus.shingles(text.read_text(demo.MODEL / "heldout.txt"))
    bundled = sorted(Path(sysconfig.get_paths()["stdlib"], "ensurepip/_bundled").glob("pip-*.whl"))
    if not bundled:
        raise ValueError("this Python ships no pip wheel in ensurepip, which the validation text is read from")
    with zipfile.ZipFile(bundled[0]) as wheel:
        names = sorted(name for name in wheel.namelist() if name.startswith("pip/_internal/") and name.endswith(".py"))
        contents = [wheel.read(name).decode() for name in names]
    fresh = [content for content in contents if corpus.is_source(content) and _is_new(content, known)]
    # as much as there is held-out text
    return _tokens("".join(corpus.SEPARATOR + content for content in fresh))[: len(held_out())]


def _is_new(content: str, known: set[int]) -> bool:
    runs = corpus.shingles(content)
    return sum(run in known for run in runs) <= 0.02 * len(runs)


def _tokens(content: str) -> Tensor:
    return text.tokenize(hf.tokenizer(demo.MODEL), content)


def _judged(judge: str, size: Size) -> Tensor:
    tokens = {"held-out": held_out, "validation": validation}[judge]()
    return tokens[: None if size.judged is None else size.judged * SEQLEN]


def finetune(job: tuple[str, str | None, int, float], size: Size, judge: str, dense: float) -> dict[str, Any]:
    """Prune and train as the job says: variant, pattern, seed, learning rate.

    judge  names the text to measure perplexity on, and `dense` is the shipped model's on it
    """
    name, pattern, seed, rate = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    hf.quiet()
    tokens, same_files = training(size.files)
    judged = _judged(judge, size)
    model = hf.load(demo.MODEL, dtype=torch.bfloat16)
    callbacks, before = [], dense
    if name in ONE_SHOT:
        calibration = _tokens(text.read_text(demo.MODEL / "calibration.txt"))
        sk.prune(model, ONE_SHOT[name], pattern, text.windows(calibration, SEQLEN, size.calibration, seed))
        callbacks, before = [KeepZeros()], perplexity(model, judged, SEQLEN).value
    elif pattern:
        callbacks = [GradualPruning(pattern, end=0.6, every=size.every)]
    # updates are smaller than what bfloat16 holds
    model.float()
    curve = Curve(judged[: size.curve * SEQLEN], size.evaluate_every)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            max_steps=size.steps,
            per_device_train_batch_size=size.batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(0.05 * size.steps),
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=True,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        windows = text.windows(tokens, SEQLEN, size.steps * size.batch, seed)
        rows = [{"input_ids": window[0], "labels": window[0]} for window in windows]
        Trainer(model, arguments, train_dataset=rows, callbacks=[*callbacks, curve]).train()
    if pattern:
        _check(model, sk.as_pattern(pattern))
    return {
        "variant": name,
        "pattern": pattern,
        "seed": seed,
        "learning_rate": rate,
        "judge": judge,
        "before": before,
        "after": perplexity(model.bfloat16(), judged, SEQLEN).value,
        "curve": curve.points,
        "same_files": same_files,
    }


def _check(model: nn.Module, pattern: Any) -> None:
    """The pattern holds in every layer, weight for weight."""
    for name, layer in hf.layers(model):
        weight = hf.weight(layer)
        zeros = int((weight == 0).sum())
        assert zeros == round(pattern.sparsity * weight.numel()), f"{name}: {zeros} zeros"
        if isinstance(pattern, sk.NM):
            assert ((weight != 0).view(-1, pattern.m).sum(1) == pattern.n).all(), f"{name}: not {pattern}"


def run(jobs: list[tuple], size: Size, judge: str, dense: float, workers: int, done: list[dict]) -> Iterator[dict]:
    """Each job's result as soon as it is there; those of `done` are not run again."""
    finished = {(run["variant"], run["pattern"], run["seed"], run["learning_rate"]) for run in done}
    jobs = [job for job in jobs if job not in finished]
    # a process each: two small models on a core each finish sooner than one on two
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        started = [pool.submit(partial(finetune, size=size, judge=judge, dense=dense), job) for job in jobs]
        for ended in track(as_completed(started), "fine-tuning", len(jobs), console=Console(stderr=True)):
            yield ended.result()


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sd over the seeds, of the perplexity before the first step and after the last, and the mean curve."""
    rows, what = [], ("variant", "pattern", "learning_rate")
    for key in dict.fromkeys(tuple(run[name] for name in what) for run in runs):
        mine = [run for run in runs if tuple(run[name] for name in what) == key]
        row = dict(zip(what, key, strict=True))
        for name in ("before", "after"):
            values = [run[name] for run in mine]
            row[name], row[f"{name}_sd"] = statistics.mean(values), _sd(values)
        points = zip(*(run["curve"] for run in mine), strict=True)
        row["curve"] = [(same_step[0][0], statistics.mean(value for _, value in same_step)) for same_step in points]
        rows.append(row)
    return rows


def _sd(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def table(rows: list[dict[str, Any]], dense: float, seeds: int) -> Table:
    made = Table("variant", title=f"perplexity, dense {dense:.3f}; mean and sd of {seeds} seeds")
    for heading in ("pattern", "learning rate", "before", "after"):
        made.add_column(heading, justify="right")
    for row in rows:
        spread = {name: row[f"{name}_sd"] for name in ("before", "after")}
        # one seed has no spread
        cells = (f"{row[name]:.3f}" + (f" ± {sd:.3f}" if sd is not None else "") for name, sd in spread.items())
        made.add_row(row["variant"], row["pattern"] or "", f"{row['learning_rate']:g}", *cells)
    return made


def plot(result: dict[str, Any], path: Path) -> None:
    """Perplexity against steps: 2:4, and beside it 60 %; the dense control in both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = {
        name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["variant"] for row in result["rows"]))
    }
    for axes, pattern in zip(panels, ("2:4", "60%"), strict=True):
        for row in result["rows"]:
            if row["pattern"] in (None, pattern):
                axes.plot(*zip(*row["curve"], strict=True), "o-", color=colours[row["variant"]], label=row["variant"])
        axes.set(title=pattern, xlabel="steps of 2048 tokens")
        axes.legend(fontsize="small")
    panels[0].set(ylabel="perplexity on the first 30 held-out windows")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("table", "learning-rates"), default="table")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--output", type=Path, help="write the JSON here as well, and a PNG beside it")
    parser.add_argument("--steps", type=int, help=f"of each run, instead of {Size.steps}: what more training brings")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument("--tiny", action="store_true", help="a few steps of two variants")
    arguments = parser.parse_args()
    size, seeds = (TINY, SEEDS[:1]) if arguments.tiny else (Size(), SEEDS[: arguments.seeds])
    if arguments.steps:
        size = replace(size, steps=arguments.steps, evaluate_every=max(1, arguments.steps // 4))
    variants = (VARIANTS[1], VARIANTS[-1]) if arguments.tiny else VARIANTS
    if arguments.what == "table":
        judge = "held-out"
        jobs = [(name, pattern, seed, LEARNING_RATES[name]) for seed in seeds for name, pattern in variants]
    else:
        judge, seeds, size = "validation", SEEDS[:1], replace(size, evaluate_every=size.steps)
        jobs = [(name, None if name == "dense" else "2:4", 0, rate) for name, rates in TRIED.items() for rate in rates]
    dense = perplexity(hf.load(demo.MODEL, dtype=torch.bfloat16), _judged(judge, size), SEQLEN)
    runs = _done(arguments.output, size, judge)
    for finished in run(jobs, size, judge, dense.value, arguments.workers, runs):
        runs.append(finished)
        if arguments.output:
            _write(arguments.output, {"size": asdict(size), "judge": judge, "runs": runs})
    runs.sort(key=lambda run: jobs.index((run["variant"], run["pattern"], run["seed"], run["learning_rate"])))
    rows = summary(runs)
    if not runs[0]["same_files"] and not arguments.tiny:
        Console(stderr=True).print(
            "this Python's library is another than the model was trained on: figures will differ"
        )
    Console(width=120).print(table(rows, dense.value, len(seeds)))
    result = {"machine": machine(), "what": arguments.what, "size": asdict(size), "judge": judge}
    result |= {"dense": dense.to_json(), "rows": rows, "runs": runs}
    if arguments.output:
        _write(arguments.output, result)
        if arguments.what == "table":
            plot(result, arguments.output.with_suffix(".png"))
    print(json.dumps(result))


def _done(path: Path | None, size: Size, judge: str) -> list[dict[str, Any]]:
    """The runs that an earlier call has written. Raises ValueError when they are of another size or text."""
    if path is None or not path.exists():
        return []
    written = json.loads(path.read_text())
    if (written["size"], written["judge"]) != (asdict(size), judge):
        raise ValueError(f"{path} holds runs of {written['size']} on {written['judge']} text; give another file")
    return written["runs"]


def _write(path: Path, result: dict[str, Any]) -> None:
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(json.dumps(result) + "\n")
    partial_file.replace(path)


if __name__ == "__main__":
    main()
