"""The experiments with tickets: what a control is, what a summary says, that a killed run goes on, and the product."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from sparsekern.checkpoint import verify
from sparsekern.cli import app
from sparsekern.formats import SemiStructured
from sparsekern.lottery import find_ticket
from sparsekern.swap import sparsify
from sparsekern.tickets import TASKS, digits, text
from sparsekern.tickets.experiment import CONTROLS, SERIES, Cell, by_lot, recorded, run, run_seed, train_once, trainings
from sparsekern.tickets.figure import plot
from sparsekern.tickets.product import AS_BITMAP, make
from sparsekern.tickets.summary import Summary, summaries

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def mlp():
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    return digits.problems(steps=40, rounds=3)[0]


@pytest.fixture(scope="module")
def ran(mlp, tmp_path_factory):
    """One network and seed."""
    directory = tmp_path_factory.mktemp("tickets")
    told, threads = [], torch.get_num_threads()
    # as in the processes of run(): two threads do not round alike every time
    torch.set_num_threads(1)
    run_seed(mlp, 0, directory, told.append)
    torch.set_num_threads(threads)
    assert len(told) == trainings(mlp)
    return directory


def cell(series="ticket", round=0, seed=0, score=0.9, early_step=10):
    kept = round_sizes[round]
    return Cell("mlp", seed, series, round, kept, 100, {}, early_step, 0.1, score, score)


round_sizes = {0: 100, 1: 80, 2: 64, 3: 51, 8: 17}


def test_the_digits_are_split_into_three_parts_that_share_no_image_and_hold_all_classes_alike():
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    parts, digest = digits._split()
    assert [len(labels) for _, labels in parts] == [1000, 297, 500]
    assert digest == "f6d9e39f37dc45d327f6db33428ee58970ccceabb2535a5c179de35886b70443"
    images = [{tuple(image.tolist()) for image in part} for part, _ in parts]
    assert len(set.union(*images)) == sum(map(len, images)) == 1797
    for _, labels in parts:
        counts = torch.bincount(labels, minlength=10)
        assert counts.max() - counts.min() <= 0.11 * len(labels) / 10 + 2


def test_the_texts_are_three_parts_that_share_no_file():
    train, validation, test = text._parts()
    files = [set(bytes(part.tolist()).split(b"\0")) - {b""} for part in (train, validation, test)]
    assert len(set.union(*files)) == sum(map(len, files))
    assert all(len(part) > 100_000 for part in (train, validation, test))


def test_a_batch_depends_on_its_step_and_seed_alone(mlp):
    model = mlp.fresh(0)
    first = mlp.loss(model, 0, 7).item()
    torch.manual_seed(99)
    assert mlp.loss(model, 0, 7).item() == first
    assert mlp.loss(model, 0, 8).item() != first
    assert mlp.loss(model, 1, 7).item() != first


def test_every_series_and_control_is_run_at_the_tickets_number_of_weights(mlp, ran):
    cells = {(one.series, one.round): one for one in recorded(ran, mlp, 0)}
    assert cells.keys() == {(s, r) for s in SERIES for r in range(4)} | {(c, 3) for c in CONTROLS}
    for (_, round), one in cells.items():
        assert one.kept == cells["ticket", round].kept
        assert 0 < one.early_step <= 40
        assert 0 <= one.score <= 1
    assert [cells["ticket", r].kept for r in range(4)] == [50200, 40160, 32128, 25702]
    # the dense network is the same in every series
    assert len({cells[series, 0].score for series in SERIES}) == 1
    layers = cells["ticket", 3].layers
    assert cells["random mask", 3].layers == cells["random re-initialisation", 3].layers == layers
    assert sorted(ran.iterdir()) == [
        ran / name
        for name in ("mlp-seed0-round00.safetensors", "mlp-seed0-round03.safetensors", "mlp-seed0.json")
    ]  # fmt: skip


def test_the_ticket_trained_alone_is_the_ticket_that_the_search_trained(mlp, ran):
    """What the controls are trained by gives, for the ticket, the search's own numbers."""
    ticket = find_ticket(mlp.fresh(0), mlp.trainer(0), mlp.rate, 2, seed=0)
    alone = train_once(mlp, 0, ticket.theta, ticket.masks(2), 2)
    assert alone.metrics == ticket.rounds[2].metrics
    assert alone.kept == ticket.rounds[2].kept


def test_a_mask_by_lot_keeps_as_many_in_each_layer_elsewhere():
    masks = {"a": torch.rand(30, 20) < 0.3, "b": torch.rand(7, 11) < 0.8}
    other = by_lot(masks, 0)
    for name, mask in masks.items():
        assert other[name].sum() == mask.sum()
        assert not torch.equal(other[name], mask)
        assert torch.equal(other[name], by_lot(masks, 0)[name])


def test_recorded_seeds_are_not_run_again_and_other_settings_are_refused(mlp, ran):
    other = replace(mlp, steps=41)
    with pytest.raises(
        ValueError, match=r"mlp-seed0\.json' was recorded with steps = 40, now it is 41; choose another"
    ):
        recorded(ran, other, 0)
    assert recorded(ran, mlp, 1) is None


def test_a_run_that_was_interrupted_gives_the_same_cells(mlp, ran, tmp_path, one_thread):
    class Interrupted(Exception):
        pass

    begun = []

    def interrupt(series):
        begun.append(series)
        if len(begun) == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_seed(mlp, 0, tmp_path, interrupt)
    again = []
    run_seed(mlp, 0, tmp_path, again.append)
    assert recorded(tmp_path, mlp, 0) == recorded(ran, mlp, 0)
    for name in ("mlp-seed0-round00.safetensors", "mlp-seed0-round03.safetensors"):
        assert (tmp_path / name).read_bytes() == (ran / name).read_bytes()


