"""demo: the methods come in the papers' order on the shipped model, and what is shown is what was measured."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console

import sparsekern as sk
from sparsekern import demo, hf, text
from sparsekern.measure import perplexity


def test_at_60_percent_each_method_is_better_than_the_one_before_it():
    dense, tokenizer = hf.load(demo.MODEL), hf.tokenizer(demo.MODEL)
    tokens = text.tokenize(tokenizer, text.read_text(demo.MODEL / "heldout.txt"))[: 40 * demo.SEQLEN]
    calibration = text.tokenize(tokenizer, text.read_text(demo.MODEL / "calibration.txt"))
    batches = text.windows(calibration, demo.SEQLEN, 16)
    values = [perplexity(dense, tokens, demo.SEQLEN).value]
    for method in (sk.ADMM(), sk.SparseGPT(), sk.Wanda(), sk.Magnitude()):
        model = copy.deepcopy(dense)
        sk.prune(model, method, 0.6, batches)
        values.append(perplexity(model, tokens, demo.SEQLEN).value)
    worse = [after / before for before, after in zip(values, values[1:], strict=False)]
    assert min(worse) > 1.02, values


@pytest.fixture(scope="module")
def small():
    """The demo with everything in it made small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "CALIBRATION_WINDOWS", 2)
        patch.setattr(demo, "PATTERNS", (0.5, "2:4"))
        patch.setattr(demo, "REAL_MODEL", "tiny")
        yield demo.run(speed_seconds=2.0, windows=4)


def test_every_method_and_pattern_has_its_perplexity(small):
    dense, *rows = small.pruned
    assert (dense.method, dense.sparsity) == (None, 0.0)
    assert [(row.method, row.pattern) for row in rows] == [
        (method, pattern) for method in ("magnitude", "wanda", "sparsegpt", "admm") for pattern in ("50%", "2:4")
    ]
    assert all(row.perplexity.sha256 == dense.perplexity.sha256 for row in rows)


def test_the_swapped_model_says_what_the_pruned_one_said(small):
    swap = small.swapped
    assert sum(swap.kernels.values()) == 28
    assert swap.after.value == pytest.approx(swap.before.value, rel=0.02)
    assert swap.same_token > 0.95
    assert swap.packed_bytes < 0.7 * swap.dense_bytes


def test_the_tables_and_the_json_show_the_figures(small):
    console = Console(width=160, record=True, file=io.StringIO())
    for part in small.tables():
        console.print(part)
    shown = console.export_text()
    for row in small.pruned:
        assert f"{row.perplexity.value:.2f}" in shown
    written = json.loads(json.dumps(small.to_json()))
    assert len(written["pruned"]) == 9
    assert written["speed"]["rows"]


def test_the_picture_is_drawn(small, tmp_path):
    demo.plot(small, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_shipped_model_is_loaded_in_bfloat16_with_no_network():
    assert {p.dtype for p in hf.load(demo.MODEL).parameters()} == {torch.bfloat16}
