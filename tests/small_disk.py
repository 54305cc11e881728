"""A disk of a few kilobytes: a tmpfs in a mount namespace of a forked child, for which few machines ask a privilege."""

import ctypes
import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
READ_ONLY, REMOUNT, PRIVATE, RECURSIVE = 1, 32, 1 << 18, 1 << 14
SECONDS = 300


class Disk:
    """The disk at `folder`; only within on_a_small_disk()."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._libc = ctypes.CDLL(None, use_errno=True)
        uid, gid = os.getuid(), os.getgid()
        self._call("unshare", NEW_USER | NEW_MOUNTS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        # what is mounted here is seen nowhere else
        self._call("mount", b"none", b"/", None, PRIVATE | RECURSIVE, None)
        self._call("mount", b"none", bytes(folder), b"tmpfs", 0, b"size=1m")

    def resize(self, size: int, read_only: bool = False) -> None:
        """Make it so many bytes, in pages."""
        flags = REMOUNT | (READ_ONLY if read_only else 0)
        self._call("mount", b"none", bytes(self.folder), b"tmpfs", flags, f"size={size}".encode())

    def left(self) -> list[str]:
        """What lies on it, hidden or not."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))

    def _call(self, name: str, *args: Any) -> None:
        if getattr(self._libc, name)(*args):
            number = ctypes.get_errno()
            raise PermissionError(number, f"{name}: {os.strerror(number)}")


def on_a_small_disk(folder: Path, work: Callable[[Disk], Any]) -> Any:
    """What work(disk) returns, as JSON has it; `folder` is empty and becomes the disk. Fails when it raises or crashes.

    Skips the test where the machine gives no namespace.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(SECONDS)
        with os.fdopen(writing, "w") as pipe:
            try:
                disk = Disk(folder)
            except OSError as error:
                json.dump({"skip": str(error)}, pipe)
            else:
                try:
                    json.dump({"result": work(disk)}, pipe)
                except BaseException:  # noqa: BLE001 - a failed assertion too is the parent's to show
                    json.dump({"raised": traceback.format_exc()}, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert said, f"the process ended with {status}, and a signal is negative"
    answer = json.loads(said)
    if "skip" in answer:
        pytest.skip(f"no disk can be mounted here: {answer['skip']}")
    assert "raised" not in answer, answer["raised"]
    return answer["result"]
