"""Work in forked children that may crash, hang or eat memory: the parent notices, says so, and goes on."""

import json
import os
import resource
import signal
from collections.abc import Callable, Iterable

SECONDS = 60
# much more than any of this needs, much less than a lie of 2^40 asks for
MEMORY_BYTES = 8 << 30


def outcomes(numbers: Iterable[int], work: Callable[[int], str]) -> dict[int, str]:
    """work(number) of each, made in one child after the other; "fault: ..." where the child died of it."""
    left, found = list(numbers), {}
    while left:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _work(left, work, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            for line in pipe:
                number, outcome = json.loads(line)
                found[number] = outcome
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = [number for number in left if number not in found]
        if left:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
            found[left.pop(0)] = f"fault: the process ended with {how}"
    return found


def at_once(numbers: Iterable[int], work: Callable[[int], str], processes: int) -> dict[int, str]:
    """outcomes() of each, shared out among so many processes."""
    numbers, children = list(numbers), []
    for part in range(processes):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as pipe:
                json.dump(list(outcomes(numbers[part::processes], work).items()), pipe)
            os._exit(0)
        os.close(writing)
        children.append((child, reading))
    found = {}
    for child, reading in children:
        with os.fdopen(reading) as pipe:
            found |= dict(json.load(pipe))
        os.waitpid(child, 0)
    return found


def _work(numbers: list[int], work: Callable[[int], str], writing: int) -> None:
    """The child: never returns."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        with os.fdopen(writing, "w", buffering=1) as pipe:
            for number in numbers:
                # who hangs is ended by SIGALRM
                signal.alarm(SECONDS)
                pipe.write(json.dumps([number, work(number)]) + "\n")
        code = 0
    finally:
        os._exit(code)
