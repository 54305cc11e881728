"""gpu: everything there is to prove on a card, in one run of less than eight minutes.

    python bench/gpu.py                              builds, tests, times; bench/results/<card>-<date>.json, .md, .png
    python bench/gpu.py --output DIR --seconds 560   elsewhere, with another budget
    python bench/gpu.py --only solver model          some stages only
    python bench/gpu.py --show [FILE.json]           what is wanted of a card, and what the newest such file says of it
    python bench/gpu.py --tiny                       every stage without a card, at tiny sizes; nothing is timed

The modules are built if they are not there; the tests that need a card run with compute-sanitizer beside them; then
each stage of card/stages.py times its part in a process of its own, so that none can take the others with it. A row is
on the disk when it is measured: a run that is cut off keeps what it had. What could not be measured has a row with the
reason. The last line of stdout is JSON: the files, and how many rows have an error.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# the package lies beside bench/, installed or not
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from card import correctness, process, report, stages
from card.record import Json, Record, name_of, where_am_i, with_path

RESULTS = Path(__file__).parent / "results"
BUILD_SECONDS, TEST_SECONDS = 150.0, 130.0
# a case that began in time may end a little later
GRACE_SECONDS = 15.0
# processes that a stage may lose
MOST_LOST = 4


@dataclass
class Worker:
    """A process that has imported a stage's module and waits to be told where to begin and until when."""

    stage: str
    command: list[str]
    process: subprocess.Popen = field(init=False)
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows, writes = os.pipe()
        self.process = process.start(
            [*self.command, "--pipe", str(writes)],
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            pass_fds=[writes],
            env=with_path(),
            text=True,
        )
        os.close(writes)

    def lines(self, first: int, until: float) -> Iterator[Json]:
        """What it says, until it ends; it is killed some time after `until`."""
        try:
            self.process.stdin.write(json.dumps({"first": first, "until": until}) + "\n")
            self.process.stdin.close()
        except BrokenPipeError:
            # it died while it imported; its exit status says so
            pass
        rest = b""
        try:
            while True:
                left = until + GRACE_SECONDS - time.time()
                ready, _, _ = select.select([self.rows], [], [], max(left, 0))
                if not ready:
                    yield {"killed": f"stopped {GRACE_SECONDS:.0f} s after its time was over"}
                    break
                some = os.read(self.rows, 1 << 16)
                if not some:
                    # it says no more; a card that hangs may keep it from ending
                    process.wait(self.process, time.monotonic() + GRACE_SECONDS)
                    break
                *lines, rest = (rest + some).split(b"\n")
                yield from map(json.loads, lines)
        finally:
            self.stop()

    def stop(self) -> None:
        """End it, used or not."""
        process.stop(self.process)
        os.close(self.rows)


def worker_of(stage: str, device: str) -> Worker:
    return Worker(stage, [sys.executable, __file__, "--worker", stage, "--device", device])


def run_stage(stage: str, worker: Worker, device: str, until: float) -> Iterator[Json]:
    """The stage's rows. A process that is lost costs the case it was at: another goes on behind it."""
    first = 0
    for lost in range(MOST_LOST + 1):
        case, number, ended, killed = "nothing", first, False, None
        for line in worker.lines(first, until):
            if "row" in line:
                yield line["row"]
            elif "begin" in line:
                case, number = line["case"], line["begin"]
            ended |= "end" in line
            killed = line.get("killed", killed)
        if ended:
            return
        status = worker.process.returncode
        # 3 after a case whose own row says what became of the card
        if killed or status != 3:
            yield {"stage": stage, "case": case, "error": killed or f"the process ended with status {status}"}
        first = number + 1
        if killed or time.time() >= until or lost == MOST_LOST:
            return
        worker = worker_of(stage, device)


def measure(record: Record, chosen: list[stages.Stage], device: str, end: float, scale: float) -> None:
    """Run the stages one after the other; the process of the next one imports meanwhile."""
    ready = worker_of(chosen[0].name, device) if chosen else None
    for number, stage in enumerate(chosen):
        following = chosen[number + 1 :]
        worker, ready = ready, worker_of(following[0].name, device) if following else None
        left = end - time.time()
        if left <= 0:
            worker.stop()
            record.add({"stage": stage.name, "left_out": "time over before it began"})
            continue
        for row in run_stage(stage.name, worker, device, time.time() + stage.share(left, following, scale)):
            add(record, row)


def measure_tiny(record: Record, chosen: list[stages.Stage]) -> None:
    """Every stage in this process, on the CPU."""
    from card.worker import Setting, work

    class Rows:
        def write(self, line: str) -> None:
            if "row" in (said := json.loads(line)):
                add(record, said["row"])

        def flush(self) -> None:
            pass

    for stage in chosen:
        setting = Setting("cpu", tiny=True, timed=False, until=time.time() + 600)
        work(stage.name, stages.cases_of(stage, setting), setting, 0, Rows())


