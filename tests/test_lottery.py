"""find_ticket: what the papers say of a ticket, what a killed search gives, and which training functions it refuses."""

import hashlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsekern.lottery import find_ticket, shrink
from tests.recorder import STEPS, Recorder, model

ROOT = Path(__file__).parents[1]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


RATES = st.floats(0.01, 0.9)


@settings(max_examples=25)
@given(RATES, st.integers(1, 4), st.sampled_from(["model", "layer"]), st.booleans())
def test_each_round_prunes_its_fraction_exactly_and_the_smallest_first(rate, rounds, scope, rewind_weights):
    train = Recorder(steps=2)
    ticket = find_ticket(model(), train, rate, rounds, scope=scope, rewind_weights=rewind_weights)
    assert [one.round for one in ticket.rounds] == list(range(rounds + 1))
    assert ticket.rounds[0].kept == ticket.rounds[0].size == 5 * 7 + 7 * 3
    names = ["0.weight", "2.weight"]
    for number in range(1, rounds + 1):
        before, now = ticket.masks(number - 1), ticket.masks(number)
        trained = train.left[number - 1]
        scopes = [names] if scope == "model" else [[name] for name in names]
        for together in scopes:
            kept = sum(int(before[name].sum()) for name in together)
            assert sum(int(now[name].sum()) for name in together) == kept - round(rate * kept)
            gone = torch.cat([trained[name][before[name] & ~now[name]].abs() for name in together])
            stay = torch.cat([trained[name][now[name]].abs() for name in together])
            assert not len(gone) or not len(stay) or gone.max() <= stay.min()
        for name in names:
            assert not (now[name] & ~before[name]).any(), "a pruned weight came back"
            assert torch.equal(train.masks[number][name], now[name])
        one = ticket.rounds[number]
        assert one.layers == {name: (int(now[name].sum()), now[name].numel()) for name in names}
        assert one.kept == sum(int(now[name].sum()) for name in names)


@settings(max_examples=15)
@given(RATES, st.integers(0, STEPS - 1))
def test_after_rewinding_the_weights_are_theta_k_times_the_mask_and_the_rest_is_theta_k(rate, rewind_step):
    train = Recorder()
    ticket = find_ticket(model(), train, rate, 2, rewind_step)
    theta = train.after[rewind_step - 1] if rewind_step else train.handed[0]
    assert equal(ticket.theta, theta)
    for number in (1, 2):
        masks = ticket.masks(number)
        expected = {name: value * masks[name] if name in masks else value for name, value in theta.items()}
        assert equal(train.handed[number], {name: value + 0.0 for name, value in expected.items()})
        assert ticket.rounds[number].steps == STEPS - rewind_step
        fresh = model(seed=9)
        ticket.rewind(fresh, number).check()
        assert equal(fresh.state_dict(), train.handed[number])


def test_learning_rate_rewinding_leaves_the_weights_where_training_left_them():
    train = Recorder()
    ticket = find_ticket(model(), train, 0.3, 2, rewind_step=2, rewind_weights=False)
    for number in (1, 2):
        masks = ticket.masks(number)
        left = train.left[number - 1]
        expected = {name: value * masks[name] if name in masks else value for name, value in left.items()}
        assert equal(train.handed[number], {name: value + 0.0 for name, value in expected.items()})
        assert ticket.rounds[number].steps == STEPS - 2


def test_one_round_by_hand():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    net[0].weight.data = torch.tensor([[0.1, -4.0], [3.0, 0.5]])
    net[1].weight.data = torch.tensor([[-0.2, 0.4]])

    def train(net, training):
        optimizer = torch.optim.SGD(net.parameters(), 1.0)
        training.attach(optimizer)
        # a gradient of -1 everywhere: what was 0.1 is 1.1, what was -4 is -3
        for parameter in net.parameters():
            parameter.grad = -torch.ones_like(parameter)
        optimizer.step()

    # after round 0: [[1.1, -3.0], [4.0, 1.5]] and [[0.8, 1.4]]; half of six go: 0.8, 1.1 and 1.4
    ticket = find_ticket(net, train, rate=0.5, rounds=1)
    assert ticket.masks()["0.weight"].tolist() == [[False, True], [True, True]]
    assert ticket.masks()["1.weight"].tolist() == [[False, False]]
    assert ticket.rounds[1].sparsity == 0.5
    # theta_0, pruned, and one step on
    assert net[0].weight.tolist() == [[0.0, -3.0], [4.0, 1.5]]
    assert net[1].weight.tolist() == [[0.0, 0.0]]


def test_equal_magnitudes_go_from_the_end_and_counts_stay_exact():
    weights = {"a": torch.ones(2, 3), "b": -torch.ones(1, 4)}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    first = shrink(weights, masks, 0.25, "model")
    assert first["a"].all()
    assert first["b"].tolist() == [[True, True, False, False]]
    assert sum(int(mask.sum()) for mask in shrink(weights, first, 0.5, "model").values()) == 4


