"""FixedMasks: a pruned weight stays at +0.0 through every optimizer, and nothing of it stays in the states."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop, Rprop

from sparsekern.fixed_masks import FixedMasks

OPTIMIZERS = {
    "SGD": lambda p: SGD(p, 0.1),
    "SGD, momentum, decay": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "SGD, foreach": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "SGD, fused": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "Adam, amsgrad": lambda p: Adam(p, 0.01, weight_decay=0.01, amsgrad=True),
    "Adam, foreach": lambda p: Adam(p, 0.01, weight_decay=0.01, foreach=True),
    "Adam, fused": lambda p: Adam(p, 0.01, fused=True),
    "AdamW": lambda p: AdamW(p, 0.01, weight_decay=0.1),
    "AdamW, fused": lambda p: AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=0.01),
    "RMSprop, foreach": lambda p: RMSprop(p, 0.01, momentum=0.9, foreach=True),
    "Adagrad, eps 0": lambda p: Adagrad(p, 0.01, eps=0.0),
    "NAdam": lambda p: NAdam(p, 0.01, weight_decay=0.01, decoupled_weight_decay=True),
    "Rprop": lambda p: Rprop(p, 0.01),
}


class Tied(nn.Module):
    """What it puts out is multiplied by the matrix that it looks up in."""

    def __init__(self):
        super().__init__()
        self.look_up = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.look_up.weight

    def forward(self, ids):
        return self.head(self.look_up(ids))


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def half(*names_and_shapes):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in names_and_shapes}


MASKS = half(("0.weight", (7, 6)), ("2.weight", (3, 7)))


def loss(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.cross_entropy(net(torch.randn(9, 6, generator=generator)), torch.arange(9) % 3)


def is_positive_zero(values):
    return bool(((values == 0) & ~values.signbit()).all())


def train(net, optimizer, steps, seed=0):
    for step in range(steps):
        optimizer.zero_grad()
        loss(net, seed + step).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_pruned_weight_never_moves_and_leaves_nothing_in_the_state(name):
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    # momentum of the unpruned weights must not move them later
    train(net, optimizer, 3)
    FixedMasks(net, MASKS).attach(optimizer)
    before = copy.deepcopy(net)
    for step in range(4):
        train(net, optimizer, 1, seed=10 + step)
        for parameter_name, kept in MASKS.items():
            parameter = net.get_parameter(parameter_name)
            assert is_positive_zero(parameter[~kept])
            assert (parameter[kept] != 0).all()
            assert (parameter[kept] != before.get_parameter(parameter_name)[kept]).any()
            states = [s for s in optimizer.state[parameter].values() if isinstance(s, torch.Tensor)]
            assert name == "SGD" or any(s.shape == parameter.shape for s in states)
            assert all(is_positive_zero(s[~kept]) for s in states if s.shape == parameter.shape)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kept_weights_train_as_in_a_network_that_lacks_the_pruned_ones(name):
    """The independent answer: the same network with its masks inside the forward pass."""

    class Masked(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            first, _, second = self.net
            x = F.linear(x, first.weight.where(MASKS["0.weight"], 0.0), first.bias).tanh()
            return F.linear(x, second.weight.where(MASKS["2.weight"], 0.0), second.bias)

    net = model()
    FixedMasks(net, MASKS).apply()
    oracle = Masked(copy.deepcopy(net))
    optimizer = OPTIMIZERS[name](net.parameters())
    FixedMasks(net, MASKS).attach(optimizer)
    train(net, optimizer, 5)
    train(oracle, OPTIMIZERS[name](oracle.parameters()), 5)
    for (parameter_name, mine), theirs in zip(net.named_parameters(), oracle.net.parameters(), strict=True):
        kept = MASKS.get(parameter_name, torch.ones_like(mine, dtype=torch.bool))
        torch.testing.assert_close(mine[kept], theirs[kept], rtol=1e-5, atol=1e-6)


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(1, 7), st.floats(0, 1), st.sampled_from(sorted(OPTIMIZERS)), st.integers(0, 99))
def test_any_mask_of_any_shape_holds(rows, columns, density, name, seed):
    torch.manual_seed(seed)
    net = nn.Linear(columns, rows)
    kept = torch.rand(rows, columns) < density
    optimizer = OPTIMIZERS[name](net.parameters())
    masks = FixedMasks(net, {"weight": kept}).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, columns)).square().sum().backward()
        optimizer.step()
        masks.check()
        assert is_positive_zero(net.weight[~kept])


def test_lbfgs_stays_on_the_mask_and_reaches_the_restricted_optimum():
    """A quadratic, whose minimum with some weights held at zero is a least-squares problem in the others."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(6, 1, bias=False), torch.randn(40, 6), torch.randn(40, 1)
    kept = torch.tensor([[True, False, True, True, False, True]])
    optimizer = torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe", max_iter=50, tolerance_grad=1e-9)
    FixedMasks(net, {"weight": kept}).attach(optimizer)

    def closure():
        optimizer.zero_grad()
        value = F.mse_loss(net(x), y)
        value.backward()
        assert is_positive_zero(net.weight[~kept])
        return value

    optimizer.step(closure)
    best = torch.linalg.lstsq(x[:, kept[0]], y).solution.flatten()
    torch.testing.assert_close(net.weight[kept].detach(), best, rtol=1e-4, atol=1e-4)
    assert is_positive_zero(net.weight[~kept])


