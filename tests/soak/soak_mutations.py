"""Thousands of mutated checkpoints: no crash, no hang, nothing accepted that is not true.

    pytest -s tests/soak/soak_mutations.py          or all of these by `make soak`

Each is given to verify() and load(), with hashes and without: a plain module's to load(into=), a Llama's to load(),
which goes through transformers.
"""

import os

import pytest
import torch

import sparsekern as sk
from tests import tiny_models
from tests.forked import at_once
from tests.mutations import contents
from tests.test_mutations import load_plain, plus_zero, saved_plain, summary, work_on

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN, LLAMA = 5000, 1000


def saved_llama(directory):
    model = tiny_models.make("llama").to(torch.bfloat16)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight[:, :: 2 if name.endswith("v_proj") else 3] = 0
                module.weight[1::3] = 0
    sk.save(model, directory, shard_bytes=40_000)
    return directory


def load_llama(directory, hashes):
    loaded = plus_zero(sk.load(directory, hashes=hashes))
    # a tied tensor is stored once
    stored = contents(directory)
    return {name: tensor for name, tensor in loaded.items() if name in stored}


@pytest.mark.parametrize(
    ("save", "load", "count"),
    [(saved_plain, load_plain, PLAIN), (saved_llama, load_llama, LLAMA)],
    ids=["plain", "llama"],
)
def test_no_mutated_checkpoint_crashes_or_is_accepted_with_a_lie(save, load, count, tmp_path):
    original = save(tmp_path / "saved")
    # transformers imports a model's code when it is first wanted: once, not in each child
    load(original, True)
    found = at_once(range(count), work_on(original, tmp_path, load), os.cpu_count() or 1)
    table, faults = summary(found)
    print(f"\n{count} mutated checkpoints\n{table}")
    assert faults == []
    assert len(found) == count
