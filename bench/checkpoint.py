"""checkpoint: save, load and verify of a compressed checkpoint against plain safetensors of the dense model.

    python bench/checkpoint.py                       four blocks of Llama-3.2-1B with random weights, 50%, bitmap
    python bench/checkpoint.py --pattern 2:4 --blocks 8 --directory /dev/shm
    python bench/checkpoint.py --tiny                seconds on any CPU

Each step is timed in pairs, dense and compressed by turns, in one process. A step does for both what a user does: save
writes a pruned model, and the compressed one its hashes; load gives a model of transformers that has multiplied one
token, because safetensors only maps its files and they are read then, without hashes on either side; "load cold" is the
same with the files out of the page cache (posix_fadvise, which a tmpfs ignores); verify reads every byte: SHA256SUMS
for both, and for the compressed one all that is checked besides. "per byte" is by the bytes that are stored. Peak
memory is that of a process of its own which does nothing else: the most that was resident (VmHWM, set back before the
step) less what was before; pages of mapped files count, which Linux takes back when it needs them. The last line of
stdout is the result as JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from model import prune_by_magnitude, random_model
from prune_model import peak_since_reset, reset_peak, resident

import sparsekern as sk
from sparsekern import checkpoint, hf, shapes
from sparsekern.manifest import check_sums, write_sums
from sparsekern.measure import machine
from sparsekern.pattern import as_pattern
from sparsekern.timing import percentile

STEPS = ("save", "load", "load cold", "verify")
KINDS = ("dense", "compressed")


def one_token(model) -> None:
    with torch.inference_mode():
        model(torch.tensor([[1]]))


def step(name: str, kind: str, directory: Path, model=None) -> None:
    """One step on the checkpoint of a kind that lies in `directory`."""
    if name == "save":
        target = directory / "written"
        if kind == "dense":
            hf.save(model, None, target, {})
        else:
            sk.save(model, target)
        shutil.rmtree(target)
    elif name in ("load", "load cold"):
        one_token(hf.load(directory / kind) if kind == "dense" else sk.load(directory / kind, hashes=False))
    elif kind == "dense":
        check_sums(directory / kind)
    else:
        checkpoint.verify(directory / kind)


def forget(directory: Path) -> None:
    """Take the files out of the page cache; they have been synced."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak(name: str, kind: str, directory: Path) -> int | None:
    """What the step takes beside what was resident before, in a process of its own; None where Linux does not say."""
    command = [sys.executable, __file__, "--step", name, "--kind", kind, "--directory", str(directory)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def in_process_of_its_own(name: str, kind: str, directory: Path) -> None:
    """Print what the step takes; libraries are loaded and used first, with the tiny model."""
    hf.quiet()
    small, model = (hf.load(directory / where / "dense") for where in ("warm", "."))
    one_token(model)
    step(name, kind, directory / "warm", small)
    if name != "save":
        del model
        model = None
    if not reset_peak():
        print("null")
        return
    before = resident()
    step(name, kind, directory, model)
    print(peak_since_reset() - before)


def ratio(pairs: list[tuple[float, float]]) -> dict[str, float]:
    ratios = [dense / compressed for dense, compressed in pairs]
    return {name: percentile(ratios, share) for name, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}


def measure(name: str, directory: Path, sizes: dict[str, int], model, rounds: int) -> dict[str, Any]:
    """The step's times by turns: seconds, bytes a second, and how many times faster the compressed one is."""
    pairs = []
    for number in range(rounds + 1):
        taken = {}
        for kind in KINDS if number % 2 else KINDS[::-1]:
            if name == "load cold":
                forget(directory / kind)
            start = time.perf_counter()
            step(name, kind, directory, model)
            taken[kind] = time.perf_counter() - start
        # the first pair opens files and fills caches
        if number:
            pairs.append((taken["dense"], taken["compressed"]))
    result: dict[str, Any] = {"step": name, "speedup": ratio(pairs)}
    smaller = sizes["compressed"] / sizes["dense"]
    result["speedup_per_byte"] = {share: value * smaller for share, value in result["speedup"].items()}
    for place, kind in enumerate(KINDS):
        seconds = [pair[place] for pair in pairs]
        result[kind] = {
            "seconds": percentile(seconds, 0.5),
            "p10": percentile(seconds, 0.1),
            "p90": percentile(seconds, 0.9),
            "gb_per_s": sizes[kind] / percentile(seconds, 0.5) / 1e9,
            "peak_bytes": peak(name, kind, directory),
        }
    return result


def write(model, directory: Path) -> dict[str, int]:
    """The two checkpoints; returns the bytes of their weights."""
    hf.save(model, None, directory / "dense", {})
    write_sums(directory / "dense")
    sk.save(model, directory / "compressed")
    return {kind: sum(file.stat().st_size for file in (directory / kind).glob("*.safetensors")) for kind in KINDS}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b", choices=list(shapes.MODELS))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--pattern", default="50%")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--directory", type=Path, help="where the checkpoints are written; a temporary one")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, two rounds")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.step:
        in_process_of_its_own(chosen.step, chosen.kind, chosen.directory)
        return 0
    if chosen.tiny:
        chosen.model, chosen.rounds = "tiny", 2
    hf.quiet()
    shape = shapes.find(chosen.model)
    model = random_model(replace(shape, blocks=min(chosen.blocks, shape.blocks)), torch.bfloat16)
    prune_by_magnitude(model, as_pattern(chosen.pattern))
    with tempfile.TemporaryDirectory(dir=chosen.directory) as folder:
        directory = Path(folder)
        small = random_model(shapes.find("tiny"), torch.bfloat16)
        prune_by_magnitude(small, as_pattern(chosen.pattern))
        write(small, directory / "warm")
        sizes = write(model, directory)
        rows = [measure(name, directory, sizes, model, chosen.rounds) for name in STEPS]
    print(f"{sizes['dense'] / 1e6:.1f} MB dense, {sizes['compressed'] / 1e6:.1f} MB compressed")
    for row in rows:
        print(f"{row['step']}: {row['speedup']['median']:.2f}x as fast as dense ", end="")
        print(f"(p10 {row['speedup']['p10']:.2f}, p90 {row['speedup']['p90']:.2f}), ", end="")
        print(f"{row['speedup_per_byte']['median']:.2f}x per byte stored")
        for kind in KINDS:
            entry = row[kind]
            more = "" if entry["peak_bytes"] is None else f", {entry['peak_bytes'] / 1e6:.0f} MB more resident at most"
            print(f"  {kind:10s} {entry['seconds']:.3f} s, {entry['gb_per_s']:.2f} GB/s{more}")
    facts = {"model": chosen.model, "blocks": chosen.blocks, "pattern": chosen.pattern, "rounds": chosen.rounds}
    print(json.dumps({**facts, "bytes": sizes, "threads": torch.get_num_threads(), "rows": rows, "machine": machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
