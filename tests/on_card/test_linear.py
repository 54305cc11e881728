"""Every kernel of every packed format, on the CPU and on a card: float64, streams, graphs, compilation, odd addresses.

Outputs start as NaN (tests/conftest.py).
"""

import threading

import pytest
import torch

from sparsekern.ops import to_dense
from tests.on_card.subjects import SHARED, assert_is_linear, input_of

TOKENS = (0, 1, 2, 3, 8, 9, 16, 17, 33, 64, 65, 130)


@pytest.mark.parametrize("shape", [(37, 100), (16, 32), (129, 1000), (272, 1040)], ids=str)
def test_it_matches_float64_for_every_number_of_tokens(prepared, shape, place, dtype):
    weight, kernel, operands = prepared(*shape)
    bias = input_of(1, shape[0], dtype, place, seed=7)[0]
    for tokens in TOKENS:
        x = input_of(tokens, shape[1], dtype, place, seed=tokens)
        for b in (bias, None):
            assert_is_linear(kernel.run(x, operands, b, *shape), x, weight, b)


def test_the_weight_comes_back_bit_for_bit_packed_and_dense(prepared):
    weight, kernel, operands = prepared(129, 1040)
    assert torch.equal(to_dense(kernel.restore(operands, 129, 1040)), weight)
    assert torch.equal(kernel.dense(operands, 129, 1040), weight)


def test_the_same_input_gives_the_same_bits(prepared, place, dtype):
    _, kernel, operands = prepared(*SHARED)
    for tokens in (1, 8, 40):
        x = input_of(tokens, SHARED[1], dtype, place)
        first = kernel.run(x, operands, None, *SHARED)
        assert all(torch.equal(kernel.run(x, operands, None, *SHARED), first) for _ in range(10))


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_slices_transposes_and_odd_addresses_are_read_where_they_stand(prepared, place, dtype, tokens):
    weight, kernel, operands = prepared(*SHARED)
    x, bias = input_of(tokens, SHARED[1], dtype, place), input_of(1, SHARED[0], dtype, place, seed=1)[0]
    shifted, shifted_bias = x.new_empty(x.numel() + 1)[1:].view_as(x), bias.new_empty(SHARED[0] + 1)[1:]
    shifted.copy_(x), shifted_bias.copy_(bias)
    assert shifted.data_ptr() % 16 == x.itemsize
    wide = x.new_full((tokens, 2 * SHARED[1]), torch.nan)
    wide[:, ::2] = x
    for same in (shifted, wide[:, ::2], x.T.contiguous().T, x[:1].expand(tokens, -1)):
        for b in (bias, shifted_bias, bias[:1].expand(SHARED[0])):
            assert_is_linear(kernel.run(same, operands, b, *SHARED), same, weight, b)


def test_leading_dimensions_are_kept(prepared, place, dtype):
    weight, kernel, operands = prepared(37, 100)
    x = input_of(6, 100, dtype, place)
    for leading in ((2, 3), (6, 1), (1, 2, 3), (2, 0)):
        part = x[: torch.Size(leading).numel()].view(*leading, 100)
        assert_is_linear(kernel.run(part, operands, None, 37, 100), part, weight)
    assert_is_linear(kernel.run(x[0], operands, None, 37, 100), x[0], weight)


def test_what_does_not_fit_is_refused_before_a_launch(prepared, place, dtype):
    _, kernel, operands = prepared(37, 100)
    other = torch.float32 if dtype != torch.float32 else torch.float16
    for wrong in (input_of(2, 99, dtype, place), input_of(2, 100, other, place)):
        with pytest.raises(ValueError, match="x must"):
            kernel.run(wrong, operands, None, 37, 100)
    with pytest.raises(ValueError, match="bias must"):
        kernel.run(input_of(2, 100, dtype, place), operands, input_of(1, 37, other, place)[0], 37, 100)


def test_a_gradient_reaches_the_input(prepared, place, dtype):
    weight, kernel, operands = prepared(37, 100)
    x = input_of(5, 100, dtype, place).requires_grad_()
    g = input_of(5, 37, dtype, place, seed=3)
    kernel.run(x, operands, None, 37, 100).backward(g)
    assert_is_linear(x.grad, g, weight.T)


def test_threads_share_a_layer(prepared, place, dtype):
    weight, kernel, operands = prepared(129, 1000)
    inputs, outputs = [input_of(3, 1000, dtype, place, seed) for seed in range(4)], [None] * 4

    def work(number):
        for _ in range(10):
            outputs[number] = kernel.run(inputs[number], operands, None, 129, 1000)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, y in zip(inputs, outputs, strict=True):
        assert_is_linear(y, x, weight)


def test_torch_compile_takes_the_whole_graph(prepared, place, dtype):
    weight, kernel, operands = prepared(48, 96)
    bias = weight[:, 0].contiguous()

    def layer(x):
        return kernel.run(x, operands, bias, 48, 96).relu()

    # the code generator once a kernel: what it makes of the rest is the same for every dtype
    backend = "inductor" if place.type == "cuda" and dtype == torch.bfloat16 else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (5, 1, 9, 80):
        x = input_of(tokens, 96, dtype, place)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("tokens", [1, 8, 40, 130])
def test_two_streams_do_not_disturb_each_other(prepared, place, dtype, tokens):
    weight, kernel, operands = prepared(*SHARED)
    inputs = [input_of(tokens, SHARED[1], dtype, place, seed) for seed in range(2)]
    expected = [kernel.run(x, operands, None, *SHARED) for x in inputs]
    outputs = on_streams(place, lambda number: kernel.run(inputs[number], operands, None, *SHARED), rounds=20)
    for number, y in outputs:
        assert torch.equal(y, expected[number])
    assert_is_linear(expected[0], inputs[0], weight)


def on_streams(place, call, rounds):
    """(number, call(number)) for 0 and 1 in turn, each on a stream of its own, nobody waiting for the other."""
    if place.type == "cpu":
        return [(number, call(number)) for _ in range(rounds) for number in range(2)]
    torch.cuda.synchronize(place)
    streams, outputs = [torch.cuda.Stream(place) for _ in range(2)], []
    for _ in range(rounds):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs.append((number, call(number)))
    torch.cuda.synchronize(place)
    return outputs


@pytest.mark.parametrize("tokens", [1, 8, 40, 130])
def test_a_captured_graph_computes_with_the_input_of_its_replay(prepared, place, dtype, tokens):
    weight, kernel, operands = prepared(*SHARED)
    x = input_of(tokens, SHARED[1], dtype, place)
    y, replay = capture(place, lambda: kernel.run(x, operands, None, *SHARED))
    for seed in range(1, 4):
        x.copy_(input_of(tokens, SHARED[1], dtype, place, seed))
        y.fill_(torch.nan)
        replay()
        assert_is_linear(y, x, weight)
        assert torch.equal(y, kernel.run(x, operands, None, *SHARED))


def capture(place, call):
    """The output of `call` and a function that computes it again into the same memory."""
    if place.type == "cpu":
        y = call()
        return y, lambda: y.copy_(call())
    with torch.cuda.device(place):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
    return y, graph.replay
