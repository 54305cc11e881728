"""linear_dense: every kernel and instruction set against float64, at sizes that divide nothing."""

import pytest
import torch
from torch.nn.functional import linear

from sparsekern.formats import Dense
from sparsekern.ops import compiled, linear_dense
from sparsekern.ops.kernel import pick

WHY_NOT = compiled.why_not("cpu")
needs_cpu = pytest.mark.skipif(WHY_NOT is not None, reason=f"sparsekern._cpu: {WHY_NOT}")
SETS = compiled.cpu().linear_dense_sets() if WHY_NOT is None else ()
KERNELS = {kernel.name: kernel for kernel in linear_dense.KERNELS}
# relative errors of the whole output against float64
BOUND = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}
SHAPES = [(1, 1), (1, 100), (7, 37), (37, 7), (100, 257), (257, 100), (48, 1096)]

dtypes = pytest.mark.parametrize("dtype", BOUND, ids=str)
every_set = pytest.mark.parametrize("isa", SETS)


def problem(out_features, in_features, tokens, dtype):
    """A weight, its operands, an input and a bias."""
    torch.manual_seed(out_features * 1000 + in_features)
    weight = torch.randn(out_features, in_features).to(dtype)
    x, bias = torch.randn(tokens, in_features).to(dtype), torch.randn(out_features).to(dtype)
    return weight, linear_dense.to_panels(Dense.pack(weight)), x, bias


def assert_right(y, x, weight, bias=None):
    """y must be within the dtype's bound of the float64 product."""
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert not y.isnan().any()
    assert (y.double() - exact).norm() <= BOUND[x.dtype] * exact.norm()


def test_the_panels_are_16_rows_of_input_pairs():
    weight = torch.arange(17 * 3).view(17, 3).float()
    (panels,) = linear_dense.to_panels(Dense(weight))
    assert list(panels.shape) == [2, 16, 16, 2]
    assert panels[0, 0, 5].tolist() == [15, 16]
    assert panels[0, 1, 5].tolist() == [17, 0]
    assert panels[1, 0, 0].tolist() == [48, 49]
    assert panels[1, :, 1:].abs().sum() == 0
    assert panels[0, 2:].abs().sum() == 0


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("shape", [*SHAPES, (16, 32), (0, 5), (5, 0)], ids=str)
@dtypes
def test_restore_gives_back_the_same_bits(kernel, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    if weight.numel():
        weight[-1, -1] = -0.0
    operands = kernel.prepare(Dense.pack(weight))
    for restored in (kernel.restore(operands, *shape).weight, kernel.dense(operands, *shape)):
        assert torch.equal(restored, weight)
        assert torch.equal(restored.signbit(), weight.signbit())


def test_panels_of_another_size_are_refused():
    operands = linear_dense.to_panels(Dense(torch.zeros(17, 3)))
    with pytest.raises(ValueError, match="panels must be \\[1, 16, 16, 2\\], got \\[2, 16, 16, 2\\]"):
        linear_dense.from_panels(operands, 16, 3)


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_gives_the_product(shape, isa, dtype):
    # every size of a lone group, of two groups, and more groups than one pass over the weight serves
    for tokens in (*range(1, 15), 17, 24, 25, 65, 191, 193, 400):
        weight, (panels,), x, bias = problem(*shape, tokens, dtype)
        for b in (None, bias):
            y = torch.full((tokens, shape[0]), float("nan"), dtype=dtype)
            linear_dense.multiply(x, panels, b, y, shape[1], isa)
            assert_right(y, x, weight, b)


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_operands_may_lie_at_any_address(tokens, isa, dtype):
    weight, (panels,), x, _ = problem(37, 70, tokens, dtype)
    moved = torch.empty(panels.numel() + 1, dtype=dtype)[1:].view(panels.shape).copy_(panels)
    moved_x = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)
    y = torch.full((tokens * 37 + 1,), float("nan"), dtype=dtype)[1:].view(tokens, 37)
    linear_dense.multiply(moved_x, moved, None, y, 70, isa)
    assert_right(y, x, weight)