def add(record: Record, row: Json) -> None:
    record.add(row)
    print(report.line(row), flush=True)


def work_as(stage: str, device: str, pipe: int) -> int:
    """What a worker's process does."""
    from card.worker import Setting, work

    found = stages.find(stage)
    stages.import_module(found.module)
    import torch

    # before the word to begin, so that the first case does not wait for it
    order = json.loads(sys.stdin.readline() or '{"first": 0, "until": 0}')
    if device != "cpu":
        torch.cuda.set_device(device)
    setting = Setting(device, tiny=False, timed=True, until=order["until"])
    with os.fdopen(pipe, "w") as to:
        return work(stage, stages.cases_of(found, setting), setting, order["first"], to)


def check(record: Record, build_seconds: float, test_seconds: float, tiny: bool) -> None:
    """The build, the tests, the sanitizer."""
    built = correctness.build(build_seconds, record.where.get("capability"))
    for rows in (built, correctness.run(test_seconds, tiny)):
        for row in rows:
            add(record, row)


def newest() -> Path | None:
    """The newest file of a card in bench/results."""
    found = [path for path in RESULTS.glob("*.json") if path.read_text(encoding="utf-8").startswith('{\n "gpu"')]
    return max(found, key=lambda path: json.loads(path.read_text())["where"]["date"], default=None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=stages.DEFAULT_SECONDS, help="for everything together")
    parser.add_argument("--output", type=Path, metavar="DIR", help="bench/results; a tiny run leaves nothing there")
    parser.add_argument(
        "--only", nargs="+", metavar="STAGE", help=f"checks, {', '.join(s.name for s in stages.STAGES)}"
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--commit", help="of the sources, where there is no git to ask")
    parser.add_argument("--show", nargs="?", const="newest", metavar="FILE", help="print what a file says, and end")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.worker:
        return work_as(chosen.worker, chosen.device, chosen.pipe)
    if chosen.show:
        path = newest() if chosen.show == "newest" else Path(chosen.show)
        print(report.block(json.loads(path.read_text()) if path else None))
        return 0
    return run(chosen, time.time())


def run(chosen: argparse.Namespace, start: float) -> int:
    """A run from the build to the drawings. Exit status 1 when there is no card."""
    only = set(chosen.only or ())
    wanted = [stage for stage in stages.STAGES if (stage.name in only if only else stage.tiny or not chosen.tiny)]
    if unknown := only - {"checks", *(stage.name for stage in stages.STAGES)}:
        stages.find(sorted(unknown)[0])
    where = where_am_i(chosen.commit)
    if not chosen.tiny and not where["gpu"]:
        print(f"no card was found: {where.get('error') or 'torch sees no CUDA device'}", file=sys.stderr)
        return 1
    if wants_checks(chosen) and not chosen.tiny and (lacking := correctness.why_not_buildable()):
        print(f"the compiled modules are not there and cannot be built: {lacking}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as nowhere:
        folder = chosen.output or (Path(nowhere) if chosen.tiny else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        name = "tiny" if chosen.tiny else name_of(where)
        return fill(Record(folder / f"{name}.json", where, chosen.tiny), wanted, chosen, start)


def wants_checks(chosen: argparse.Namespace) -> bool:
    return not chosen.only or "checks" in chosen.only


def fill(record: Record, wanted: list[stages.Stage], chosen: argparse.Namespace, start: float) -> int:
    """Check, measure, and write what was found."""
    scale = chosen.seconds / stages.DEFAULT_SECONDS
    if wants_checks(chosen):
        check(record, BUILD_SECONDS * scale, TEST_SECONDS * scale, chosen.tiny)
    if chosen.tiny:
        measure_tiny(record, wanted)
    else:
        measure(record, wanted, chosen.device, start + chosen.seconds, scale)
    record.seconds = round(time.time() - start, 1)
    record.write()
    # before the page and the drawings: both can be made again from the file
    print(report.block(record.to_json()), flush=True)
    files = [record.path, *report.write(record.to_json(), record.path)]
    print(json.dumps({"files": [path.name for path in files], **counts(record.rows)}))
    return 0


def counts(rows: Iterable[Json]) -> Json:
    rows = list(rows)
    return {
        "rows": len(rows),
        "with_an_error": sum("error" in row or bool(row.get("errors")) for row in rows),
        "left_out": sum("left_out" in row for row in rows),
    }


if __name__ == "__main__":
    sys.exit(main())
