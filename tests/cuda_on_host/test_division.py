"""csrc/cuda/division.h: what is remembered of a division is what was worked out for it."""

import pytest
import torch

from tests.cuda_on_host.emulator import build


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    return build(tmp_path_factory.mktemp("division"), "division.cpp")


def ask(program, rounds, sizes):
    return program.run("", [], [rounds, sizes], [((rounds, 2), torch.int64)])[0].tolist()


def test_an_answer_is_worked_out_once_and_stands_for_its_own_sizes_and_card_alone(on_host):
    assert ask(on_host, rounds=3, sizes=6) == [[0, 6], [0, 0], [0, 0]]


def test_more_sizes_than_there_is_room_for_are_worked_out_again_and_never_mistaken(on_host):
    (wrong, worked_out), (wrong_again, worked_out_again) = ask(on_host, rounds=2, sizes=1000)
    assert (wrong, worked_out, wrong_again) == (0, 1000, 0)
    assert 0 < worked_out_again <= 1000
