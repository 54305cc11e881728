"""Inputs that are not as usual, to SparseLinear of every format: served as by the dense layer, or refused in words."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import sparsekern as sk
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.pattern import NM

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}
OUT, IN = 37, 68
every_layer = pytest.mark.parametrize(
    ("format", "dtype"),
    list(itertools.product((Bitmap, SemiStructured), TOLERANCE)),
    ids=lambda value: getattr(value, "name", str(value).removeprefix("torch.")),
)


def dense_layer(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    layer.weight.mul_(NM(2, 4).mask(layer.weight.abs()))
    return layer.to(dtype)


def assert_right(y, x, layer):
    exact = linear(x.double(), layer.weight.double(), layer.bias.double())
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    assert (y.double() - exact).norm() <= TOLERANCE[x.dtype] * exact.norm()


SHAPES = [(0,), (1,), (2,), (7,), (33,), (200,), (), (2, 3), (2, 0, 3), (2, 3, 4), (2, 1, 4, 3)]


@every_layer
def test_any_number_of_tokens_and_dimensions_is_served(format, dtype):
    layer = dense_layer(dtype)
    sparse = sk.SparseLinear.from_linear(layer, format)
    for shape in SHAPES:
        x = torch.randn(*shape, IN).to(dtype)
        assert_right(sparse(x), x, layer)


@every_layer
def test_x_may_lie_anyhow_in_memory(format, dtype):
    layer = dense_layer(dtype)
    sparse = sk.SparseLinear.from_linear(layer, format)
    whole = torch.randn(4 * IN * 6 + 1).to(dtype)
    for x in (
        whole[: 6 * IN].view(IN, 6).T,
        whole[: 6 * 2 * IN].view(6, 2 * IN)[:, ::2],
        whole[:IN].expand(9, IN),
        whole[:1].expand(3, IN),
        whole[:IN].expand(2, 3, IN),
        whole[: 4 * IN * 5].view(4, IN, 5).transpose(1, 2),
        # one element past where vector loads would like it
        whole[1 : 3 * IN + 1].view(3, IN),
        whole[3 : 2 * IN + 3].view(2, 1, IN),
        whole[: 2 * IN].view(2, IN).flip(0),
    ):
        assert_right(sparse(x), x, layer)


@every_layer
def test_weights_may_lie_anyhow_in_memory(format, dtype):
    """As a checkpoint that is mapped into memory has them: aligned to the element and no more."""
    layer, x = dense_layer(dtype), torch.randn(5, IN).to(dtype)
    sparse = sk.SparseLinear.from_linear(layer, format)
    want = sparse(x)
    for name, buffer in list(sparse.named_buffers()):
        moved = torch.empty(buffer.numel() + 1, dtype=buffer.dtype)[1:].view(buffer.shape)
        setattr(sparse, name, moved.copy_(buffer))
    assert torch.equal(sparse(x), want)


@every_layer
def test_the_same_answer_comes_run_to_run_and_whatever_was_called_between(format, dtype):
    sparse = sk.SparseLinear.from_linear(dense_layer(dtype), format)
    inputs = [torch.randn(tokens, IN).to(dtype) for tokens in (1, 5, 40)]
    first = [sparse(x) for x in inputs]
    for _ in range(5):
        assert all(torch.equal(sparse(x), y) for x, y in zip(inputs, first, strict=True))
        sparse(torch.full((3, IN), torch.nan, dtype=dtype))


@every_layer
def test_what_does_not_fit_is_an_error_and_not_a_wrong_number(format, dtype):
    sparse = sk.SparseLinear.from_linear(dense_layer(dtype), format)
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    x = torch.randn(3, IN)
    for bad in (x.to(dtype)[:, 1:], x.to(other), x.to(dtype).long(), torch.tensor(1.0).to(dtype)):
        with pytest.raises((ValueError, RuntimeError)):
            sparse(bad)


def test_what_does_not_fit_the_compiled_kernel_is_refused_in_words():
    sparse = sk.SparseLinear.from_linear(dense_layer(torch.float32), Bitmap)
    if sparse.kernel.name != "cpu":
        pytest.skip(f"the {sparse.kernel.name} kernel serves here")
    for x, message in (
        (torch.randn(3, IN - 1), rf"x must end with in_features = {IN}, got shape \[3, {IN - 1}\]"),
        (torch.tensor(1.0), rf"x must end with in_features = {IN}, got shape \[\]"),
        (torch.randn(3, IN).bfloat16(), "x must have the weight's dtype torch.float32, got torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse(x)


@pytest.mark.parametrize("format", [Bitmap, SemiStructured], ids=lambda format: format.name)
def test_one_compiled_graph_serves_any_number_of_tokens(format):
    layer = dense_layer(torch.float32)
    sparse = sk.SparseLinear.from_linear(layer, format)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    run = torch.compile(lambda x: sparse(x).relu(), fullgraph=True, dynamic=True, backend=backend)
    for shape in ((3, 5), (2, 9), (7, 80), (4, 300)):
        x = torch.randn(*shape, IN)
        torch.testing.assert_close(run(x), layer(x).relu(), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("format", [Bitmap, SemiStructured], ids=lambda format: format.name)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
def test_every_grad_mode_gives_the_same_bits(format, mode):
    sparse, x = sk.SparseLinear.from_linear(dense_layer(torch.float32), format), torch.randn(5, IN)
    want = sparse(x)
    with mode():
        assert torch.equal(sparse(x), want)


needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_card
@every_layer
def test_a_cuda_graph_replays_on_new_inputs(format, dtype):
    layer = dense_layer(dtype).cuda()
    sparse = sk.SparseLinear.from_linear(layer, format)
    x = torch.randn(5, IN).to(dtype).cuda()
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        sparse(x)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert_right(y, x, layer)


@needs_card
@every_layer
def test_two_streams_do_not_disturb_each_other(format, dtype):
    layer = dense_layer(dtype).cuda()
    sparse = sk.SparseLinear.from_linear(layer, format)
    inputs, streams = [torch.randn(7, IN).to(dtype).cuda() for _ in range(2)], [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outputs = []
    for _ in range(50):
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                outputs.append((sparse(x), x))
    torch.cuda.synchronize()
    for y, x in outputs:
        assert_right(y, x, layer)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
@every_layer
def test_a_card_that_is_not_the_first_serves(format, dtype):
    layer = dense_layer(dtype).to("cuda:1")
    sparse = sk.SparseLinear.from_linear(layer, format)
    x = torch.randn(5, IN).to(dtype).to("cuda:1")
    assert_right(sparse(x), x, layer)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        sparse(x.to("cuda:0"))
