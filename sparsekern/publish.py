"""publish: a directory appears whole or not at all, and one process at a time writes it.

What is written goes to a hidden directory beside the target, is synced to the disk, and gets its name by one rename.
A process that was killed leaves only a hidden directory behind, which the next one that writes the same target removes.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class LockedError(RuntimeError):
    """Another process is writing the directory."""


@contextmanager
def publish(directory: str | Path) -> Iterator[Path]:
    """Yields an empty hidden directory that becomes `directory` when the block ends without an error.

    Every file and directory in it is synced before the rename, and the rename after it, so that a power cut leaves the
    old state or the new one too. When the block fails, and when the disk does, nothing stays behind. Missing parents
    are made. Raises FileExistsError when `directory` exists, at the start or, made by somebody else, at the end.
    """
    directory = Path(os.path.abspath(directory))
    refuse_existing(directory)
    made = _make_parents(directory.parent)
    _remove_abandoned(directory)
    hidden, held = _make_hidden(directory)
    # mkdtemp's own directory is closed to everybody else, one made inside it is not
    unfinished = hidden / directory.name
    try:
        unfinished.mkdir()
        yield unfinished
        move(unfinished, directory)
        for path in made:
            _sync(path.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(held)


def move(unfinished: Path, directory: Path) -> None:
    """Give `unfinished`, of the same file system, its name, synced before and after; raises FileExistsError."""
    _sync_below(unfinished)
    refuse_existing(directory)
    try:
        # never replaces anything: on a directory that holds something, and on a file, it fails
        os.rename(unfinished, directory)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            refuse_existing(directory)
        raise
    _sync(directory.parent)


@contextmanager
def lock(directory: str | Path) -> Iterator[None]:
    """While open, no other process that asks for the lock of `directory` gets it; a killed holder holds nothing.

    The lock is on a hidden file beside the directory, removed at the end. Raises LockedError when another holds it.
    """
    directory = Path(os.path.abspath(directory))
    _make_parents(directory.parent)
    path = directory.parent / f".{directory.name}.lock"
    file = _locked(directory, path)
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(file)


def refuse_existing(directory: Path) -> None:
    """Raises FileExistsError when there is anything of that name, a dangling link too."""
    if directory.exists() or directory.is_symlink():
        raise FileExistsError(f"{str(directory)!r} exists already; remove it or choose another directory")


def _locked(directory: Path, path: Path) -> int:
    """`path` opened and locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 20).decode(errors="replace")
            os.close(file)
            if not isinstance(error, BlockingIOError):
                raise
            raise LockedError(
                f"{str(directory)!r} is being written by {f'process {holder}' if holder else 'another process'}: "
                "wait until it ends, or choose another directory"
            ) from None
        # the holder before us may have removed this very file after we opened it: its lock is worth nothing
        if _is_at(file, path):
            return file
        os.close(file)


def _make_parents(parent: Path) -> list[Path]:
    """Make `parent` and those above it; returns what was made."""
    existing = next(path for path in (parent, *parent.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{str(parent)!r} cannot be made: {str(existing)!r} is a file")
    made = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return made


def _prefix(directory: Path) -> str:
    return f".{directory.name}.unfinished-"


def _make_hidden(directory: Path) -> tuple[Path, int]:
    """A hidden directory beside `directory`, and its lock, which says that it is used."""
    while True:
        # beside it, because a rename must not cross file systems
        hidden = Path(tempfile.mkdtemp(dir=directory.parent, prefix=_prefix(directory)))
        # between these lines another process may take it for abandoned
        with suppress(FileNotFoundError):
            held = os.open(hidden, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_EX)
            if _is_at(held, hidden):
                return hidden, held
            os.close(held)


def _remove_abandoned(directory: Path) -> None:
    """Remove the hidden directories of processes that were killed: nobody holds their locks."""
    for hidden in directory.parent.glob(f"{_escape(_prefix(directory))}*"):
        # a file or a link of that name is not ours
        with suppress(FileNotFoundError, BlockingIOError, PermissionError, NotADirectoryError):
            file = os.open(hidden, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(hidden, ignore_errors=True)
            finally:
                os.close(file)


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_below(directory: Path) -> None:
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