def test_an_lbfgs_that_has_stepped_is_refused():
    net = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(net.parameters())

    def closure():
        optimizer.zero_grad()
        value = net(torch.ones(2, 3)).square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    with pytest.raises(ValueError, match="LBFGS has stepped before the masks were attached; attach them to a new one"):
        FixedMasks(net, {"weight": torch.tensor([[True, False, True]])}).attach(optimizer)


def test_a_closure_that_an_optimizer_calls_is_masked_too():
    net = model()
    optimizer = OPTIMIZERS["SGD, momentum, decay"](net.parameters())
    masks = FixedMasks(net, MASKS).attach(optimizer)

    def closure():
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        return value

    for _ in range(3):
        assert optimizer.step(closure).isfinite()
        masks.check()


def test_the_clipped_norm_counts_kept_weights_only():
    net = model()
    FixedMasks(net, MASKS).attach(SGD(net.parameters(), 0.1))
    loss(net).backward()
    expected = sum(
        float(p.grad[MASKS[n]].square().sum() if n in MASKS else p.grad.square().sum())
        for n, p in net.named_parameters()
    )
    assert float(nn.utils.clip_grad_norm_(net.parameters(), 1e9)) == pytest.approx(math.sqrt(expected), rel=1e-5)
    assert all(is_positive_zero(net.get_parameter(name).grad[~kept]) for name, kept in MASKS.items())


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_grad_scaler_and_clipping_leave_the_zeros(fused):
    net = model()
    optimizer = AdamW(net.parameters(), 0.01, weight_decay=0.1, fused=fused)
    masks, scaler = FixedMasks(net, MASKS).attach(optimizer), torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss(net, step)).backward()
        if step == 2:
            # this step is skipped
            net[0].bias.grad[0] = math.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        masks.check()
    assert scaler.get_scale() == 4.0


def test_an_infinite_gradient_of_a_pruned_weight_counts_for_nothing():
    net = nn.Linear(2, 1, bias=False)
    optimizer = Adam(net.parameters(), 0.1)
    FixedMasks(net, {"weight": torch.tensor([[True, False]])}).attach(optimizer)
    net(torch.tensor([[1.0, math.inf]])).nan_to_num().sum().backward()
    net.weight.grad[0, 1] = math.nan
    optimizer.step()
    assert net.weight.isfinite().all()
    assert is_positive_zero(net.weight[0, 1:])


def test_groups_schedules_and_two_optimizers_keep_the_masks():
    net = model()
    first = SGD([{"params": net[0].weight, "lr": 0.5}, {"params": net[0].bias}], 0.1, momentum=0.9, weight_decay=0.1)
    second = Adam(net[2].parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(first, 6)
    masks = FixedMasks(net, MASKS).attach(first).attach(second)
    for step in range(6):
        for optimizer in (first, second):
            optimizer.zero_grad()
        loss(net, step).backward()
        for optimizer in (first, second):
            optimizer.step()
        schedule.step()
        masks.check()
    assert is_positive_zero(second.state[net[2].weight]["exp_avg"][~MASKS["2.weight"]])


def test_a_group_that_is_added_later_is_masked():
    net = model()
    optimizer = SGD(net[0].parameters(), 0.1, momentum=0.9)
    masks = FixedMasks(net, MASKS).attach(optimizer)
    optimizer.add_param_group({"params": net[2].parameters()})
    train(net, optimizer, 3)
    masks.check()


@pytest.mark.parametrize("name", ["look_up.weight", "head.weight"])
def test_a_tied_parameter_is_masked_under_any_of_its_names(name):
    torch.manual_seed(0)
    net = Tied()
    kept = torch.rand(7, 5) < 0.5
    optimizer = AdamW(net.parameters(), 0.1)
    masks = FixedMasks(net, {name: kept}).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.arange(7)), torch.arange(7)).backward()
        optimizer.step()
        masks.check()
    assert is_positive_zero(net.head.weight[~kept])


