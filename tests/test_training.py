"""Training: which training functions are refused, because they would spoil the experiment."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekern.lottery import find_ticket
from tests.recorder import STEPS, Recorder, model


def spoilt(change):
    """Recorder with something done to the model before the optimizer is made."""

    def train(net, training):
        change(net)
        return Recorder()(net, training)

    return train


def replace_weight(net):
    net[0].weight = nn.Parameter(torch.randn(7, 5))


def test_a_training_function_that_spoils_the_experiment_is_refused():
    used = torch.optim.Adam(model().parameters())

    def remembers(net, training):
        used.param_groups[0]["params"] = list(net.parameters())
        training.attach(used)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        used.step()

    def writes_afterwards(net, training):
        Recorder()(net, training)
        with torch.no_grad():
            net[0].weight *= 0.01
            net[0].weight += 0.001

    def steps_another(net, training):
        training.attach(torch.optim.SGD(net.parameters(), 0.1))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        F.cross_entropy(net(torch.randn(3, 5)), torch.arange(3)).backward()
        optimizer.step()

    def half_the_model(net, training):
        return Recorder(optimizer=lambda _: torch.optim.SGD(net[0].parameters(), 0.1))(net, training)

    def replaces_afterwards(net, training):
        Recorder()(net, training)
        replace_weight(net)

    def diverges(net, training):
        Recorder()(net, training)
        with torch.no_grad():
            net[2].weight[0, 0] = torch.nan

    cases = {
        "round 0: train attached no optimizer; call training.attach": lambda net, training: None,
        "round 0: the weights were changed before the optimizer was attached": spoilt(
            lambda net: net[0].reset_parameters()
        ),
        "weight is another tensor than the one that was masked|weights were changed before": spoilt(replace_weight),
        r"0\.weight is another tensor than the one that was masked": replaces_afterwards,
        "round 1: the optimizer has stepped before, and its momentum belongs to other weights": remembers,
        r"0\.weight: \d+ of \d+ pruned weights are not \+0\.0": writes_afterwards,
        "round 0: the attached optimizer took no step": steps_another,
        r"round 0: 2\.weight is in no attached optimizer": half_the_model,
        r"2\.weight holds 1 NaN or infinite weights after round 0; training diverged": diverges,
        "train must return a mapping of metrics or None, got float": lambda *given: Recorder()(*given) and 1.5,
        "train must return finite numbers": lambda *given: Recorder()(*given) and {"loss": float("nan")},
    }
    for message, train in cases.items():
        with pytest.raises(ValueError, match=message):
            find_ticket(model(seed=3), train, rounds=1)


def test_rewinding_that_training_does_not_follow_is_refused():
    def from_the_start(net, training):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        training.attach(optimizer)
        for _ in range(STEPS):
            F.cross_entropy(net(torch.randn(3, 5)), torch.arange(3)).backward()
            optimizer.step()

    with pytest.raises(ValueError, match=r"round 1: train did not read training\.start, which is 2"):
        find_ticket(model(), from_the_start, rounds=1, rewind_step=2)
    with pytest.raises(ValueError, match=f"round 1: the attached optimizer took no step after step {STEPS}"):
        find_ticket(model(), Recorder(), rounds=1, rewind_step=STEPS)
    with pytest.raises(ValueError, match=f"round 0: train took {STEPS} steps, and rewind_step is {STEPS + 1}"):
        find_ticket(model(), Recorder(), rounds=1, rewind_step=STEPS + 1)
