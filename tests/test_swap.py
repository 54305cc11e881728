"""Swap: own dense panels, the output embedding, and what the report says of them; test_linear.py has the rest."""

import json

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.decisions import Decision
from sparsekern.formats import Bitmap, BitmapInt8, Dense
from tests import tiny_models


class AsOwnDense:
    """A plan that finds own panels faster."""

    def decide(self, packings, weight, tokens):
        return Decision("dense", "reference", "own dense panels, 1.50x at 1 tokens over F.linear", {})


@pytest.fixture
def tied():
    torch.manual_seed(0)
    model = tiny_models.llama(tie_word_embeddings=True).eval().requires_grad_(False)
    sk.prune(model, sk.Magnitude(), 0.5)
    return model


def same(model, ids, logits):
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_layers_in_own_panels_are_counted_apart_from_sparse_ones(tied):
    ids = torch.arange(5)[None]
    logits = tied(ids).logits
    report = sk.sparsify(tied, plan=AsOwnDense())
    assert not report.swapped
    assert len(report.own_dense) == len(tied.model.layers) * 7
    assert (report.dense_bytes, report.packed_bytes) == (0, 0)
    assert f"0 layers swapped, {len(report.own_dense)} run dense in own panels, 1 stay dense" in str(report)
    assert "own panels: model.layers.0.self_attn.q_proj and" in str(report)
    assert json.loads(json.dumps(report.to_json()))["own_dense"][0]["format"] == "dense"
    same(tied, ids, logits)


def test_own_panels_are_saved_as_any_linear_layer(tied, tmp_path):
    sk.sparsify(tied, plan=AsOwnDense(), lm_head="dense")
    report = sk.save(tied, tmp_path / "saved")
    assert report.packed["model.layers.0.mlp.up_proj"]["format"] == "bitmap"
    loaded = sk.load(tmp_path / "saved")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.arange(5)[None]
    same(loaded, ids, tied(ids).logits)


def test_a_tied_output_embedding_becomes_a_copy_that_the_report_counts_and_densify_ties_again(tied):
    ids = torch.arange(5)[None]
    logits = tied(ids).logits
    report = sk.sparsify(tied, plan=sk.Unmeasured(Dense), lm_head="dense")
    assert isinstance(tied.lm_head, sk.SparseLinear)
    assert report.copied_bytes == tied.lm_head.nbytes >= tied.model.embed_tokens.weight.nbytes
    assert f"a copy of {report.copied_bytes:,} bytes" in str(report)
    same(tied, ids, logits)
    sk.densify(tied)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    same(tied, ids, logits)


def test_the_output_embedding_stays_where_it_is_not_asked_for(tied):
    report = sk.sparsify(tied, plan=sk.Unmeasured(Dense))
    assert report.dense == [("lm_head", "skipped by name")]
    assert report.copied_bytes == 0


def test_a_tied_input_embedding_under_another_name_is_never_swapped():
    model = nn.Sequential(nn.Embedding(64, 100), nn.Linear(100, 64, bias=False))
    model[1].weight = model[0].weight
    assert sk.sparsify(model, plan=sk.Unmeasured(Dense), lm_head="dense").dense == [("1", "its weight is tied")]


def test_a_plan_may_take_one_format_alone(tied):
    report = sk.sparsify(tied, plan=sk.Unmeasured(Bitmap))
    assert {row["format"] for row in report.swapped} == {"bitmap"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"values": "int7"}, 'values must be "int8" or None'), ({"lm_head": True}, 'lm_head must be "dense", "int8"')],
    ids=["values", "lm_head"],
)
def test_a_choice_that_is_none_is_refused_before_anything_is_swapped(tied, choice, message):
    with pytest.raises(ValueError, match=message):
        sk.sparsify(tied, plan=sk.Unmeasured(), **choice)
    assert not any(isinstance(module, sk.SparseLinear) for module in tied.modules())


def test_kept_weights_become_int8_only_where_that_is_asked_and_the_report_says_by_how_much(tied):
    assert {row["format"] for row in sk.sparsify(tied, plan=sk.Unmeasured()).swapped} == {"bitmap"}
    sk.densify(tied)
    weight = tied.model.layers[0].mlp.up_proj.weight.clone()
    ids = torch.arange(5)[None]
    logits = tied(ids).logits
    report = sk.sparsify(tied, plan=sk.Unmeasured(), values="int8")
    assert {row["format"] for row in report.swapped} == {"bitmap_int8"}
    row = next(row for row in report.swapped if row["name"] == "model.layers.0.mlp.up_proj")
    rounded = tied.model.layers[0].mlp.up_proj.weight
    assert row["error"] == pytest.approx(float((rounded - weight).norm() / weight.norm()))
    assert 0 < row["error"] < 0.01
    assert "weights moved by" in str(report)
    assert (tied(ids).logits - logits).norm() < 0.05 * logits.norm()
    tied.bfloat16()
    assert tied.model.layers[0].mlp.up_proj.dtype == torch.bfloat16
    assert type(tied.model.layers[0].mlp.up_proj.packed) is BitmapInt8


def test_an_output_embedding_in_int8_is_a_copy_and_the_input_embedding_keeps_its_bits(tied):
    before = tied.model.embed_tokens.weight.clone()
    report = sk.sparsify(tied, plan=sk.Unmeasured(), lm_head="int8")
    assert report.swapped[-1]["name"] == "lm_head"
    assert report.swapped[-1]["format"] == "bitmap_int8"
    assert report.copied_bytes == tied.lm_head.nbytes
    assert torch.equal(tied.model.embed_tokens.weight, before)
    sk.densify(tied)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_a_plan_checks_int8_kernels_against_their_own_weights():
    weight = torch.randn(64, 96).mul_(torch.rand(64, 96) < 0.5).bfloat16()
    packed = BitmapInt8.pack(weight)
    decision = sk.Plan(seconds=0.0, arena=1 << 16).decide((packed,), weight, tokens=(1, 3))
    assert decision.format in (None, "bitmap_int8", "dense")
