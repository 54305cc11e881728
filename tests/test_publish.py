"""publish: old or new, never a mix; one writer at a time; nothing stays behind."""

import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from sparsekern.publish import lock, publish

# a spawned process would import torch first
FORK = multiprocessing.get_context("fork")


def tree(directory):
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*"))


def test_the_directory_appears_when_the_block_ends_and_not_before(tmp_path):
    with publish(tmp_path / "out") as unfinished:
        (unfinished / "a.txt").write_text("a")
        (unfinished / "inner").mkdir()
        (unfinished / "inner" / "b.txt").write_text("b")
        assert not (tmp_path / "out").exists()
        assert unfinished.parent.parent == tmp_path
    assert tree(tmp_path) == ["out", "out/a.txt", "out/inner", "out/inner/b.txt"]


def test_every_file_and_directory_is_synced_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    with publish(tmp_path / "new" / "out") as unfinished:
        (unfinished / "inner").mkdir()
        (unfinished / "inner" / "b.txt").write_text("b")
    hidden = str(unfinished)
    parents = [str(tmp_path / "new"), str(tmp_path)]
    assert events == [f"{hidden}/inner/b.txt", f"{hidden}/inner", hidden, "rename", *parents]


def test_the_directory_is_as_open_as_one_made_by_mkdir(tmp_path):
    (tmp_path / "plain").mkdir()
    with publish(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_block_that_fails_leaves_nothing(error, tmp_path):
    def fail():
        with publish(tmp_path / "out") as unfinished:
            (unfinished / "a.txt").write_text("a")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert tree(tmp_path) == []


def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path):
    def write():
        with publish(tmp_path / "out") as unfinished:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            (unfinished / "big").write_bytes(bytes(2000))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert tree(tmp_path) == []


def test_a_disk_that_fails_when_it_is_synced_leaves_nothing(tmp_path, monkeypatch):
    def broken(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"), publish(tmp_path / "out") as unfinished:
        (unfinished / "a.txt").write_text("a")
    assert tree(tmp_path) == []


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_existing_target_is_left_alone(kind, when, tmp_path):
    target = tmp_path / "out"

    def make():
        if kind == "directory":
            target.mkdir()
            (target / "kept.txt").write_text("kept")
        elif kind == "file":
            target.write_text("kept")
        else:
            target.symlink_to(tmp_path / "nowhere")

    if when == "before":
        make()
    with pytest.raises(FileExistsError, match=r"out' exists already; remove it or choose another"), publish(target):
        make()
    assert tree(tmp_path) == (["out", "out/kept.txt"] if kind == "directory" else ["out"])


def test_a_parent_that_cannot_be_written_is_an_error_and_stays_as_it_was():
    # pytest's own directories are closed to anybody else, so this one is made elsewhere
    parent = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    try:
        parent.chmod(0o555)
        if is_root:
            os.seteuid(65534)
        with pytest.raises(PermissionError), publish(parent / "out"):
            pass
        with pytest.raises(PermissionError), lock(parent / "out"):
            pass
    finally:
        if is_root:
            os.seteuid(0)
        assert tree(parent) == []
        shutil.rmtree(parent)


def test_a_parent_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="file' is a file"), publish(tmp_path / "file" / "out"):
        pass
    assert (tmp_path / "file").read_text() == "kept"


def write_and_die(directory):
    with publish(directory) as unfinished:
        (unfinished / "a.txt").write_text("a")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    killed = FORK.Process(target=write_and_die, args=(tmp_path / "out[1]",))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with publish(tmp_path / "out[1]") as unfinished:
        assert [path.name for path in tmp_path.iterdir()] == [unfinished.parent.name]
    assert tree(tmp_path) == ["out[1]"]


def test_a_file_or_a_link_of_such_a_name_stays(tmp_path):
    (tmp_path / ".out.unfinished-file").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.unfinished-link").symlink_to(tmp_path / "elsewhere")
    with publish(tmp_path / "out"):
        pass
    assert tree(tmp_path) == [".out.unfinished-file", ".out.unfinished-link", "elsewhere", "out"]


def test_what_another_process_is_writing_stays(tmp_path):
    with publish(tmp_path / "out") as first:
        (first / "a.txt").write_text("first")
        with publish(tmp_path / "out") as second:
            (second / "a.txt").write_text("second")
        assert (first / "a.txt").read_text() == "first"
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == "first"


def hold(directory, ready, go):
    with lock(directory):
        ready.set()
        go.wait(60)


def test_a_second_process_is_told_who_holds_the_lock_and_gets_it_afterwards(tmp_path):
    ready, go = FORK.Event(), FORK.Event()
    holder = FORK.Process(target=hold, args=(tmp_path / "out", ready, go))
    holder.start()
    assert ready.wait(60)
    told = rf"out' is being written by process {holder.pid}: wait until it ends"
    with pytest.raises(RuntimeError, match=told), lock(tmp_path / "out"):
        pass
    # another directory has another lock
    with lock(tmp_path / "out2"):
        pass
    go.set()
    holder.join()
    with lock(tmp_path / "out"):
        pass
    assert tree(tmp_path) == []


def test_a_killed_holder_holds_nothing(tmp_path):
    ready, go = FORK.Event(), FORK.Event()
    holder = FORK.Process(target=hold, args=(tmp_path / "out", ready, go))
    holder.start()
    assert ready.wait(60)
    holder.kill()
    holder.join()
    with lock(tmp_path / "out"):
        pass
    assert tree(tmp_path) == []


def count(target, counter):
    done = 0
    while done < 50:
        with suppress(RuntimeError), lock(target):
            counter.write_text(str(int(counter.read_text()) + 1))
            done += 1


def test_of_many_processes_one_at_a_time_holds_the_lock(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    started = [FORK.Process(target=count, args=(tmp_path / "out", counter)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert counter.read_text() == "150"
