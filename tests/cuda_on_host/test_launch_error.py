"""A launch that fails is a Python error with the op, the rule and the remedy: by the binding, emulated, on a card."""

import types

import pytest
import torch

from sparsekern.formats import SemiStructured
from sparsekern.ops import compiled, fragments_24, linear_24
from sparsekern.pattern import NM
from tests.cuda_on_host.emulator import build

REMEDY = "the sizes must be those that this kernel and this card take; give the layer another kernel, or leave it dense"
# more tokens than the prefill kernel counts: its launcher returns before it asks the card anything
MOST = (1 << 30) + 1


def refused_by_the_launcher():
    operands = {"values": 0, "values_size": 2048, "metadata": 0, "metadata_size": 128, "bias": 0, "bias_size": 0}
    sizes = {"tokens": MOST, "out_features": 16, "in_features": 256, "x_size": MOST * 256, "y_size": MOST * 16}
    compiled.cuda().linear_24_prefill_bf16(x=0, y=0, stream=0, **operands, **sizes)


@pytest.fixture
def module():
    if reason := compiled.why_not("cuda"):
        pytest.skip(f"sparsekern._cuda: {reason}")
    return compiled.cuda()


def test_what_a_launcher_refuses_names_the_op_the_rule_and_the_remedy(module):
    with pytest.raises(RuntimeError) as raised:
        refused_by_the_launcher()
    said = "the launch failed with cudaErrorInvalidConfiguration, invalid configuration argument"
    assert str(raised.value) == f"linear_24_prefill: {said}: {REMEDY}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, so nothing is missing")
def test_without_a_driver_or_a_card_the_error_says_what_to_do(module):
    said = "linear_24: the launch failed with cudaError(InsufficientDriver.* update it|NoDevice.* CUDA_VISIBLE_DEVICES)"
    with pytest.raises(RuntimeError, match=said):
        module.linear_24_workspace(1, 16, 256)


def test_an_emulated_launch_that_fails_reaches_the_caller_of_the_op(tmp_path, on_no_card, monkeypatch):
    """The op is made to ask for more tokens than the launcher takes."""
    program = build(tmp_path, "linear_24.cpp", "linear_24.cu")
    weight = torch.randn(7, 36).bfloat16()
    weight = weight.where(NM(2, 4).mask(weight.abs()), 0.0)
    operands = fragments_24.reference(SemiStructured.pack(weight))
    x = torch.randn(65, 36).bfloat16()

    def launch(*, tokens, out_features, in_features, **_):
        done = program.call("bf16", [x, *operands, None], [tokens, out_features, in_features])
        if done.returncode:
            raise RuntimeError(done.stderr.decode().strip())

    stand_in = types.SimpleNamespace(linear_24_workspace=lambda *_: 0, linear_24_bf16=launch)
    monkeypatch.setattr(compiled, "cuda", lambda: stand_in)
    monkeypatch.setattr(linear_24, "_DECODE_TOKENS", 65)
    with pytest.raises(RuntimeError) as raised:
        linear_24.run_cuda(x, operands, None, 7, 36)
    assert str(raised.value) == f"linear_24: the launch failed with cudaErrorInvalidValue, invalid argument: {REMEDY}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_card_a_launch_that_fails_raises_and_the_next_one_is_right(module):
    weight = torch.randn(33, 260, device="cuda").bfloat16()
    weight = weight.where(NM(2, 4).mask(weight.abs()), 0.0)
    operands = fragments_24.reference(SemiStructured.pack(weight))
    x = torch.randn(3, 260, device="cuda").bfloat16()
    expected = linear_24.run_cuda(x, operands, None, 33, 260)
    with pytest.raises(RuntimeError, match="linear_24_prefill: the launch failed with cudaErrorInvalidConfiguration"):
        refused_by_the_launcher()
    assert torch.equal(linear_24.run_cuda(x, operands, None, 33, 260), expected)
