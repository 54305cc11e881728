"""What a SparseLinear does that every nn.Module does: gradients, autocast, moves, copies, torch.compile."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.linear import SparseLinear
from sparsekern.ops import LINEAR_KERNELS
from tests import compressed, tiny_models

formats = pytest.mark.parametrize("format", [Bitmap, SemiStructured], ids=lambda format: format.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
# relative errors of the whole tensor against float64
BOUND = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}


def pruned(out_features=40, in_features=52, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, dtype=dtype)
    linear.weight.data.view(out_features, -1, 4)[:, :, [0, 3]] = 0
    return linear


def every_kernel():
    for format, kernels in LINEAR_KERNELS.items():
        for kernel in kernels:
            yield pytest.param(format, kernel, id=f"{format.name} {kernel.name}")


@pytest.mark.parametrize(("format", "kernel"), every_kernel())
@pytest.mark.parametrize("leading", [(), (1,), (3, 5), (300,), (0,)], ids=str)
@DTYPES
def test_every_kernel_passes_the_gradient_of_x_on(format, kernel, leading, dtype):
    linear = pruned(dtype=dtype)
    packed = format.pack(linear.weight.detach())
    if reason := kernel.refuses(packed):
        pytest.skip(f"{kernel.name}: {reason}")
    sparse = SparseLinear(packed, linear.bias, kernel)
    x = torch.randn(*leading, 52, dtype=dtype, requires_grad=True)
    g = torch.randn(*leading, 40, dtype=dtype)
    sparse(x).backward(g)
    # what packing has made of the weight: with integers it is another
    exact = g.double() @ packed.to_dense().double()
    assert x.grad.dtype == dtype
    assert (x.grad.double() - exact).norm() <= BOUND[dtype] * exact.norm()


@formats
def test_a_training_step_leaves_the_packed_weight_as_it_is(format):
    linear = pruned()
    sparse = SparseLinear.from_linear(linear, format)
    before = {name: buffer.clone() for name, buffer in sparse._buffers.items()}
    model = nn.Sequential(nn.Linear(52, 52), sparse, nn.Linear(40, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 52)).square().mean().backward()
    assert model[0].weight.grad.any()
    optimizer.step()
    assert list(sparse.parameters()) == []
    assert all(torch.equal(buffer, before[name]) for name, buffer in sparse._buffers.items())


def test_what_is_returned_can_be_written_to():
    """A view of what an op has made cannot, once it has a gradient: Llama 4 does."""
    sparse = SparseLinear.from_linear(pruned())
    x = torch.randn(2, 3, 52, requires_grad=True)
    sparse(x).mul_(2).sum().backward()
    doubled, x.grad = x.grad, None
    sparse(x).sum().backward()
    torch.testing.assert_close(doubled, 2 * x.grad)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@formats
@DTYPES
def test_autocast_takes_and_gives_what_nn_linear_does(format, dtype, x_dtype, to):
    linear = pruned(dtype=dtype)
    sparse = SparseLinear.from_linear(linear, format)
    x = torch.randn(3, 52, dtype=x_dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=to):
        y, want = sparse(x), linear(x)
    assert y.dtype == want.dtype == to
    torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert x.grad.dtype == x_dtype
    with pytest.raises((ValueError, RuntimeError), match="dtype"), torch.autocast("cpu", dtype=to):
        sparse(x.double())


@formats
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_a_copy_and_a_pickle_compute_the_same(format, kind):
    sparse = SparseLinear.from_linear(pruned(dtype=kind), format)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    x = torch.randn(3, 52).to(kind)
    for again in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), sparse(x))
        assert again.kernel.name == sparse.kernel.name
        assert again.state_dict().keys() == sparse.state_dict().keys()


@formats
def test_shared_memory_holds_what_the_kernel_reads(format):
    sparse = SparseLinear.from_linear(pruned(), format)
    x = torch.randn(3, 52)
    before = sparse(x)
    assert sparse.share_memory() is sparse
    assert all(buffer.is_shared() for buffer in sparse.buffers())
    assert torch.equal(sparse(x), before)


@formats
def test_a_model_changes_its_dtype_and_comes_back(format):
    linear = pruned().to(torch.bfloat16)
    model = nn.Sequential(SparseLinear.from_linear(linear, format))
    x = torch.randn(3, 52)
    assert model.float()(x).dtype == torch.float32
    assert torch.equal(model[0].weight, linear.weight.float())
    assert model.half()(x.half()).dtype == torch.float16
    assert torch.equal(model.to(torch.bfloat16)[0].weight, linear.weight)
    assert (model[0].packed.name, model[0].bias.dtype) == (format.name, torch.bfloat16)


@formats
def test_to_empty_makes_a_weight_that_no_kernel_can_stumble_on(format):
    sparse = nn.Sequential(SparseLinear.from_linear(pruned(), format))
    for start in ("cpu", "meta"):
        sparse = sparse.to(start).to_empty(device="cpu")
        assert not sparse[0].weight.any()
        sparse[0].packed.validate()
        state = {"0.weight": pruned().weight, "0.bias": pruned().bias}
        sparse.load_state_dict(state)
        x = torch.randn(3, 52)
        torch.testing.assert_close(sparse(x), pruned()(x))


@formats
@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_on_the_meta_device_knows_its_sizes_and_can_be_filled(format, assign):
    sparse = SparseLinear.from_linear(pruned(), format).to("meta")
    assert (sparse.device.type, sparse.weight.shape, sparse.dtype) == ("meta", (40, 52), torch.float32)
    assert sparse(torch.empty(3, 52, device="meta")).shape == (3, 40)
    with pytest.raises(NotImplementedError, match="meta"):
        sparse.to("cpu")
    sparse.load_state_dict({name: value.detach() for name, value in pruned().state_dict().items()}, assign=assign)
    x = torch.randn(3, 52)
    torch.testing.assert_close(sparse(x), pruned()(x))


@formats
def test_compiled_as_one_graph_it_computes_the_same_and_trains(format):
    model = nn.Sequential(nn.Linear(52, 52), SparseLinear.from_linear(pruned(), format))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 7):
        x = torch.randn(tokens, 52)
        torch.testing.assert_close(compiled(x), model(x))
        (want,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
        (got,) = torch.autograd.grad(compiled(x).square().sum(), model[0].weight)
        torch.testing.assert_close(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_a_model_that_asks_a_weight_for_its_dtype_builds_no_weight(monkeypatch):
    """T5 does, in every forward pass."""
    model = compressed.sparse("t5")
    assert isinstance(model.get_submodule("encoder.block.0.layer.1.DenseReluDense.wo"), sk.SparseLinear)
    built = []
    monkeypatch.setattr(SparseLinear, "_dense", lambda module: built.append(module))
    batch = tiny_models.batches("t5", 1)[0]
    with torch.no_grad():
        model(**batch)
    assert built == []


def test_a_model_that_asks_a_weight_for_its_dtype_compiles_as_one_graph():
    block = compressed.sparse("t5").encoder.block[0].layer[1]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
