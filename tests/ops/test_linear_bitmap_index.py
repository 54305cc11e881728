"""linear_bitmap_index: the layout by hand, the way there and back, and the product against float64."""

import pytest
import torch
from torch.nn.functional import linear

from sparsekern.formats.bitmap import Bitmap
from sparsekern.ops import LINEAR_KERNELS, compiled, linear_bitmap_index
from sparsekern.ops.kernel import pick

(KERNEL,) = linear_bitmap_index.KERNELS
WHY_NOT = KERNEL.refuses(Bitmap.pack(torch.zeros(1, 1).bfloat16()))
needs_cpu = pytest.mark.skipif(WHY_NOT is not None, reason=f"cpu_index: {WHY_NOT}")
SHAPES = [(1, 1), (1, 300), (7, 37), (37, 7), (100, 257), (257, 100), (48, 1096), (33, 2048)]


def weight(out_features, in_features, density=0.1):
    torch.manual_seed(out_features * 1000 + in_features)
    kept = torch.rand(out_features, in_features) < density
    return (torch.randn(out_features, in_features) * kept).bfloat16()


def assert_right(y, x, dense, bias=None):
    """y must be within bfloat16's bound of the float64 product."""
    exact = linear(x.double(), dense.double(), None if bias is None else bias.double())
    assert (y.dtype, y.shape) == (x.dtype, exact.shape)
    assert not y.isnan().any()
    assert (y.double() - exact).norm() <= 1e-2 * exact.norm()


@needs_cpu
def test_the_layout_is_the_one_written_here():
    dense = torch.zeros(17, 300)
    dense[0, [1, 2, 3, 4, 5]] = torch.tensor([1.0, 2, 3, 4, 5])
    dense[5, 127], dense[1, 257], dense[16, 0] = 6, 7, 8
    operands = linear_bitmap_index.to_index(Bitmap.pack(dense.bfloat16()))
    steps, masks, places, values, step_offsets, value_offsets = operands
    # row 0 has five weights in the first window, a step takes four
    assert steps.tolist() == [[2, 0, 1], [1, 0, 0]]
    # weight 2 h + j of row n is bit 16 (n / 4) + 8 h + 2 (n % 4) + j
    bits = [1 << 0 | 1 << 1 | 1 << 8 | 1 << 9 | 1 << 18, 1 << 0, 1 << 2, 1 << 0]
    assert masks.tolist() == bits
    assert places.tolist() == [1, 2, 3, 4, 127, 5, 1, 0] + [0] * 64
    # those with h = 0 of all rows come first
    assert values.tolist() == [1, 2, 6, 3, 4, 5, 7, 8] + [0] * 64
    assert step_offsets.tolist() == [0, 3, 4]
    assert value_offsets.tolist() == [0, 7, 8]


@needs_cpu
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0)], ids=str)
def test_restore_gives_back_the_same_bits(shape, density):
    packed = Bitmap.pack(weight(*shape, density))
    operands = KERNEL.prepare(packed)
    restored = KERNEL.restore(operands, *shape)
    restored.validate()
    for name in ("values", "bitmap", "row_offsets"):
        assert torch.equal(getattr(restored, name), getattr(packed, name)), name
    assert torch.equal(KERNEL.dense(operands, *shape), packed.to_dense())


