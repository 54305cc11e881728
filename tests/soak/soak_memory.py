"""A model is pruned in a process that may hold less than the model, and gets the bits of prune() in memory."""

import time

import pytest
import torch

import sparsekern as sk
from sparsekern import hf
from sparsekern.model_files import read, tensors_of
from sparsekern.streaming import prune_streaming
from tests.limited import data_bytes, random_checkpoint, under_limit

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
}


def test_a_model_larger_than_the_limit_of_the_process_is_pruned(tmp_path):
    size = random_checkpoint(tmp_path / "dense", **SIZES)
    batches = list(torch.randint(0, 4096, (4, 1, 64), generator=torch.Generator().manual_seed(1)))
    own, limit = data_bytes(), data_bytes() + size // 4

    def whole():
        model = hf.load(tmp_path / "dense")
        sk.prune(model, sk.Wanda(), 0.5, batches, errors=False)
        hf.save(model, None, tmp_path / "whole", {})

    def streaming():
        prune_streaming(tmp_path / "dense", tmp_path / "out", sk.Wanda(), 0.5, batches, errors=False)

    assert limit < size
    began = time.perf_counter()
    said, peak = under_limit(streaming, limit)
    seconds = time.perf_counter() - began
    assert said is None
    assert peak < size / 2
    print(
        f"\n{size / 1e6:,.0f} MB pruned by a process of {own / 1e6:,.0f} MB that was allowed {limit / 1e6:,.0f} MB: "
        f"at most {peak / 1e6:,.0f} MB resident, {seconds:.0f} s"
    )
    refused, _ = under_limit(whole, limit)
    assert refused is not None
    print(f"in memory, allowed as much: {refused[:150]}")
    said, peak = under_limit(whole, 2**62)
    assert said is None
    print(f"in memory, allowed all: at most {peak / 1e6:,.0f} MB resident")
    want, got = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert want.keys() == got.keys()
    assert [name for name in want if not torch.equal(read(want[name]), read(got[name]))] == []
