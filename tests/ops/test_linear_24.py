"""linear_24: every kernel against float64, at sizes that divide nothing."""

import pytest
import torch

from sparsekern.formats import SemiStructured
from sparsekern.ops import compiled, linear_24, panels_24
from sparsekern.pattern import NM

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(out_features, in_features, dtype):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=g)
    weight = weight.where(NM(2, 4).mask(weight.abs()), 0.0).to(dtype)
    return weight, torch.randn(out_features, generator=g).to(dtype)


@pytest.mark.parametrize("kernel", linear_24.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 4), (7, 20), (37, 100), (33, 64)])
@pytest.mark.parametrize("leading", [(0,), (1,), (3, 5), (2, 1, 3)], ids=str)
def test_every_kernel_matches_float64(kernel, dtype, out_features, in_features, leading):
    weight, bias = problem(out_features, in_features, dtype)
    packed = SemiStructured.pack(weight)
    if reason := kernel.refuses(packed):
        pytest.skip(f"{kernel.name}: {reason}")
    x = torch.randn(*leading, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    for b in (bias, None):
        y = kernel.run(x, kernel.prepare(packed), b, out_features, in_features)
        expected = x.double() @ weight.double().T + (0 if b is None else b.double())
        assert y.shape == (*leading, out_features)
        assert y.dtype == dtype
        assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("kernel", linear_24.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (0, 0)], ids=str)
def test_layers_without_inputs_or_outputs_are_served(kernel, shape):
    packed = SemiStructured.pack(torch.zeros(shape).bfloat16())
    if reason := kernel.refuses(packed):
        pytest.skip(f"{kernel.name}: {reason}")
    for tokens in (0, 1, 3, 100):
        x, bias = torch.randn(tokens, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
        y = kernel.run(x, kernel.prepare(packed), bias, *shape)
        assert torch.equal(y, torch.nn.functional.linear(x, torch.zeros(shape).bfloat16(), bias))


@pytest.mark.parametrize("kernel", linear_24.KERNELS, ids=lambda kernel: kernel.name)
def test_restore_gives_back_the_packed_weight_bit_for_bit(kernel):
    if kernel.name == "cusparselt":
        pytest.skip("test_cusparselt.py has a stand-in for the library")
    packed = SemiStructured.pack(problem(37, 100, torch.float32)[0])
    restored = kernel.restore(kernel.prepare(packed), 37, 100)
    assert torch.equal(restored.values, packed.values)
    assert torch.equal(restored.metadata, packed.metadata)


WHY_NOT = compiled.why_not("cpu")
needs_cpu = pytest.mark.skipif(WHY_NOT is not None, reason=f"sparsekern._cpu: {WHY_NOT}")
every_set = pytest.mark.parametrize("isa", compiled.cpu().linear_24_sets() if WHY_NOT is None else ())


@needs_cpu
@every_set
@pytest.mark.parametrize("shape", [(1, 4), (7, 20), (37, 100), (33, 64), (48, 1096)], ids=str)
def test_every_instruction_set_gives_the_product(shape, isa):
    weight, bias = problem(*shape, torch.bfloat16)
    operands = panels_24.reference(SemiStructured.pack(weight))
    # every number that is multiplied at once, and several turns
    for tokens in (1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 20, 23, 24, 25, 49, 130, 1000):
        x = torch.randn(tokens, shape[1]).bfloat16()
        for b in (bias, None):
            y = torch.full((tokens, shape[0]), float("nan")).bfloat16()
            linear_24.multiply(x, operands, b, y, shape[1], isa)
            expected = x.double() @ weight.double().T + (0 if b is None else b.double())
            assert not y.isnan().any()
            assert (y.double() - expected).norm() <= TOLERANCE[torch.bfloat16] * expected.norm()


@needs_cpu
@every_set
def test_what_is_pruned_is_not_multiplied(isa):
    weight, _ = problem(37, 100, torch.bfloat16)
    operands = panels_24.reference(SemiStructured.pack(weight))
    x = torch.ones(3, 100).bfloat16()
    x[0, 5], x[2, 99] = float("nan"), float("inf")
    y = torch.zeros(3, 37).bfloat16()
    linear_24.multiply(x, operands, None, y, 100, isa)
    assert torch.equal(y[0].isnan(), weight[:, 5] != 0)
    assert torch.equal(y[2].isinf(), weight[:, 99] != 0)
    assert y[1].isfinite().all()


@needs_cpu
@every_set
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_addresses_change_no_bit(tokens, isa):
    weight, bias = problem(37, 100, torch.bfloat16)
    operands, x = panels_24.reference(SemiStructured.pack(weight)), torch.randn(tokens, 100).bfloat16()
    values = torch.empty(operands[0].numel() + 1).bfloat16()[1:].view(operands[0].shape).copy_(operands[0])
    moved_x = torch.empty(x.numel() + 1).bfloat16()[1:].view(x.shape).copy_(x)
    y, moved_y = (torch.full((tokens, 37), float("nan")).bfloat16() for _ in range(2))
    linear_24.multiply(x, operands, bias, y, 100, isa)
    linear_24.multiply(moved_x, (values, operands[1]), bias, moved_y, 100, isa)
    assert torch.equal(moved_y, y)


@needs_cpu
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_the_cpu_op_is_registered_as_torch_wants_it(tokens):
    weight, bias = problem(37, 100, torch.bfloat16)
    operands = panels_24.reference(SemiStructured.pack(weight))
    x = torch.randn(tokens, 100).bfloat16()
    op = torch.ops.sparsekern.linear_24_cpu.default
    torch.library.opcheck(op, (x, *operands, bias, 37, 100))
    torch.library.opcheck(op, (x[None], *operands, None, 37, 100))
    torch.library.opcheck(op, (x.requires_grad_(), *operands, bias.requires_grad_(), 37, 100))


@needs_cpu
def test_x_and_the_bias_have_the_gradients_of_the_dense_product():
    weight, bias = problem(37, 100, torch.bfloat16)
    operands = panels_24.reference(SemiStructured.pack(weight))
    x, g = torch.randn(5, 100).bfloat16().requires_grad_(), torch.randn(5, 37).bfloat16()
    bias = bias.requires_grad_()
    got = torch.autograd.grad(linear_24.run_cpu(x, operands, bias, 37, 100), (x, bias), g)
    torch.testing.assert_close(got, torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), (x, bias), g))


@needs_cpu
def test_what_does_not_fit_is_refused_in_words():
    weight, bias = problem(37, 100, torch.bfloat16)
    values, positions = panels_24.reference(SemiStructured.pack(weight))
    x = torch.zeros(3, 100).bfloat16()
    with pytest.raises(ValueError, match="x must end with in_features = 100, got shape \\[3, 99\\]"):
        linear_24.run_cpu(x[:, :99], (values, positions), bias, 37, 100)
    with pytest.raises(ValueError, match="positions must hold 3 panels of 32 words, got 64"):
        linear_24.run_cpu(x, (values, positions[:2]), bias, 37, 100)
    assert "must be bfloat16, got torch.float32" in linear_24.cpu_refuses(SemiStructured.pack(weight.float()))
