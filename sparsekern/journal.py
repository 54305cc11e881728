"""journal: what a long run has done, on the disk, so that it can go on after it was killed at any point.

A file of JSON lines, each added and synced before the run goes on. The first says what the run's result depends on, the
others what is done. A line that a kill has cut short is the last, and does not count.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """The lines of a run, an earlier one's or none.

    path   of the file
    facts  what the run's result depends on, in words -> a value that JSON holds

    done  what was said of each thing that is done, by its name

    Raises ValueError when the file is of a run with other facts, naming each with both values, or makes no sense.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]):
        self._path = path
        lines, whole = _lines(path)
        # as they come back from a file
        facts = json.loads(json.dumps(facts))
        if lines and (changed := "; ".join(_changed(lines[0], facts))):
            raise ValueError(changed)
        self.done: dict[str, Any] = dict(lines[1:])
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, whole)
        if not lines:
            self._write(facts)

    def add(self, name: str, said: Any) -> None:
        """Say that something is done. It is on the disk when this returns."""
        self._write([name, said])
        self.done[name] = said

    def close(self) -> None:
        os.close(self._file)

    def _write(self, line: Any) -> None:
        octets = json.dumps(line).encode() + b"\n"
        while octets:
            octets = octets[os.write(self._file, octets) :]
        os.fsync(self._file)


def _lines(path: Path) -> tuple[list[Any], int]:
    """The lines that were written whole, and their bytes."""
    octets = path.read_bytes() if path.exists() else b""
    whole = octets.rfind(b"\n") + 1
    try:
        lines = [json.loads(line) for line in octets[:whole].splitlines()]
        if lines and not (isinstance(lines[0], dict) and all(len(line) == 2 for line in lines[1:])):
            raise ValueError("its lines are not a journal's")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r} makes no sense: {error}") from error
    return lines, whole


def _changed(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Which values differ, in words; a mapping's by their names."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _changed(before.get(key), now.get(key), f"{name}, {key}" if name else key)
    elif before != now:
        yield f"{name} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    words = "nothing" if value is None else str(value)
    return words if len(words) <= 80 else f"{words[:77]}..."
