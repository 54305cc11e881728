"""A small model, and a training function that keeps what it was handed and what it left, for tests of find_ticket."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

STEPS = 6


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


class Recorder:
    """A training function that keeps what it was handed, and what it left."""

    def __init__(self, steps=STEPS, optimizer=lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.01)):
        self.steps, self.optimizer = steps, optimizer
        self.handed, self.after, self.left, self.masks = [], [], [], []

    def __call__(self, net, training):
        self.handed.append(copy.deepcopy(net.state_dict()))
        self.masks.append(training.masks)
        optimizer = self.optimizer(net.parameters())
        training.attach(optimizer)
        for step in range(training.start, self.steps):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 5, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(net(x + 0.1 * torch.randn(8, 5)), (x[:, 0] > 0).long() + (x[:, 1] > 0)).backward()
            optimizer.step()
            if training.round == 0:
                self.after.append(copy.deepcopy(net.state_dict()))
            for name, kept in training.masks.items():
                pruned = net.get_parameter(name)[~kept]
                assert ((pruned == 0) & ~pruned.signbit()).all()
        self.left.append(copy.deepcopy(net.state_dict()))
        return {"weight": net[0].weight[0, 0].item()}
