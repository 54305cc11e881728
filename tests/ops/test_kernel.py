"""pick: the first kernel that does not refuse, or every reason."""

import types

import pytest
import torch

from sparsekern.ops.kernel import Kernel, device_refuses, pick


def kernel(name, reason):
    return Kernel(name, run=None, refuses=lambda size: reason if size > 8 else None)


def test_the_first_that_does_not_refuse_is_picked():
    first, second = kernel("first", "too large"), kernel("second", None)
    assert pick((first, second), 4) is first
    assert pick((first, second), 9) is second


def test_when_all_refuse_each_reason_is_named():
    with pytest.raises(ValueError, match="no kernel accepts these arguments\n  first: too large\n  second: too odd"):
        pick((kernel("first", "too large"), kernel("second", "too odd")), 9)


def test_a_device_refuses_weights_elsewhere_of_other_dtypes_and_of_older_cards(monkeypatch):
    weight = torch.empty(2, 2)
    assert device_refuses(weight, "cpu", (torch.float16, torch.float32)) is None
    assert device_refuses(weight, "cuda", ()) == "the weight must be on a CUDA device, got cpu"
    for dtypes, words in (
        ((torch.bfloat16,), "bfloat16"),
        ((torch.bfloat16, torch.float16), "bfloat16 or float16"),
        ((torch.bfloat16, torch.float16, torch.float64), "bfloat16, float16 or float64"),
    ):
        assert device_refuses(weight, "cpu", dtypes) == f"the weight must be {words}, got torch.float32"
    on_card = types.SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float16)
    assert device_refuses(on_card, "cpu", ()) == "the weight must be on the CPU, got cuda:1"
    capability = {on_card.device: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.get)
    said = "the card must have compute capability 8.0 or more, got 7.5"
    assert device_refuses(on_card, "cuda", (torch.float16,)) == said
    capability[on_card.device] = (8, 0)
    assert device_refuses(on_card, "cuda", (torch.float16,)) is None