@needs_cpu
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_float64(shape, density):
    dense = weight(*shape, density)
    operands = linear_bitmap_index.to_index(Bitmap.pack(dense))
    for tokens in (0, 1, 2, 3, 17, 64, 65, 130, 1000):
        x, bias = torch.randn(tokens, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
        for b in (None, bias):
            assert_right(linear_bitmap_index.run(x, operands, b, *shape), x, dense, b)


@needs_cpu
@pytest.mark.parametrize("leading", [(), (2, 3), (2, 1, 4, 3)], ids=str)
def test_any_leading_dimensions_and_strides_are_served(leading):
    dense, bias = weight(37, 300), torch.randn(74).bfloat16()[::2]
    x = torch.randn(*leading, 600).bfloat16()[..., ::2]
    y = linear_bitmap_index.run(x, linear_bitmap_index.to_index(Bitmap.pack(dense)), bias, 37, 300)
    assert_right(y, x, dense, bias)


@needs_cpu
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_layers_without_inputs_or_outputs_are_served(shape):
    operands = linear_bitmap_index.to_index(Bitmap.pack(torch.zeros(shape).bfloat16()))
    for tokens in (0, 1, 3, 100):
        x, bias = torch.randn(tokens, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
        y = linear_bitmap_index.run(x, operands, bias, *shape)
        assert torch.equal(y, linear(x, torch.zeros(shape).bfloat16(), bias))


@needs_cpu
def test_a_token_that_is_not_finite_is_nan_in_every_output_and_alone():
    dense = weight(37, 300)
    operands = linear_bitmap_index.to_index(Bitmap.pack(dense))
    x = torch.randn(70, 300).bfloat16()
    lost = torch.tensor([0, 2, 69])
    x[0, 3], x[2, 299], x[69, 0] = float("nan"), float("inf"), -float("inf")
    y = linear_bitmap_index.run(x, operands, None, 37, 300)
    assert y[lost].isnan().all()
    assert linear_bitmap_index.run(x[:1], operands, None, 37, 300).isnan().all()
    rest = torch.tensor([token for token in range(70) if token not in lost])
    assert_right(y[rest], x[rest], dense)


@needs_cpu
@pytest.mark.parametrize("what", range(3), ids=["steps", "masks", "places"])
def test_operands_that_lie_are_refused_on_the_way_back_and_make_no_kernel_leave_them(what):
    """That nothing else is read is seen under the address sanitizer, in tests/sanitized/."""
    operands = list(linear_bitmap_index.to_index(Bitmap.pack(weight(37, 600))))
    operands[what] = torch.full_like(operands[what], 255 if what == 2 else -1)
    with pytest.raises(ValueError, match="panel 0 must keep as many weights as its offsets say"):
        linear_bitmap_index.from_index(tuple(operands), 37, 600)
    x = torch.randn(3, 600).bfloat16()
    for tokens in (1, 3):
        assert not linear_bitmap_index.run(x[:tokens], tuple(operands), None, 37, 600).isnan().any()


@needs_cpu
def test_arguments_that_do_not_fit_are_refused_in_words():
    operands = linear_bitmap_index.to_index(Bitmap.pack(weight(37, 300)))
    x, bias, run = torch.randn(3, 300).bfloat16(), torch.randn(37).bfloat16(), linear_bitmap_index.run
    with pytest.raises(ValueError, match=r"x must end with in_features = 300, got shape \[3, 299\]"):
        run(x[:, 1:], operands, bias, 37, 300)
    with pytest.raises(ValueError, match="x must have the weight's dtype torch.bfloat16, got torch.float32"):
        run(x.float(), operands, bias, 37, 300)
    with pytest.raises(ValueError, match="bias must hold 37 elements, got 36"):
        run(x, operands, bias[1:], 37, 300)
    with pytest.raises(ValueError, match=r"steps must hold 3 \* 5 elements, got 9"):
        run(torch.randn(3, 600).bfloat16(), operands, bias, 37, 600)
    falling = operands[5].clone()
    falling[1] = falling[2] + 1
    with pytest.raises(ValueError, match="value_offsets must not fall, panel 1 does"):
        run(x, (*operands[:5], falling), bias, 37, 300)
    packed = Bitmap.pack(weight(37, 300))
    packed.bitmap[3, 1] ^= 4
    with pytest.raises(ValueError, match="bitmap keeps .* weights in row 3, row_offsets say"):
        linear_bitmap_index.to_index(packed)


def test_a_weight_that_it_cannot_serve_or_never_wins_with_is_refused_in_words(monkeypatch):
    refuses = KERNEL.refuses
    assert "must be bfloat16, got torch.float32" in refuses(Bitmap.pack(torch.ones(2, 2)))
    if WHY_NOT is None:
        assert "at most 20% of the weights may be kept, got 50%" in refuses(Bitmap.pack(torch.eye(2).bfloat16()))
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no compiler")
    assert refuses(Bitmap.pack(torch.zeros(2, 2).bfloat16())) == "not built: no compiler"


@needs_cpu
def test_it_is_one_of_the_kernels_of_a_bitmap_and_not_the_first():
    names = [kernel.name for kernel in LINEAR_KERNELS[Bitmap]]
    assert "cpu_index" in names
    assert names[-1] == "reference"
    assert pick(LINEAR_KERNELS[Bitmap], Bitmap.pack(weight(37, 300))).name == "cpu"


@needs_cpu
def test_the_op_is_registered_as_torch_wants_it():
    dense = weight(37, 300)
    operands = linear_bitmap_index.to_index(Bitmap.pack(dense))
    x, bias = torch.randn(3, 300).bfloat16(), torch.randn(37).bfloat16()
    op = torch.ops.sparsekern.linear_bitmap_index_cpu.default
    torch.library.opcheck(op, (x, *operands, bias, 37, 300))
    torch.library.opcheck(op, (x.requires_grad_(), *operands, bias.requires_grad_(), 37, 300))
    torch.library.opcheck(torch.ops.sparsekern.linear_bitmap_index_cpu_weight.default, (*operands, 37, 300))
    g = torch.randn(3, 37).bfloat16()
    op(x, *operands, None, 37, 300).backward(g)
    torch.testing.assert_close(x.grad, g @ dense)


def test_the_reference_is_the_product():
    dense, x = weight(37, 100), torch.randn(5, 100).bfloat16()
    assert_right(linear_bitmap_index.reference(x, Bitmap.pack(dense), None), x, dense)
