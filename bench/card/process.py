"""process: other programs, each in a group with what it starts itself, so that both are stopped together.

compute-sanitizer starts the program that it watches, and ninja starts compilers: stopped alone they would leave those
behind, on the card and on the processor while something is timed.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence


def start(command: Sequence[str], **options: object) -> subprocess.Popen:
    """Popen(command, ...) as the first of a group. Not of a session: what ends ours ends them too."""
    return subprocess.Popen(command, preexec_fn=os.setpgrp, **options)


def stop(process: subprocess.Popen) -> None:
    """End a process that `start` has started, and its whole group; nothing where all have ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def wait(process: subprocess.Popen, until: float) -> bool:
    """Wait until it ends, or until time.monotonic() is `until`: then it is stopped, and this is True."""
    try:
        process.wait(max(until - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return True
    finally:
        # also when we are interrupted, and what a process left behind that ended by itself
        stop(process)
    return False
