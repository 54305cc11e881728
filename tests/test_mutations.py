"""A hundred mutated checkpoints: none crashes, none is accepted with a lie. soak/soak_mutations.py makes thousands."""

import os
import shutil
import signal
from collections import Counter

import pytest
import torch
from torch import nn

import sparsekern as sk
from tests.forked import outcomes
from tests.mutations import contents, judge, mutate, same

pytestmark = pytest.mark.usefixtures("one_thread")


def plain():
    """Two bitmap layers of one shape, a 2:4 layer, a dense one, a norm."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"a": nn.Linear(45, 9), "b": nn.Linear(24, 8, bias=False), "c": nn.Linear(45, 9), "norm": nn.LayerNorm(7)}
    )
    with torch.no_grad():
        for name in ("a", "c"):
            weight = model[name].weight
            # as many kept in both, so that they can be swapped
            weight[torch.arange(405).view(9, 45) % 4 != (0 if name == "a" else 1)] = 0
        model["b"].weight[:, ::2] = 0
    return model.to(torch.bfloat16)


def plus_zero(model):
    """The state of `model`; what its packed layers hold is never -0.0, as judge() has it."""
    packed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, sk.SparseLinear)}
    return {name: tensor + 0.0 if name in packed else tensor for name, tensor in model.state_dict().items()}


def load_plain(directory, hashes):
    return plus_zero(sk.load(directory, into=plain(), hashes=hashes))


def saved_plain(directory):
    sk.save(plain(), directory, shard_bytes=700, files={"README.md": "# A card\n"})
    return directory


def work_on(original, folder, load):
    """The work of one number: a mutated copy of `original`, judged and removed."""
    held = contents(original)

    def work(number):
        copy = folder / f"{number}"
        shutil.copytree(original, copy)
        name, fresh = mutate(copy, number)
        verdict = judge(copy, held, load, fresh)
        shutil.rmtree(copy)
        return f"{verdict} ({name}, {'hashed anew' if fresh else 'stale hashes'})"

    return work


def summary(found):
    """How many of each outcome, and every fault in full."""
    lines = [f"{count:6} {outcome}" for outcome, count in sorted(Counter(found.values()).items())]
    return "\n".join(lines), [f"{n}: {found[n]}" for n in sorted(found) if found[n].startswith("fault")]


def test_what_was_saved_is_judged_equal_and_read_by_the_library_as_by_us(tmp_path):
    original = saved_plain(tmp_path / "saved")
    held = contents(original)
    assert same(held, load_plain(original, hashes=True))
    assert judge(original, held, load_plain, fresh=False) == "equal"


def test_the_judge_sees_a_wrong_load_and_a_crash(tmp_path):
    original = saved_plain(tmp_path / "saved")
    held = contents(original)
    wrong = judge(original, held, lambda *_: held | {"a.bias": held["c.bias"]}, fresh=False)
    assert wrong == "fault: loaded is not what the files hold, hashes=True"

    def crash(*_):
        raise KeyError("a")

    assert judge(original, held, crash, fresh=False) == "fault: KeyError: 'a'"


def test_a_child_that_dies_is_a_fault_and_the_next_goes_on():
    def work(number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return "fine"

    assert outcomes([0, 1, 2], work) == {0: "fine", 1: "fault: the process ended with signal SIGKILL", 2: "fine"}


def test_no_mutated_checkpoint_crashes_or_is_accepted_with_a_lie(tmp_path):
    work = work_on(saved_plain(tmp_path / "saved"), tmp_path, load_plain)
    found = outcomes(range(0, 1000, 7), work)
    table, faults = summary(found)
    assert faults == []
    assert len(found) == 143
    # the others: hashed anew or not hashed, and what their files say they are
    assert sum(outcome.startswith("refused") for outcome in found.values()) >= 80, table
