"""The dense weight of a packed layer: what is known of it costs nothing, its values are built once, nobody writes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from sparsekern.lazy_weight import LazyWeight

DENSE = torch.arange(6.0).reshape(2, 3)


class Counted:
    """A LazyWeight of DENSE, and how often its values were built."""

    def __init__(self):
        self.times = 0
        self.weight = LazyWeight((2, 3), torch.float32, torch.device("cpu"), self._build)

    def _build(self):
        self.times += 1
        return DENSE.clone()


@pytest.fixture
def counted():
    return Counted()


def test_what_a_weight_is_like_is_known_without_its_values(counted):
    weight = counted.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.layout) == (torch.float32, torch.device("cpu"), torch.strided)
    assert weight.shape == weight.size() == (2, 3)
    assert (weight.ndim, weight.dim(), weight.numel(), weight.nbytes, weight.stride()) == (2, 2, 6, 24, (3, 1))
    assert (weight.requires_grad, weight.is_meta, weight.is_floating_point(), weight.is_contiguous()) == (
        False,
        False,
        True,
        True,
    )
    assert weight.data is weight.detach() is weight
    assert counted.times == 0


@pytest.mark.parametrize(
    "read",
    [
        lambda weight: weight + 0,
        lambda weight: weight.clone(),
        lambda weight: weight.T.T,
        lambda weight: linear(torch.eye(3), weight).T,
        lambda weight: linear(input=torch.eye(3), weight=weight).T,
        lambda weight: torch.stack([weight])[0],
        lambda weight: torch.tensor(weight.tolist()),
        lambda weight: torch.from_numpy(weight.numpy()),
        lambda weight: torch.zeros(2, 3).copy_(weight),
        copy.deepcopy,
        lambda weight: pickle.loads(pickle.dumps(weight)),
    ],
)
def test_whatever_reads_values_gets_a_plain_tensor(counted, read):
    values = read(counted.weight)
    assert type(values) is torch.Tensor
    assert torch.equal(values, DENSE)
    read(counted.weight)
    assert counted.times == 1


def add_in_place(weight):
    weight += 1


def add_to_data(weight):
    weight.data += 1


@pytest.mark.parametrize(
    "write",
    [
        add_in_place,
        add_to_data,
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.copy_(DENSE),
        lambda weight: weight.__setitem__(0, 1),
        lambda weight: setattr(weight, "data", DENSE),
        lambda weight: weight.requires_grad_(True),
        lambda weight: nn.init.zeros_(weight),
        nn.Parameter,
    ],
)
def test_writing_is_refused_with_the_remedy(counted, write):
    with pytest.raises(
        RuntimeError, match=r"cannot be written to, trained or merged into: sparsekern\.densify\(model\)"
    ):
        write(counted.weight)
    assert torch.equal(counted.weight, DENSE)
