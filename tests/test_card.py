"""The card of a pruned model holds the command, the figures as they are, and what was left dense."""

from dataclasses import replace

from sparsekern.card import model_card
from sparsekern.finishing import BlockReport
from sparsekern.measure import Perplexity
from sparsekern.oneshot import LayerReport, PruneReport

LAYERS = [LayerReport(f"layers.{i}.up", 8, 4, 0.5, 0.1 * i, 0.2 * i if i else None, 0.01, 0, 1.0) for i in range(8)]
REPORT = PruneReport("SparseGPT()", "2:4", LAYERS, [("lm_head", "output embeddings")], "replay")
FACTS = {"torch": "2.13.0", "sha256 of the dense model.safetensors": "abc"}


def card(perplexity=None):
    return model_card("tiny", "sparsekern prune tiny -o out", REPORT, "4 windows of 64 tokens", perplexity, FACTS)


def test_command_calibration_and_provenance_are_on_it():
    for words in (
        "sparsekern prune tiny -o out",
        "4 windows of 64 tokens",
        "abc",
        "- torch: 2.13.0",
        "8 layers hold",
    ):
        assert words in card()


def test_the_five_layers_with_the_largest_held_out_error_are_listed():
    rows = [line for line in card().splitlines() if line.startswith("| layers.")]
    assert [row.split(" | ")[0] for row in rows] == [f"| layers.{i}.up" for i in (7, 6, 5, 4, 3)]
    assert "| layers.7.up | 50.00% | 0.7000 | 1.4000 | 0.0100 | 0 |" in rows


def test_perplexity_is_given_with_its_protocol_or_said_to_be_missing():
    before, after = (Perplexity(value, 64, 3, 192, "f" * 64, "bfloat16") for value in (8.0, 9.5))
    assert "Dense 8.000, pruned 9.500: 3 windows of 64 tokens, bfloat16" in card({"before": before, "after": after})
    assert before.protocol in card({"before": before, "after": after})
    assert "Not measured: no held-out text was given." in card()


def test_what_was_done_before_and_after_is_on_it():
    blocks = [BlockReport("layers.0", 0.2, 0.1, True), BlockReport("layers.1", 0.2, 0.3, False)]
    report = replace(REPORT, finish="Finish(epochs=2)", blocks=blocks, grid="4 bits")
    lines = model_card("tiny", "sparsekern", report, "none", None, {}, ["two\nlines"]).splitlines()
    assert [line for line in lines if line.startswith(("- first", "- weights", "- finished"))] == [
        "- first: lines",
        "- weights: 4 bits",
        "- finished: `Finish(epochs=2)`, in place in 1 of 2 blocks, where it lowered the held-out error",
    ]


def test_what_stays_dense_is_named_with_the_reason():
    assert "- lm_head: output embeddings" in card()
