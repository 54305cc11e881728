"""Speed: what rows and blocks add up to, by hand; and a run on shapes that take no time."""

import json
from dataclasses import replace

import pytest
import torch

from sparsekern import shapes, speed
from sparsekern.baselines import COMPILED, LINEAR, PREPACKED, Dense
from sparsekern.plan import check_linear, random_input
from sparsekern.speed import OWN, Row, Speed, Total, draw_speed, measure_speed, plot
from sparsekern.timing import Bandwidth, Latency, Ratio


def a_row(sparse=1.0, linear=3.0, prepacked=2.0, count=1, tokens=1, **changes) -> Row:
    def steady(seconds):
        return Latency(seconds, seconds, seconds, 100)

    row = Row(
        layers=("up_proj",),
        count=count,
        out_features=10,
        in_features=20,
        tokens=tokens,
        kernel="cpu",
        sparse=steady(sparse),
        dense={"F.linear": steady(linear), "prepacked": steady(prepacked)},
        best="prepacked",
        speedup=Ratio(prepacked / sparse, prepacked / sparse - 0.5, prepacked / sparse + 0.5),
        over_linear=Ratio(linear / sparse, linear / sparse, linear / sparse),
        over_own=Ratio(2.5 / sparse, 2.5 / sparse, 2.5 / sparse),
        dense_bytes=400,
        packed_bytes=200,
        read=Bandwidth(1e9, 1e9, 1e9),
        read_share=0.9,
    )
    return replace(row, **changes)


def a_speed(*rows) -> Speed:
    facts = {"cpu": "a processor", "gpu": None, "threads": 2, "torch": "2", "commit": None}
    where = {"machine": facts, "date": "2026-01-01", "seconds": 1.0, "skipped": {"compiled": "no compiler"}}
    return Speed("tiny", 2, 0.5, "bfloat16", Bandwidth(3e10, 2e10, 4e10), "stream_read cpu", rows, **where)


def test_the_ceiling_is_dense_bytes_over_packed_bytes():
    assert a_row().ceiling == 2


def test_a_block_adds_its_layers_up_as_often_as_they_stand_in_it():
    """2 x 1 s + 4 s sparse; 2 x 2 s + 4 s best dense: 8/6."""
    total = Total.of([a_row(count=2), a_row(sparse=4.0, linear=8.0, prepacked=4.0, dense_bytes=800)])
    assert (total.sparse, total.best, total.linear) == (6, 8, 14)
    assert total.speedup.median == pytest.approx(8 / 6)
    assert total.over_linear.median == pytest.approx(14 / 6)
    assert total.over_own.median == pytest.approx((2 * 2.5 + 2.5) / 6)
    assert total.speedup.p10 == pytest.approx(8 / 6 - 0.5)
    assert total.speedup.p90 == pytest.approx(8 / 6 + 0.5)
    assert total.ceiling == pytest.approx((2 * 400 + 800) / (3 * 200))


def test_a_block_has_no_speed_up_when_one_of_its_layers_has_none():
    unsteady = a_row(speedup=Ratio.unknown("cpu is unsteady: p90 is 2.0 x p10"))
    total = Total.of([a_row(), unsteady])
    assert total.speedup.reason == "up_proj: cpu is unsteady: p90 is 2.0 x p10"
    assert total.over_linear.median is not None


def test_the_table_shows_what_is_known_and_marks_what_is_not():
    unsteady = a_row(tokens=4, speedup=Ratio.unknown("noise"), over_linear=Ratio.unknown("noise"), read_share=None)
    unsteady = replace(unsteady, sparse=Latency(1e-3, 0.5e-3, 2e-3, 100))
    text = str(a_speed(a_row(sparse=1e-3, linear=3e-3, prepacked=2e-3), unsteady))
    steady_line, unsteady_line = (line for line in text.splitlines() if " up " in line)
    for part in ("2.00x (1.50–2.50)", "2500.00x", "3.00x", "90%", "prepacked", "1000 (1000–1000)"):
        assert part in steady_line
    assert "~1000 (500–2000)" in unsteady_line
    assert "1.50" not in unsteady_line
    assert "compiled did not run: no compiler" in text
    assert "reads 30.0 GB/s" in text


