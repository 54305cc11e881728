"""Every writer on a disk of every size, page by page, until it fits; what fails leaves nothing, or goes on.

pytest -s tests/soak/soak_disk.py          or all of these by `make soak`
"""

import pytest

import sparsekern as sk
from tests.pruned_directories import contents, saved, streaming_run
from tests.small_disk import on_a_small_disk
from tests.test_disk import WRITERS, sizes_of, streaming, sweep

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = 4096


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_does_not_fit_leaves_nothing(write, tmp_path):
    (tmp_path / "disk").mkdir()
    whole = sizes_of(write, tmp_path / "whole")
    sizes = range(1, sum(-(-size // PAGE) + 2 for size in whole.values()) + 16)
    pages = on_a_small_disk(tmp_path / "disk", lambda disk: sweep(disk, write, sizes, whole))
    print(f"\nfull at {pages - 1} sizes, written at {pages} pages of {PAGE} bytes")


@pytest.mark.parametrize(
    "method", [sk.methods.Magnitude(), sk.SparseGPT(block_size=16)], ids=lambda m: type(m).__name__
)
def test_streaming_goes_on_whenever_there_is_a_page_more(method, tmp_path):
    (tmp_path / "disk").mkdir()
    source = saved("llama", tmp_path / "dense")
    streaming_run("llama", source, tmp_path / "wanted", pattern="2:4", method=method)()
    wanted = contents(tmp_path / "wanted")
    most = 8 * sum(-(-path.stat().st_size // PAGE) + 2 for path in source.iterdir()) + 64
    full = on_a_small_disk(tmp_path / "disk", lambda disk: streaming(disk, source, wanted, range(1, most), method))
    print(f"\nfull {full} times, then the bytes of a run that never was")
