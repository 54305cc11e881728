"""What the Triton kernels compute: the cases of each op, interpreted and on a card."""

from pathlib import Path

import pytest
import torch

from tests.ops.triton.without_a_card import assert_cases_hold

pytestmark = pytest.mark.usefixtures("where_triton_is")
cases = pytest.mark.parametrize("file", sorted(path.name for path in Path(__file__).parent.glob("*_cases.py")))


@cases
def test_every_case_holds_in_the_interpreter(file):
    assert_cases_hold(file, interpret="1")


@cases
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_case_holds_on_a_card(file):
    assert_cases_hold(file, interpret="0")
