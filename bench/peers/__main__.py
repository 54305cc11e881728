"""peers: one linear layer, others' kernels and ours, in one alternating run with checked results.

    python bench/peers --shape 4096 4096 --tokens 1 16 --sparsity 0.5 0.7 0.9
    python bench/peers --also onnxruntime_int8,deepsparse_engine=VENV/bin/python --also openvino_sparse=:FOLDER
    python bench/peers --also ours                                  ours in processes of their own too
    python bench/peers --tiny

Each peer is a file of this folder with NAMES and build(name, weight, x, threads, copies). Those of torch, SciPy and
ourselves run in this process; one that needs another Python runs in a process of its own (worker.py), and its row says
so: it is called until its threads are awake and times itself over some calls in a row, so that its caches are warmer
than ours. What cannot run is listed with its reason, and hurts nobody. Weights are pruned at random
and rotate through memory; every result is compared with float64 before anything is timed. What quantises its inputs
may differ by 5 %, and the table shows by how much each does.

The last line of stdout is the result as JSON; --plot draws the speed-up of our faster kernel over own dense
and the best of torch.
"""

import argparse
import importlib
import io
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import ours  # noqa: E402

from sparsekern.measure import machine  # noqa: E402
from sparsekern.ops import compiled, stream_read  # noqa: E402
from sparsekern.ops.kernel import pick  # noqa: E402
from sparsekern.speed import ARENA_BYTES  # noqa: E402
from sparsekern.timing import Processor, Ratio, Sample, alternate, arena_bytes  # noqa: E402

WITHIN = ("ours", "torch_dense", "torch_csr", "scipy_csr")
TORCH = ("torch eager", "torch prepacked", "torch compiled")
APART = ", apart"
EAGER, OWN, READ = TORCH[0], ours.NAMES[0], "read"
SPIN_SECONDS = 0.02
MOST_COPIES = 12  # of a peer's model: each takes a second or two to build
LARGEST_ERROR = 0.05  # of the root mean square of y: inputs in 8 bits with one scale
# what does not run here, and why
NOTES = {
    "SparAMX": "needs AMX and a build against one version of torch; published: 0.82 to 1.4 x torch at 50 to 90 %",
    "ggml": "has no sparse format; its dense bf16 is published at 1.0 x torch, q8_0 at 2.7 x",
}


@dataclass(frozen=True)
class Seconds:
    """What a worker says that a call took."""

    value: float


class Clock(Processor):
    """That of this process, but a worker's own where it is one that ran."""

    def time(self, call):
        said = []
        sample = super().time(lambda: said.append(call()))
        return Sample(said[0].value, sample.disturbed) if isinstance(said[0], Seconds) else sample


class Worker:
    """A peer in another process. `names` as the file has them."""

    def __init__(self, file: str, python: str, paths: list[str]):
        self.file = file
        command = [python or sys.executable, str(HERE / "worker.py"), str(HERE / f"{file}.py"), *paths]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def build(self, name, weight, x, threads, copies):
        self._folder = tempfile.TemporaryDirectory()
        paths = {key: f"{self._folder.name}/{key}.npy" for key in ("weight", "x")}
        np.save(paths["weight"], weight)
        np.save(paths["x"], x)
        answer = self._ask({"name": name, **paths, "threads": threads, "copies": copies})
        if "error" in answer:
            raise ValueError(answer["error"])
        y = np.load(answer["y"])
        return self._run, lambda _: y

    def _run(self, number: int) -> Seconds:
        # the threads of this process spin for a while after their work, and would share the processor with it
        time.sleep(SPIN_SECONDS)
        return Seconds(self._ask({"run": number})["seconds"])

    def _ask(self, question: dict) -> dict:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline() or '{"error": "its process ended"}')
        except BrokenPipeError:
            return {"error": "its process ended"}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def names_of(file: str) -> tuple[str, ...]:
    """NAMES of a peer's file, read without importing what it needs."""
    line = next(line for line in (HERE / f"{file}.py").read_text().splitlines() if line.startswith("NAMES = "))
    return tuple(json.loads("[" + line.removeprefix("NAMES = ").strip("()").strip(", ") + "]"))


