"""worker: runs the cases of one stage, in a process of its own, and hands its rows over as they come.

An address that a kernel should not have read ends this process's work with the card, and a hang is killed: both cost
one case, and the next process goes on behind it. On the pipe there is a JSON object a line:

    {"begin": number, "case": name}     a case begins
    {"row": {...}}                      one of its rows
    {"end": number}                     the stage is done, or its time is over
"""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TextIO

import torch

Json = dict[str, object]


@dataclass(frozen=True)
class Case:
    """Something to measure: `rows` yields what it found."""

    name: str
    rows: Callable[[], Iterable[Json]]


@dataclass(frozen=True)
class Setting:
    """How the cases run.

    device  where; "cpu" only when nothing is timed
    tiny    small sizes: they show that everything runs
    timed   False: every call is made once and nothing is measured
    until   time.time() from which on no case begins
    """

    device: str
    tiny: bool
    timed: bool
    until: float

    @property
    def seconds_left(self) -> float:
        return self.until - time.time()

    def share(self, parts: int) -> "Setting":
        """The same with one of so many equal parts of the time that is left."""
        return replace(self, until=time.time() + self.seconds_left / parts)


def work(stage: str, cases: Iterable[Case], setting: Setting, first: int, pipe: TextIO) -> int:
    """Run the cases from number `first` on. Returns the exit status: 3 asks for another process."""

    def say(**line: object) -> None:
        pipe.write(json.dumps(line) + "\n")
        pipe.flush()

    cases = list(cases)
    # what was imported is not looked at again whenever a capture collects
    gc.freeze()
    for number, case in enumerate(cases):
        if number < first:
            continue
        if setting.seconds_left <= 0:
            names = [case.name for case in cases[number:]]
            say(row={"stage": stage, "case": ", ".join(names), "left_out": f"time over before {len(names)} cases"})
            break
        say(begin=number, case=case.name)
        start = time.time()
        try:
            for row in case.rows():
                say(row={"stage": stage, "case": case.name, **row})
        # whatever it is, it is this case's, and the others do not need it
        except Exception as error:  # noqa: BLE001
            traceback.print_exc(file=sys.stderr)
            say(row={"stage": stage, "case": case.name, "error": f"{type(error).__name__}: {error}"[:2000]})
        say(took=round(time.time() - start, 2), case=case.name)
        if torch.cuda.is_available() and not _card_answers():
            return 3
    say(end=len(cases))
    return 0


def _card_answers() -> bool:
    """False after an illegal access: nothing that this process asks of the card is done any more."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def errors_of(calls: dict[str, Callable[[], object]]) -> Iterator[tuple[str, str]]:
    """The names of the calls that raise, with what they raise."""
    for name, call in calls.items():
        try:
            call()
        # one candidate's failure is a fact about it; the rest is measured
        except Exception as error:  # noqa: BLE001
            yield name, f"{type(error).__name__}: {error}"[:500]
