"""Measure: perplexity against cases computed by hand, bytes counted once, reports that say what they may."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from sparsekern.measure import LOGIT_ROWS, Report, linear_sparsity, machine, measure, perplexity, weight_bytes
from sparsekern.timing import Latency


class Bigram(nn.Module):
    """A language model that is a table: the logits of the next token [vocabulary, vocabulary]."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table, dtype=torch.float32))
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids):
        return SimpleNamespace(logits=self.dropout(self.table[ids]))


def test_a_model_without_logits_is_refused_by_name():
    model = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(ValueError, match="LlamaModel puts out no logits"):
        perplexity(model, torch.arange(9), seqlen=4)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary():
    assert perplexity(Bigram(torch.zeros(7, 7)), torch.arange(20) % 7, seqlen=5).value == pytest.approx(7)


def test_perplexity_by_hand():
    """P(1 | 0) = 3/4, P(0 | 1) = 1/4. Windows 0 1 0 and 1 0 1 make four predictions: 3/4, 1/4, 1/4, 3/4."""
    table = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    result = perplexity(Bigram(table), torch.tensor([0, 1, 0, 1, 0, 1, 0, 0]), seqlen=3)
    by_hand = math.exp(-(2 * math.log(0.75) + 2 * math.log(0.25)) / 4)
    assert result.value == pytest.approx(by_hand, rel=1e-6)
    assert (result.seqlen, result.windows, result.tokens, result.dtype) == (3, 2, 6, "float32")


def test_the_first_token_of_a_window_is_not_predicted_from_the_window_before():
    """0 0 | 1 1: only 0 after 0 and 1 after 1 are asked for, which this model is sure of."""
    sure = torch.tensor([[1.0, 1e-9], [1e-9, 1.0]]).log()
    assert perplexity(Bigram(sure), torch.tensor([0, 0, 1, 1]), seqlen=2).value == pytest.approx(1, abs=1e-6)


def test_perplexity_of_a_window_longer_than_the_logits_taken_at_once():
    model, tokens = Bigram(torch.randn(11, 11)), torch.randint(11, (2 * LOGIT_ROWS + 3,))
    at_once = nn.functional.cross_entropy(model.table.detach()[tokens[:-1]], tokens[1:])
    assert perplexity(model, tokens, seqlen=len(tokens)).value == pytest.approx(math.exp(at_once), rel=1e-5)


def test_perplexity_evaluates_and_leaves_the_model_as_it_was():
    model = Bigram(torch.randn(5, 5)).train()
    model.dropout.eval()
    first, second = (perplexity(model, torch.arange(10) % 5, seqlen=5).value for _ in range(2))
    assert first == second  # dropout was off
    assert model.training
    assert not model.dropout.training


def test_perplexity_hashes_the_tokens_inside_windows():
    model = Bigram(torch.zeros(5, 5))
    results = [perplexity(model, tokens, seqlen=4).sha256 for tokens in (torch.arange(5), torch.arange(4)[None])]
    assert results[0] == results[1]
    assert results[0] != perplexity(model, torch.tensor([0, 1, 2, 4]), seqlen=4).sha256


def test_perplexity_tells_its_progress():
    seen = []
    perplexity(Bigram(torch.zeros(3, 3)), torch.zeros(7, dtype=torch.long), 2, lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="needs at least seqlen = 8 tokens, got 7; use a longer text"):
        perplexity(Bigram(torch.zeros(3, 3)), torch.zeros(7, dtype=torch.long), seqlen=8)


def test_windows_that_predict_nothing_are_refused():
    with pytest.raises(ValueError, match="seqlen must be at least 2"):
        perplexity(Bigram(torch.zeros(3, 3)), torch.zeros(7, dtype=torch.long), seqlen=1)


def test_a_broken_model_is_named():
    with pytest.raises(ValueError, match="the model's loss is nan in window 0 of 2; check the weights for NaN"):
        perplexity(Bigram(torch.full((3, 3), math.nan)), torch.zeros(4, dtype=torch.long), seqlen=2)


