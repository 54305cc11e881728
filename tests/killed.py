"""A run in a child process that is killed by SIGKILL: before its n-th call that changes the disk, or within it.

The child is forked, so that nothing is imported again. What the kernel was given by then stays, as after any kill.
"""

import contextlib
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

CALLS = ("write", "pwrite", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "ftruncate", "truncate")
# those of which a half can be made
HALVED = ("write", "pwrite", "write_text")
# a child that has left this code has failed
FAILED = 77


def _half(call: str, own: Callable, args: tuple) -> None:
    """Do the first half of a call that has one."""
    if call == "write":
        own(args[0], args[1][: len(args[1]) // 2])
    elif call == "pwrite":
        own(args[0], args[1][: len(args[1]) // 2], *args[2:])
    elif call == "write_text":
        own(args[0], args[1][: len(args[1]) // 2], **{"encoding": "utf-8"})


@contextlib.contextmanager
def counted(strike: Callable[[int, str, Callable, tuple], None]) -> Iterator[list[str]]:
    """While open, `strike` is told of each call that changes the disk before it is made; yields their names so far."""
    made: list[str] = []

    def watch(place: object, name: str) -> Callable:
        own = getattr(place, name)

        def call(*args, **kwargs):
            made.append(name)
            strike(len(made), name, own, args)
            return own(*args, **kwargs)

        setattr(place, name, call)
        return lambda: setattr(place, name, own)

    undo = [watch(os, name) for name in CALLS] + [watch(pathlib.Path, "write_text")]
    try:
        yield made
    finally:
        for back in undo:
            back()


def stop_after(monkeypatch, blocks: int, error: BaseException | type = KeyboardInterrupt) -> None:
    """From now on the shards of so many blocks get their name, and the next one raises an error."""
    written, replace = [], os.replace

    def stop(*args):
        if len(written) == blocks:
            raise error
        written.append(args)
        replace(*args)

    monkeypatch.setattr(os, "replace", stop)


def calls(run: Callable[[], object]) -> list[str]:
    """The calls that change the disk in one run, made here and now."""
    with counted(lambda *_: None) as made:
        run()
    return made


def killed(run: Callable[[], object], at: int | None = None, within: bool = False, after_s: float = 0.0) -> bool:
    """Run in a child that is killed; True when it was, False when it had ended before.

    at       before this call, the first is 1; None: by the clock
    within   half of that call is made
    after_s  seconds until the kill, by the clock

    Raises RuntimeError when the child fails by itself.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        # the child must not go on with the tests, whatever happens
        try:
            _run_and_die(run, at, within)
        finally:
            os._exit(FAILED)
    if at is None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the run failed by itself")
    return os.WIFSIGNALED(status)


def _run_and_die(run: Callable[[], object], at: int | None, within: bool) -> None:
    def strike(number: int, name: str, own: Callable, args: tuple) -> None:
        if number == at:
            if within:
                _half(name, own, args)
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with counted(strike):
            run()
    except Exception:
        traceback.print_exc()
        raise
    os._exit(0)
