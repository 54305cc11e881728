"""End to end: the sparse copy computes what the model computes, and the model stays as it was."""

import json

import pytest
import torch
from torch import nn

from sparsekern import hf
from sparsekern.endtoend import EndToEnd, compare_end_to_end
from sparsekern.linear import SparseLinear
from sparsekern.pattern import Unstructured
from sparsekern.plan import Unmeasured
from tests import tiny_models


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    model = tiny_models.llama().eval()
    for _, layer in hf.layers(model):
        weight = hf.weight(layer)
        weight.masked_fill_(~Unstructured(0.5, "row").mask(weight.abs()), 0.0)
    return model


def compare(model, **changes) -> EndToEnd:
    return compare_end_to_end(model, **{"tokens": (1, 5), "seconds": 0, "plan": Unmeasured()} | changes)


def test_dense_and_sparse_are_compared_at_every_number_of_tokens(pruned):
    seen, before = [], {name: parameter.clone() for name, parameter in pruned.named_parameters()}
    result = compare(pruned, progress=lambda *at: seen.append(at))
    assert [each.tokens for each in result.passes] == [1, 5]
    assert all(each.difference < 1e-5 for each in result.passes)
    assert result.sparse_bytes < result.dense_bytes
    assert len(result.swap["swapped"]) == 3 * 7
    assert json.loads(json.dumps(result.to_json()))["passes"][1]["tokens"] == 5
    assert "logits differ by" in str(result)
    assert seen == [(1, 2), (2, 2)]
    # the model itself stays as it was
    assert not any(isinstance(module, SparseLinear) for module in pruned.modules())
    assert all(torch.equal(before[name], parameter) for name, parameter in pruned.named_parameters())


def test_logits_that_disagree_are_not_timed(pruned, monkeypatch):
    def spoil(model, **_):
        model.model.layers[0].mlp.down_proj = nn.Linear(48, 32, bias=False)

    monkeypatch.setattr("sparsekern.endtoend.sparsify", spoil)
    monkeypatch.setattr("sparsekern.endtoend.alternate", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(RuntimeError, match=r"logits of 1 tokens, sparse and dense, differ by .*, allowed is 0.001"):
        compare(pruned)


def test_no_tokens_are_refused(pruned):
    with pytest.raises(ValueError, match="tokens must be one or more positive numbers"):
        compare(pruned, tokens=())
