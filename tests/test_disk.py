"""A full disk and a read-only one: what is saved is there whole or not at all. soak/soak_disk.py tries every size."""

import errno

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import checkpoint, hf_files
from sparsekern.publish import publish
from tests import tiny_models
from tests.pruned_directories import contents, saved, streaming_run
from tests.small_disk import on_a_small_disk

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = 4096


def plain():
    torch.manual_seed(0)
    model = nn.ModuleDict({str(i): nn.Linear(64, 40) for i in range(4)})
    with torch.no_grad():
        for layer in model.values():
            layer.weight[:, ::2] = 0
    return model


def save_plain(directory):
    sk.save(plain(), directory, shard_bytes=9000, files={"README.md": "# A card\n"})


def save_llama(directory):
    hf_files.save(tiny_models.make("llama"), None, directory, {"README.md": "# A card\n"})


def write_files(directory):
    with publish(directory) as unfinished:
        for number in range(3):
            (unfinished / "deep" / str(number)).mkdir(parents=True)
            (unfinished / "deep" / str(number) / "file").write_bytes(b"x" * 3 * PAGE)


WRITERS = {"sk.save": save_plain, "hf.save": save_llama, "publish": write_files}


def sweep(disk, write, sizes, whole):
    """Write on a disk of each size: the pages it took to succeed. What failed must have left nothing."""
    target = disk.folder / "out"
    for pages in sizes:
        disk.resize(pages * PAGE)
        failure = None
        try:
            write(target)
        except Exception as error:  # noqa: BLE001 - whoever writes says it in his own words
            failure = error
        if failure:
            assert getattr(failure, "errno", None) == errno.ENOSPC or "No space left" in str(failure), repr(failure)
            assert disk.left() == [], f"{pages} pages: {failure}"
            continue
        assert {name: len(data) for name, data in contents(target).items()} == whole
        return pages
    raise AssertionError(f"{sizes[-1]} pages are too few")


def sizes_of(write, directory):
    write(directory)
    return {name: len(data) for name, data in contents(directory).items()}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_does_not_fit_leaves_nothing(write, tmp_path):
    (tmp_path / "disk").mkdir()
    whole = sizes_of(write, tmp_path / "whole")
    most = sum(-(-size // PAGE) + 2 for size in whole.values()) + 16
    sizes = [1, 2, 3, *range(5, most, max(most // 12, 1)), most]
    assert on_a_small_disk(tmp_path / "disk", lambda disk: sweep(disk, write, sizes, whole)) > 3


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_read_only_disk_is_refused_in_words(write, tmp_path):
    (tmp_path / "disk").mkdir()

    def work(disk):
        disk.resize(1 << 20, read_only=True)
        with pytest.raises(OSError, match="Read-only file system"):
            write(disk.folder / "out")
        assert disk.left() == []
        return True

    assert on_a_small_disk(tmp_path / "disk", work)


def test_what_was_saved_before_survives_a_full_disk(tmp_path):
    (tmp_path / "disk").mkdir()

    def work(disk):
        save_plain(disk.folder / "old")
        before = contents(disk.folder / "old")
        disk.resize((sum(map(len, before.values())) // PAGE + 14) * PAGE)
        with pytest.raises(OSError, match="No space left"):
            save_plain(disk.folder / "out")
        with pytest.raises(FileExistsError):
            save_plain(disk.folder / "old")
        checkpoint.verify(disk.folder / "old")
        return contents(disk.folder / "old") == before

    assert on_a_small_disk(tmp_path / "disk", work)


def streaming(disk, source, wanted, sizes, method=None):
    """The same run on a disk that grows: it fails, goes on, and ends with the bytes of a run that never failed."""
    run = streaming_run("llama", source, disk.folder / "out", pattern="2:4", method=method or sk.methods.Magnitude())
    failed = 0
    for pages in sizes:
        disk.resize(pages * PAGE)
        failure = None
        try:
            run()
        except OSError as error:
            failure = error
        if failure:
            assert failure.errno == errno.ENOSPC, repr(failure)
            assert not (disk.folder / "out").exists()
            failed += 1
            continue
        assert contents(disk.folder / "out") == wanted
        return failed
    raise AssertionError("it never fitted")


def test_streaming_that_ran_out_of_disk_goes_on_when_there_is_more(tmp_path):
    (tmp_path / "disk").mkdir()
    source = saved("llama", tmp_path / "dense")
    streaming_run("llama", source, tmp_path / "wanted", pattern="2:4", method=sk.methods.Magnitude())()
    wanted = contents(tmp_path / "wanted")
    most = 4 * sum(-(-path.stat().st_size // PAGE) + 2 for path in source.iterdir()) + 64
    sizes = [4, 12, 24, *range(36, most, 24)]
    assert on_a_small_disk(tmp_path / "disk", lambda disk: streaming(disk, source, wanted, sizes)) >= 3