def test_a_plot_is_a_png_even_of_nothing_steady(tmp_path):
    unsteady = a_row(speedup=Ratio.unknown("noise"))
    plot(a_speed(unsteady, a_row(tokens=4)), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_drawing_has_the_ceiling_and_leaves_unsteady_points_out():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    draw_speed(a_speed(a_row(speedup=Ratio.unknown("noise")), a_row(tokens=4)), axes)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("ceiling" in label for label in labels)
    assert "against the best dense (unsteady ones left out)" in labels
    assert {"against own dense", "against F.linear"} <= set(labels)


def test_layers_of_one_shape_are_timed_together():
    groups = speed._distinct(shapes.find("llama-3.2-1b").layers)
    names = [[layer.name.removesuffix("_proj") for layer in group] for group in groups]
    assert names == [["q", "o"], ["k", "v"], ["gate", "up"], ["down"]]


def test_a_bias_makes_another_shape():
    groups = speed._distinct(shapes.find("qwen2.5-0.5b").layers)
    assert [[layer.name for layer in group] for group in groups][:3] == [["q_proj"], ["k_proj", "v_proj"], ["o_proj"]]


def test_the_layers_of_a_model_are_measured():
    seen = []
    result = measure_speed(
        shapes.find("tiny"), 0.5, (1, 3), seconds=0, arena=1 << 20, progress=lambda *at: seen.append(at)
    )
    assert [(row.tokens, row.layers[0]) for row in result.rows][::4] == [(1, "q_proj"), (3, "q_proj")]
    assert len(result.rows) == 8
    assert seen[-1] == (8, 8)
    assert sum(row.count for row in result.rows if row.tokens == 1) == 7
    # what is stored beside the values is more than an eighth of a byte a weight in layers as small as these
    assert all(1 < row.ceiling < 2 for row in result.rows)
    data = json.loads(json.dumps(result.to_json()))
    assert [total["tokens"] for total in data["totals"]] == [1, 3]
    assert data["machine"]["torch"] == torch.__version__


def test_layers_with_a_bias_are_measured():
    layer = shapes.LayerShape("q_proj", 32, 64, bias=True)
    shape = replace(shapes.find("tiny"), layers=(layer,))
    (row,) = measure_speed(shape, 0.5, (1,), dtype=torch.float32, seconds=0, arena=1 << 20).rows
    assert row.layers == ("q_proj",)


def test_a_baseline_that_is_wrong_is_not_timed():
    wrong = Dense("wrong", lambda weight, *_: weight, lambda x, weight, bias: x @ weight.T + 1, lambda weight: None)
    with pytest.raises(RuntimeError, match="wrong at 1 tokens is wrong"):
        measure_speed(shapes.find("tiny"), 0.5, (1,), seconds=0, arena=1 << 20, dense=(LINEAR, wrong))


def test_a_baseline_that_refuses_is_named():
    refusing = Dense("other", None, None, lambda weight: "needs another machine")
    result = measure_speed(shapes.find("tiny"), 0.5, (1,), seconds=0, arena=1 << 20, dense=(LINEAR, refusing))
    assert result.skipped == {"other": "needs another machine"}
    assert "other did not run: needs another machine" in str(result)


@pytest.mark.parametrize(
    ("baseline", "biased"),
    # compiling takes long
    [(LINEAR, False), (LINEAR, True), (PREPACKED, False), (PREPACKED, True), (COMPILED, True), (OWN, True)],
    ids=lambda each: getattr(each, "name", each),
)
def test_every_baseline_computes_the_linear(baseline, biased):
    weight = torch.randn(37, 48, dtype=torch.float32)
    if reason := baseline.refuses(weight):
        pytest.skip(reason)
    bias = torch.randn(37) if biased else None
    x = random_input(3, weight)
    check_linear(baseline.run(x, baseline.prepare(weight, bias, 3), bias), x, weight, bias, baseline.name)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0], ids=str)
def test_a_sparsity_that_leaves_nothing_is_refused(sparsity):
    with pytest.raises(ValueError, match=f"sparsity must lie in 0..1 and leave weights to read, got {sparsity}"):
        measure_speed(shapes.find("tiny"), sparsity)


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match=r"tokens must be one or more positive numbers, got \[0\]"):
        measure_speed(shapes.find("tiny"), 0.5, (0,))