def peers(also: list[str]) -> list[tuple[str, str, str, list[str]]]:
    """(name, file, python, paths) of every peer: one process a name, so that no two share threads."""
    rows = [(name, file, "", []) for file in WITHIN for name in names_of(file)]
    for entry in also:
        files, _, where = entry.partition("=")
        python, *paths = where.split(":")
        for file in files.split(","):
            kept = [path for path in paths if path]
            # ours may run the way that others have to
            rows += [(name + (APART if file in WITHIN else ""), file, python, kept) for name in names_of(file)]
    return rows


def _inside(name: str, file: str) -> bool:
    return file in WITHIN and not name.endswith(APART)


def measure(shape, tokens, sparsity, found, threads, rounds, seconds, arena) -> dict:
    """One row: every peer's time, its ratio over torch eager and over own dense, and the error of its result."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal(shape, dtype=np.float32) * 0.02
    weight[generator.random(shape, dtype=np.float32) < sparsity] = 0
    weight = torch.from_numpy(weight).bfloat16().float().numpy()
    x = torch.from_numpy(generator.standard_normal((tokens, shape[1]), dtype=np.float32)).bfloat16().float().numpy()
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    copies = max(-(-arena // (weight.nbytes * 3)), 2)
    # of 8 bits a kept weight, the least that a peer may read
    packed = max(int(weight.size * (1 - sparsity)), 1)
    variants, errors, failed, workers = {}, {}, {}, []
    for name, file, python, paths in found:
        inside = _inside(name, file)
        try:
            if inside:
                build = importlib.import_module(file).build
            else:
                workers.append(Worker(file, python, paths))
                build = workers[-1].build
            held = copies if inside else min(max(-(-arena // (8 * packed)), 2), MOST_COPIES)
            run, read = build(name.removesuffix(APART), weight, x, threads, held)
            error = float(np.linalg.norm(read(run(0)) - exact) / np.linalg.norm(exact))
        except (ImportError, OSError, ValueError, RuntimeError) as problem:
            failed[name] = str(problem).splitlines()[0]
            continue
        if not error <= LARGEST_ERROR:
            failed[name] = f"its result is wrong by {error:.1%}"
            continue
        variants[name], errors[name] = run, error
    buffer = compiled.copy(torch.ones(32 << 20, dtype=torch.uint8).view(torch.float64))
    parts = torch.ones(max(arena // buffer.nbytes, 2) * len(buffer), dtype=torch.float64).split(len(buffer))
    reader = pick(stream_read.KERNELS, buffer)
    variants[READ] = lambda number: reader.run(parts[number % len(parts)], threads)
    timed = alternate(variants, rounds=rounds, seconds=seconds, clock=Clock())
    for worker in workers:
        worker.close()
    rows = {}
    torch_names = [name for name in TORCH if name in errors]
    best = min(torch_names, key=lambda name: timed.latency(name).median)
    bandwidth = buffer.nbytes / timed.latency(READ).median
    for name, file, *_ in found:
        if name not in errors:
            continue
        latency = timed.latency(name)
        row = {"own_process": not _inside(name, file), "error": errors[name], **latency.to_json()}
        for key, over in (("over_eager", EAGER), ("over_best_torch", best), ("over_own_dense", OWN)):
            known = over in errors
            row[key] = (timed.ratio(over, name) if known else Ratio.unknown(f"{over} did not run")).to_json()
        if name in ours.NAMES:
            row["bytes"] = ours.nbytes(name, weight)
            row["share_of_read"] = row["bytes"] / latency.median / bandwidth
        rows[name] = row
    ceiling = rows[OWN]["bytes"] / rows["bitmap bf16"]["bytes"] if OWN in rows and "bitmap bf16" in rows else None
    return {
        "shape": list(shape),
        "tokens": tokens,
        "sparsity": sparsity,
        "threads": threads,
        "best_torch": best,
        "ceiling": ceiling,
        "read_bytes_s": bandwidth,
        "peers": rows,
        "failed": failed,
    }


def table(row: dict) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    out_features, in_features = row["shape"]
    title = (
        f"{out_features}x{in_features}, {row['sparsity']:.0%} sparse, {row['tokens']} tokens, {row['threads']} threads"
    )
    shown = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    shown.add_column("peer")
    for name in ("us", "× torch eager", "× best of torch", "× own dense", "of read", "error"):
        shown.add_column(name, justify="right")
    for name, each in sorted(row["peers"].items(), key=lambda item: item[1]["median"]):
        ratios = [each[key]["median"] for key in ("over_eager", "over_best_torch", "over_own_dense")]
        shown.add_row(
            name + (" *" if each["own_process"] else ""),
            f"{'' if each['steady'] else '~'}{each['median'] * 1e6:.0f}",
            *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{each['share_of_read']:.0%}" if "share_of_read" in each else "",
            f"{each['error']:.1e}",
        )
    text = io.StringIO()
    Console(file=text, width=120).print(shown)
    notes = [f"{name} did not run: {reason}" for name, reason in row["failed"].items()]
    own = ["* in a process of its own"] if any(each["own_process"] for each in row["peers"].values()) else []
    return "\n".join([text.getvalue().rstrip(), *own, *notes])


def plot(rows: list[dict], path: Path) -> None:
    """The speed-up of our faster kernel over own dense and the best of torch against tokens, ceiling dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(
        panels, ("over_own_dense", "over_best_torch"), ("own dense", "the best of torch"), strict=True
    ):
        for colour, sparsity in enumerate(dict.fromkeys(row["sparsity"] for row in rows)):
            mine = [row for row in rows if row["sparsity"] == sparsity]
            for values, style in (("bf16", "o-"), ("int8", "s:")):
                points = []
                for row in mine:
                    kernels = [row["peers"].get(f"{kernel} {values}") for kernel in ("bitmap", "index")]
                    ratios = [kernel[key]["median"] for kernel in kernels if kernel and kernel[key]["median"]]
                    points += [(row["tokens"], max(ratios))] if ratios else []
                label = f"{sparsity:.0%} {values}"
                axes.plot(*zip(*points, strict=True) if points else ([], []), style, color=f"C{colour}", label=label)
            if mine[0]["ceiling"]:
                axes.axhline(mine[0]["ceiling"], linestyle="--", color=f"C{colour}", linewidth=0.8)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="tokens", title=f"sparse against {title}")
        counts = sorted({row["tokens"] for row in rows})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    panels[0].set_ylim(0, None)
    panels[0].set_ylabel("speed-up; dashed: bfloat16's ceiling, by bytes")
    panels[1].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--also", action="append", default=[], metavar="FILES=PYTHON[:PATH...]")
    parser.add_argument("--without", nargs="+", default=[], help="names of peers to leave out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each row, at most")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--tiny", action="store_true", help="one small shape, few rounds, without what compiles")
    chosen = parser.parse_args()
    arena = max(ARENA_BYTES, arena_bytes())
    if chosen.tiny:
        chosen.shape, chosen.tokens, chosen.sparsity, chosen.rounds = [64, 96], [1, 3], [0.5], 8
        chosen.seconds, arena, chosen.without = 0, 1 << 18, ["torch compiled", *chosen.without]
    torch.set_num_threads(chosen.threads)
    found = [peer for peer in peers(chosen.also) if peer[0] not in chosen.without]
    rows = []
    for sparsity in chosen.sparsity:
        for tokens in chosen.tokens:
            setting = (chosen.threads, chosen.rounds, chosen.seconds, arena)
            rows.append(measure(tuple(chosen.shape), tokens, sparsity, found, *setting))
            print(table(rows[-1]), flush=True)
    for name, why in NOTES.items():
        print(f"{name}: {why}")
    if chosen.plot:
        plot(rows, chosen.plot)
    print(json.dumps({"machine": machine(), "notes": NOTES, "rows": rows}))


if __name__ == "__main__":
    main()