def test_bytes_count_what_is_tied_once():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    assert weight_bytes(model) == 2 * 10 * 4 * 4
    model[1].weight = model[0].weight
    assert weight_bytes(model) == 10 * 4 * 4


def test_bytes_count_buffers_and_views_by_their_storage():
    model = nn.Module()
    model.register_buffer("a", torch.zeros(8, dtype=torch.uint8))
    model.register_buffer("b", model.a[2:])
    assert weight_bytes(model) == 8


def test_bytes_of_a_model_without_data_are_those_it_would_have():
    with torch.device("meta"):
        assert weight_bytes(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == 2 * (16 + 4) * 4


def test_sparsity_is_of_linear_weights_but_the_output_embedding():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(3, 4))
    model[0].weight.data.fill_(1)
    model[0].weight.data[:2] = 0
    model[1].weight.data.zero_()
    model[2].weight.data.zero_()
    assert linear_sparsity(model) == 0.75
    model.get_output_embeddings = lambda: model[1]
    assert linear_sparsity(model) == 0.5
    assert linear_sparsity(nn.Embedding(3, 4)) is None


def test_the_machine_is_described_without_names_and_paths():
    facts = machine()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert "/" not in json.dumps({**facts, "cpu": ""})


def a_report(**changes) -> Report:
    ppl = perplexity(Bigram(torch.zeros(4, 4)), torch.arange(12) % 4, seqlen=4)
    facts = {"cpu": "a", "threads": 2, "gpu": None, "torch": "2", "cache_bytes": 100}
    decode = Latency(median=2e-3, p10=1.9e-3, p90=2.1e-3, rounds=50)
    return replace(Report(ppl, 1000, 0.0, decode, "float32", facts), **changes)


def test_a_comparison_of_separate_runs_says_so_and_spans_best_to_worst():
    after = a_report(decode=Latency(median=1e-3, p10=0.9e-3, p90=1.1e-3, rounds=50), bytes=500, linear_sparsity=0.5)
    comparison = after.against(a_report())
    assert comparison.speedup.median == pytest.approx(2)
    assert comparison.speedup.p10 == pytest.approx(1.9 / 1.1)
    assert comparison.speedup.p90 == pytest.approx(2.1 / 0.9)
    text = str(comparison)
    assert "2.00x (1.73–2.33), separate runs" in text
    assert "0.50x" in text  # bytes
    assert "50.0%" in text
    assert json.loads(json.dumps(comparison.to_json()))["speedup"]["separate_runs"] is True


def test_a_comparison_gives_no_speed_up_of_unsteady_runs():
    after = a_report(decode=Latency(median=1e-3, p10=0.5e-3, p90=1.1e-3, rounds=50))
    assert after.against(a_report()).speedup.reason == "after is unsteady: p90 is 2.2 x p10"
    assert "– (after is unsteady: p90 is 2.2 x p10)" in str(after.against(a_report()))
    assert "separate runs" not in str(after.against(a_report()))


def test_a_comparison_gives_no_speed_up_between_machines():
    before = a_report(machine={**a_report().machine, "threads": 8})
    assert a_report().against(before).speedup.reason == "measured on two machines or with other threads"


def test_a_comparison_warns_of_other_tokens():
    before = a_report(perplexity=replace(a_report().perplexity, sha256="other"))
    assert "do not compare them" in str(a_report().against(before))
    assert "do not compare them" not in str(a_report().against(a_report()))


def test_a_report_says_when_the_weights_fit_the_cache():
    assert "fit the cache" in str(a_report(bytes=99))
    assert "fit the cache" not in str(a_report(bytes=100))


def test_measure_reports_a_model():
    model = Bigram(torch.zeros(6, 6))
    report = measure(model, torch.arange(24) % 6, seqlen=8, rounds=3)
    assert report.perplexity.value == pytest.approx(6)
    assert report.bytes == 6 * 6 * 4
    assert report.linear_sparsity is None
    assert report.decode.median > 0
    assert json.loads(json.dumps(report.to_json()))["bytes"] == 144
    assert "perplexity" in str(report)