def test_two_names_of_one_parameter_need_one_mask():
    net, kept = Tied(), torch.eye(7, 5, dtype=torch.bool)
    assert list(FixedMasks(net, {"look_up.weight": kept, "head.weight": kept}).masks) == ["look_up.weight"]
    with pytest.raises(ValueError, match=r"head\.weight and look_up\.weight are one tied parameter, and their masks"):
        FixedMasks(net, {"look_up.weight": kept, "head.weight": ~kept})


def test_a_wrapped_optimizer_is_attached_where_it_steps():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            self.optimizer.step(closure)

        def zero_grad(self, set_to_none=True):
            self.optimizer.zero_grad(set_to_none)

    net = model()
    wrapper = Wrapper(SGD(net.parameters(), 0.1, momentum=0.9))
    masks = FixedMasks(net, MASKS).attach(wrapper)
    train(net, wrapper, 3)
    masks.check()


def test_a_quantised_state_is_left_alone():
    """Code 0 of an 8-bit state is its most negative value."""
    net = nn.Linear(2, 1, bias=False)
    optimizer = SGD(net.parameters(), 0.1)
    optimizer.state[net.weight]["code"] = torch.full((1, 2), 128, dtype=torch.uint8)
    FixedMasks(net, {"weight": torch.tensor([[True, False]])}).attach(optimizer)
    assert optimizer.state[net.weight]["code"].tolist() == [[128, 128]]


def test_attaching_twice_is_attaching_once_and_detaching_gives_everything_back():
    net = model()
    optimizer = SGD(net.parameters(), 0.1)
    masks = FixedMasks(net, MASKS).attach(optimizer).attach(optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == len(optimizer._optimizer_step_pre_hooks) == 1
    masks.detach()
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    masks.check()
    train(net, optimizer, 1)
    with pytest.raises(ValueError, match=r"0\.weight: \d+ of \d+ pruned weights are not \+0\.0; attach the masks"):
        masks.check()


def test_a_parameter_that_was_replaced_stops_the_next_step():
    net = model()
    optimizer = SGD(net.parameters(), 0.1)
    FixedMasks(net, MASKS).attach(optimizer)
    net[0].weight = nn.Parameter(torch.randn(7, 6))
    with pytest.raises(ValueError, match=r"0\.weight is another tensor than the one that was masked; make the masks"):
        optimizer.step()


def test_a_sparse_gradient_is_refused():
    net = nn.Embedding(4, 3, sparse=True)
    FixedMasks(net, {"weight": torch.eye(4, 3, dtype=torch.bool)}).attach(SGD(net.parameters(), 0.1))
    with pytest.raises(ValueError, match="weight: its gradient is sparse, and masks need a dense one"):
        net(torch.tensor([1])).sum().backward()


def test_a_frozen_weight_keeps_its_mask_and_may_be_thawed():
    net = model()
    net[0].weight.requires_grad_(False)
    optimizer = SGD(net.parameters(), 0.1, momentum=0.9)
    masks = FixedMasks(net, MASKS).attach(optimizer)
    train(net, optimizer, 1)
    net[0].weight.requires_grad_(True)
    train(net, optimizer, 2)
    masks.check()


def test_gradients_of_gradients_are_masked():
    net = nn.Linear(2, 1, bias=False)
    net.weight.data.fill_(2.0)
    FixedMasks(net, {"weight": torch.tensor([[True, False]])}).attach(SGD(net.parameters(), 0.1))
    (gradient,) = torch.autograd.grad(net(torch.ones(1, 2)).pow(3).sum(), net.weight, create_graph=True)
    assert gradient.tolist() == [[12.0, 0.0]]
    gradient.sum().backward()
    # d 3 w^2 / dw at w = 2, the pruned weight out of it
    assert net.weight.grad.tolist() == [[12.0, 0.0]]
