"""Two threads, two processes and forked children use one checkpoint and one layer at the same time."""

import json
import os
import threading

import pytest
import torch

from sparsekern import checkpoint
from sparsekern.linear import SparseLinear
from tests.forked import at_once
from tests.mutations import contents, same
from tests.test_mutations import load_plain, saved_plain


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_threads(work, count):
    """work(number) in so many threads at once; what they raised."""
    raised = []

    def run(number):
        try:
            work(number)
        except Exception as error:  # noqa: BLE001 - shown by the test
            raised.append(repr(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.usefixtures("two_threads")
def test_two_threads_load_the_same_model(tmp_path):
    original = saved_plain(tmp_path / "saved")
    wanted = contents(original)

    def work(_):
        for _ in range(10):
            assert same(load_plain(original, hashes=True), wanted)

    assert in_threads(work, 2) == []


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_processes_load_and_run_what_their_parent_has_run(tmp_path):
    """The parent's thread pools were used before the forks: a child must not wait for them."""
    original = saved_plain(tmp_path / "saved")
    wanted = contents(original)
    torch.manual_seed(0)
    linear = torch.nn.Linear(700, 600, bias=False).requires_grad_(False)
    linear.weight[torch.rand(600, 700) < 0.5] = 0
    layer, x = SparseLinear.from_linear(linear), torch.randn(3, 700)
    y = layer(x)

    def work(number):
        assert same(load_plain(original, hashes=True), wanted)
        assert torch.equal(layer(x), y)
        # many tokens go through torch's own product
        assert layer(x.repeat(800, 1)).isfinite().all()
        assert torch.equal(SparseLinear.from_linear(linear)(x), y)
        return "right"

    assert at_once(range(6), work, processes=2) == dict.fromkeys(range(6), "right")
    assert torch.equal(layer(x), y)


def test_two_processes_save_to_one_place_and_one_of_them_is_told(tmp_path):
    def work(number):
        try:
            saved_plain(tmp_path / "out")
        except FileExistsError as error:
            return json.dumps(str(error))
        return "saved"

    found = list(at_once(range(2), work, processes=2).values())
    assert found.count("saved") == 1
    assert sum("exists already" in outcome for outcome in found) == 1
    checkpoint.verify(tmp_path / "out")
