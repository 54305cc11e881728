"""doctor: one kernel serves each kind of weight, and every other one says why it does not."""

import itertools
import json

from sparsekern.doctor import examine
from sparsekern.ops import compiled


def test_each_kind_of_weight_is_served_by_the_first_kernel_that_does_not_refuse():
    rows = examine()["kernels"]
    kind = lambda row: (row["device"], row["format"], row["dtype"])  # noqa: E731
    for _, group in itertools.groupby(rows, kind):
        group = list(group)
        serving = [row["kernel"] for row in group if row["refusal"] is None]
        assert [row["kernel"] for row in group if row["used"]] == serving[:1]
        assert serving[-1] == "reference"


def test_a_missing_module_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(compiled, "why_not", lambda name: f"not built: {name} was not asked for")
    assert examine()["modules"] == {name: f"not built: {name} was not asked for" for name in ("cpu", "cuda", "wgmma")}


def test_the_facts_are_json():
    facts = json.loads(json.dumps(examine()))
    assert facts["libraries"]["torch"]
    assert facts["machine"]["threads"] >= 1