@needs_cpu
@every_set
@dtypes
def test_nan_and_inf_reach_what_they_reach_in_torch(isa, dtype):
    weight, _, x, _ = problem(37, 70, 5, dtype)
    x[1, 3], x[2, 69], weight[5, 0] = float("nan"), float("inf"), float("nan")
    (panels,) = linear_dense.to_panels(Dense(weight))
    y = torch.zeros(5, 37, dtype=dtype)
    linear_dense.multiply(x, panels, None, y, 70, isa)
    assert torch.equal(y.isnan(), linear(x.float(), weight.float()).isnan())


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (3,), (16,), (17,), (1000,), (), (2, 3), (2, 1, 4, 3)])
@dtypes
def test_every_kernel_serves_any_leading_dimensions(kernel, shape, dtype):
    weight, _, _, bias = problem(100, 257, 1, dtype)
    if reason := kernel.refuses(Dense(weight)):
        pytest.skip(reason)
    x = torch.randn(*shape, 257).to(dtype)
    for b in (None, bias):
        y = kernel.run(x, kernel.prepare(Dense(weight)), b, 100, 257)
        assert_right(y, x, weight, b)


@needs_cpu
@dtypes
def test_x_and_bias_may_have_any_strides(dtype):
    weight, operands, _, _ = problem(37, 70, 1, dtype)
    bias = torch.randn(74).to(dtype)[::2]
    for x in (torch.randn(70, 6).to(dtype).T, torch.randn(6, 140).to(dtype)[:, ::2], torch.randn(1, 70).expand(4, 70)):
        x = x.to(dtype)
        assert_right(KERNELS["cpu"].run(x, operands, bias, 37, 70), x, weight, bias)


@needs_cpu
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_empty_weights_give_the_bias(shape):
    bias = torch.randn(shape[0])
    y = KERNELS["cpu"].run(torch.zeros(3, shape[1]), linear_dense.to_panels(Dense(torch.zeros(shape))), bias, *shape)
    assert torch.equal(y, bias.expand(3, -1))


@needs_cpu
def test_what_does_not_fit_is_refused_in_words():
    _, (panels,), x, bias = problem(37, 70, 3, torch.float32)
    run = KERNELS["cpu"].run
    with pytest.raises(ValueError, match="x must end with in_features = 70, got shape \\[3, 69\\]"):
        run(x[:, :69], (panels,), bias, 37, 70)
    with pytest.raises(ValueError, match="x must have the weight's dtype torch.float32, got torch.bfloat16"):
        run(x.bfloat16(), (panels,), bias, 37, 70)
    with pytest.raises(ValueError, match="panels must hold 32 by 96 elements, got 4608"):
        run(x, (panels,), bias[:32], 32, 70)
    with pytest.raises(ValueError, match="bias must hold 37 elements, got 36"):
        run(x, (panels,), bias[:36], 37, 70)
    with pytest.raises(ValueError, match="does not have the instruction set amx"):
        linear_dense.multiply(x, panels, bias, torch.zeros(3, 37), 70, "amx")


def test_a_weight_that_no_compiled_kernel_serves_is_refused_in_words(monkeypatch):
    refuses = KERNELS["cpu"].refuses
    assert "must be bfloat16, float16 or float32, got torch.float64" in refuses(Dense(torch.ones(2, 2).double()))
    assert "must be on the CPU, got meta" in refuses(Dense(torch.ones(2, 2, device="meta")))
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no compiler")
    assert pick(linear_dense.KERNELS, Dense(torch.ones(2, 2))).name == "reference"


@needs_cpu
@dtypes
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_the_op_is_registered_as_torch_wants_it(tokens, dtype):
    _, operands, x, bias = problem(37, 70, tokens, dtype)
    op = torch.ops.sparsekern.linear_dense_cpu.default
    torch.library.opcheck(op, (x, *operands, bias, 37, 70))
    torch.library.opcheck(op, (x[None], *operands, None, 37, 70))
    torch.library.opcheck(op, (x.requires_grad_(), *operands, bias.requires_grad_(), 37, 70))


@needs_cpu
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
def test_x_and_the_bias_have_the_gradients_of_torch(leading):
    weight, operands, _, _ = problem(37, 70, 1, torch.float32)
    x, bias, g = torch.randn(*leading, 70), torch.randn(37), torch.randn(*leading, 37)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    got = torch.autograd.grad(KERNELS["cpu"].run(x, operands, bias, 37, 70), (x, bias), g)
    want = torch.autograd.grad(linear(x, weight, bias), (x, bias), g)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