def test_the_summary_has_means_deviations_and_differences_seed_by_seed():
    problem = type("P", (), {"name": "mlp", "higher_is_better": True, "controlled": (1,), "score": "accuracy"})()
    cells = [cell(seed=s, score=score) for s, score in enumerate((0.90, 0.92))]
    cells += [cell(round=1, seed=s, score=score) for s, score in enumerate((0.91, 0.91))]
    cells += [cell(round=2, seed=s, score=score) for s, score in enumerate((0.80, 0.82))]
    cells += [cell("random mask", 1, s, score) for s, score in enumerate((0.90, 0.93))]
    summary = Summary(problem, cells)
    assert summary.dense.score.mean == pytest.approx(0.91)
    assert summary.dense.score.sd == pytest.approx(0.02 / 2**0.5)
    assert summary.sparsest_match("ticket").round == 1
    assert [summary.matches(row) for row in summary.series("ticket")] == [True, True, False]
    difference = summary.difference("random mask", 1)
    assert difference.score.mean == pytest.approx((0.01 - 0.02) / 2)
    assert (difference.wins, difference.seeds) == (1, 2)
    # of a perplexity the lower one is better
    problem.higher_is_better = False
    assert summary.difference("random mask", 1).score.mean == pytest.approx((-0.01 + 0.02) / 2)


def test_findings_say_what_matches_and_what_does_not(mlp, ran):
    summary = summaries([mlp], recorded(ran, mlp, 0))["mlp"]
    lines = list(summary.findings())
    assert lines[0].startswith("dense: accuracy ")
    assert any(line.startswith("ticket: matches the dense network ") for line in lines)
    assert any(line.startswith("ticket against random mask: ") and "at 51.2% (" in line for line in lines)
    assert json.loads(json.dumps(summary.to_json()))["rounds"] == 3


def test_curves_are_drawn(mlp, ran, tmp_path):
    plot(summaries([mlp], recorded(ran, mlp, 0)), tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_a_packed_ticket_scores_the_same_is_smaller_and_verifies(mlp, ran):
    products = make(mlp, ran, seconds=0.1)
    assert [product.dtype for product in products] == ["float32", "bfloat16"]
    for product in products:
        assert product.scores["ticket"] == product.scores["packed"] == product.scores["loaded"]
        assert product.difference < 1e-2
        assert verify(ran / f"mlp-ticket-{product.dtype}").layers.keys() == {layer.name for layer in product.layers}
        itemsize = {"float32": 4, "bfloat16": 2}[product.dtype]
        for layer in product.layers:
            rows, columns = layer.shape
            assert layer.dense == rows * columns * itemsize
            assert layer.values == layer.kept * itemsize
            assert layer.bitmap == rows * -(-columns // 8)
            assert layer.row_offsets == 8 * (rows + 1)
        assert 1 < product.smaller < 5
        assert product.latency.keys() == {1, 2}
        assert product.to_json()["latency"]["1"]["dense"]["median"] > 0


def test_a_ticket_that_holds_2_to_4_by_chance_is_packed_as_a_bitmap():
    net = torch.nn.Sequential(torch.nn.Linear(64, 32))
    net[0].weight.data[:, torch.arange(64) % 8 != 0] = 0
    report = sparsify(net, plan=AS_BITMAP)
    assert [layer["format"] for layer in report.swapped] == ["bitmap"]
    assert net[0].packed.nbytes < SemiStructured.pack(net[0].weight).nbytes


def test_the_small_language_model_is_the_shipped_architecture_and_trains():
    (problem,) = text.problems(steps=2, rounds=1)
    model = problem.fresh(0)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(model.lm_head.weight, problem.fresh(0).lm_head.weight)
    ticket = find_ticket(model, problem.trainer(0), problem.rate, 1)
    # 7 layers in each of two blocks: the output embedding is the input's, and left alone
    assert len(ticket.masks()) == 14
    assert not any("embed" in name or "norm" in name or "head" in name for name in ticket.masks())
    assert ticket.rounds[1].kept == round(0.64 * ticket.rounds[1].size)


def test_tasks_and_numbers_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="task must be one of digits, text, got 'mnist'"):
        run("mnist", tmp_path)
    with pytest.raises(ValueError, match="seeds and processes must be positive, got 0 and 2"):
        run("digits", tmp_path, seeds=0)
    assert TASKS.keys() == {"digits", "text"}


def test_the_command_writes_json_png_and_checkpoints(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    arguments = [
        "--out",
        tmp_path / "out",
        "--seeds",
        1,
        "--steps",
        20,
        "--rounds",
        1,
        "--seconds",
        0.1,
        "--processes",
        1,
    ]
    done = CliRunner().invoke(app, ["lottery", "--task", "digits", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["networks"].keys() == {"mlp", "cnn"}
    assert json.loads((tmp_path / "out/lottery-digits.json").read_text()) == result
    assert (tmp_path / "out/lottery-digits.png").read_bytes().startswith(b"\x89PNG")
    assert len(verify(tmp_path / "out/mlp-ticket-float32").layers) >= 1
    refused = CliRunner().invoke(app, ["lottery", "--out", str(tmp_path / "out"), "--steps", "0"])
    assert refused.exit_code == 2