def test_convolutions_and_recurrent_weights_are_pruned_and_biases_norms_and_embeddings_are_not():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.look_up = nn.Embedding(11, 4)
            self.conv = nn.Conv1d(4, 4, 3, padding=1)
            self.norm = nn.LayerNorm((4, 5))
            self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)
            self.rnn = nn.GRU(4, 4, batch_first=True)
            self.place = nn.Parameter(torch.randn(5, 4))
            self.head = nn.Linear(4, 11)
            self.head.weight = self.look_up.weight

        def forward(self, ids):
            x = self.norm(self.conv(self.look_up(ids).mT)).mT + self.place
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.rnn(x)[0])

    def train(net, training):
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        training.attach(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            ids = torch.randint(11, (3, 5))
            F.cross_entropy(net(ids).mT, ids).backward()
            optimizer.step()

    torch.manual_seed(0)
    ticket = find_ticket(Many(), train, rounds=2)
    names = {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert ticket.masks().keys() == names | {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    net = Many()
    only = find_ticket(net, train, rounds=1, select=lambda name, _: name == "look_up.weight")
    assert int((net.head.weight == 0).sum()) == only.rounds[1].size - only.rounds[1].kept == round(0.2 * 44)


def test_batch_statistics_are_rewound_too():
    class Net(nn.Sequential):
        pass

    net = Net(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    train = Recorder()
    find_ticket(net, train, rounds=1, rewind_step=3)
    assert torch.equal(train.handed[1]["1.running_mean"], train.after[2]["1.running_mean"])
    assert int(train.handed[1]["1.num_batches_tracked"]) == 3
    assert not torch.equal(train.left[0]["1.running_mean"], train.after[2]["1.running_mean"])


def test_the_callers_generators_are_left_alone_and_every_round_begins_with_the_seed():
    drawn = []

    def train(net, training):
        drawn.append((torch.rand(1).item(), random.random(), numpy.random.rand()))
        return Recorder()(net, training)

    net = model()
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    expected = torch.rand(1).item(), random.random(), numpy.random.rand()
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    find_ticket(net, train, rounds=2, seed=7)
    assert (torch.rand(1).item(), random.random(), numpy.random.rand()) == expected
    assert len(set(drawn)) == 1


def test_a_report_is_json_and_says_each_round():
    seen = []
    ticket = find_ticket(model(), Recorder(), rounds=2, settings={"lr": 0.05}, after_round=seen.append)
    assert seen == ticket.rounds
    report = json.loads(json.dumps(ticket.to_json()))
    assert report["settings"]["settings"] == {"lr": 0.05}
    assert [one["kept"] for one in report["rounds"]] == [56, 45, 36]
    assert report["rounds"][1]["layers"].keys() == {"0.weight", "2.weight"}
    assert "round 1: 45 of 56 weights (80.36%); weight " in str(ticket)


def test_a_recorded_search_is_read_back_and_goes_on_to_more_rounds(tmp_path):
    whole = find_ticket(first := model(), Recorder(), 0.3, 4, 2)
    train = Recorder()
    find_ticket(model(), train, 0.3, 2, 2, directory=tmp_path / "run")
    assert len(train.handed) == 3
    again = find_ticket(second := model(), train, 0.3, 4, 2, directory=tmp_path / "run")
    assert len(train.handed) == 5
    assert equal(first.state_dict(), second.state_dict())
    assert again.rounds == whole.rounds
    assert equal(again.theta, whole.theta)
    assert equal(again.lost_in, whole.lost_in)
    # finished: nothing is trained, and the model is the last round's
    assert find_ticket(third := model(), None, 0.3, 4, 2, directory=tmp_path / "run").rounds == whole.rounds
    assert equal(first.state_dict(), third.state_dict())


def test_what_a_round_leaves_beside_the_weights_does_not_reach_the_next(tmp_path):
    """Else a search that goes on in another process, where none of it is left, would find another ticket."""

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))

    def untidy(net, training):
        assert net.training
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        training.attach(optimizer)
        for _ in range(training.start, 4):
            # gradients add up over the round, and over the search if nobody clears them
            F.cross_entropy(net(torch.randn(8, 5)), torch.arange(8) % 3).backward()
            optimizer.step()
        net.eval()
        net[0].requires_grad_(False)

    whole, halves = net(), net()
    find_ticket(whole, untidy, rounds=3)
    find_ticket(net(), untidy, rounds=1, directory=tmp_path / "run")
    find_ticket(halves, untidy, rounds=3, directory=tmp_path / "run")
    assert equal(whole.state_dict(), halves.state_dict())


KILL = """
import os, signal, sys, time
import torch
sys.path.insert(0, {root!r})
from tests.recorder import Recorder, model
from sparsekern.lottery import find_ticket

def search(directory, rounds_until_killed=None, delay=0.0):
    "In a child, killed some time into a round; prints the rounds that it began."
    read, write = os.pipe()
    if not (child := os.fork()):
        train = Recorder(steps=60)
        def told(net, training):
            os.write(write, str(training.round).encode())
            return train(net, training)
        torch.set_num_threads(1)
        find_ticket(model(), told, 0.3, 6, 3, directory=directory)
        os._exit(0)
    os.close(write)
    begun = os.read(read, 1)
    while begun and len(begun) != rounds_until_killed:
        if not (more := os.read(read, 1)):
            break
        begun += more
    if rounds_until_killed:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(begun.decode(), os.waitstatus_to_exitcode(status), flush=True)

search({directory!r} + "/whole")
for delay in (0.0, 0.01, 0.03):
    search({directory!r} + "/killed", 2, delay)
search({directory!r} + "/killed")
"""


def files(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_a_killed_search_goes_on_bit_for_bit(tmp_path):
    """Killed three times, at other moments, and then left to finish. The children are forked before torch does work."""
    script = KILL.format(root=str(ROOT), directory=str(tmp_path))
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    whole, *killed, last = (line.split() for line in ran.stdout.splitlines())
    assert whole == ["0123456", "0"]
    assert last[1] == "0"
    assert {code for _, code in killed} == {str(-signal.SIGKILL)}
    begun = [int(rounds[0]) for rounds, _ in (*killed, last)]
    assert begun == sorted(set(begun)), "each went on where the killed one was"
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_other_settings_another_model_and_fewer_rounds_are_refused_on_continuing(tmp_path):
    run = tmp_path / "run"
    find_ticket(model(), Recorder(), rounds=2, directory=run, settings={"lr": 1})
    for changed, message in (
        ({"rate": 0.3}, "was begun with rate = 0.2, now it is 0.3; choose another directory, or go on with the same"),
        ({"rewind_step": 2}, "was begun with rewind_step = 0, now it is 2"),
        ({"rewind_weights": False}, "was begun with rewind_weights = True, now it is False"),
        ({"scope": "layer"}, "was begun with scope = 'model', now it is 'layer'"),
        ({"seed": 1}, "was begun with seed = 0, now it is 1"),
        ({"settings": {"lr": 2}}, "was begun with settings = {'lr': 1}, now it is {'lr': 2}"),
        ({"rounds": 1}, "2 rounds are recorded already, got rounds = 1"),
        ({"select": lambda name, _: name == "0.weight"}, "was begun with parameters = "),
    ):
        with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("=", r"=")):
            find_ticket(model(), Recorder(), **{"rounds": 2, "directory": run, "settings": {"lr": 1}} | changed)
    with pytest.raises(ValueError, match="was begun with sha256 of the model's first weights = "):
        find_ticket(model(seed=1), Recorder(), rounds=2, directory=run, settings={"lr": 1})


def test_damaged_records_are_refused(tmp_path):
    def search():
        return find_ticket(model(), Recorder(), rounds=1, directory=tmp_path)

    search()
    path = tmp_path / "round-01.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=r"round-01\.safetensors' is not the file that journal\.json names: its sha256"
    ):
        search()
    path.unlink()
    with pytest.raises(ValueError, match=r"round-01\.safetensors' is gone, and journal\.json names it"):
        search()
    journal = tmp_path / "journal.json"
    journal.write_text(journal.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ValueError, match="has format_version 9, this version reads 1"):
        search()
    journal.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        search()
    journal.write_text("[]")
    with pytest.raises(ValueError, match="is no journal of a search for a ticket"):
        search()


def test_settings_that_make_no_sense_are_refused():
    for wrong, message in (
        ({"rate": 0}, "rate must lie between 0 and 1, got 0"),
        ({"rate": 1.0}, "rate must lie between 0 and 1, got 1.0"),
        ({"rounds": 0}, r"rounds must lie in 1\.\.32767, got 0"),
        ({"rewind_step": -1}, "rewind_step must not be negative, got -1"),
        ({"scope": "row"}, 'scope must be "model" or "layer", got \'row\''),
        ({"select": lambda *_: False}, "Sequential has no weight that may be pruned; say with `select` which may"),
        ({"select": lambda name, _: name == "0.bias"}, r"0\.bias: only matrices and larger compete by magnitude"),
    ):
        with pytest.raises(ValueError, match=message):
            find_ticket(model(), Recorder(), **wrong)
    with pytest.raises(ValueError, match=r"0\.weight: the weight is on the meta device"):
        find_ticket(model().to("meta"), Recorder())
