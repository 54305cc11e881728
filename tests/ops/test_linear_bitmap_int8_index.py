"""linear_bitmap_int8_index: the layout by hand, the way back, and the same bits as the bitmap's kernel gives."""

import pytest
import torch

from sparsekern.formats.bitmap_int8 import BitmapInt8
from sparsekern.ops import LINEAR_KERNELS, compiled, linear_bitmap_int8, linear_bitmap_int8_index
from sparsekern.ops.kernel import pick

(KERNEL,) = linear_bitmap_int8_index.KERNELS
WHY_NOT = compiled.why_not("cpu")
if WHY_NOT is None and not compiled.cpu().has_linear_bitmap_int8_index():
    WHY_NOT = "the processor does not have the instructions"
needs_cpu = pytest.mark.skipif(WHY_NOT is not None, reason=f"sparsekern._cpu: {WHY_NOT}")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
SHAPES = [(1, 1), (1, 300), (7, 37), (37, 7), (16, 128), (100, 1025), (257, 100)]


def weight(out_features, in_features, density=0.1, dtype=torch.float32, group_size=None):
    torch.manual_seed(out_features * 1000 + in_features)
    kept = torch.rand(out_features, in_features) < density
    return BitmapInt8.pack((torch.randn(out_features, in_features) * kept).to(dtype), group_size)


def by_bitmap(x, packed, bias=None):
    """The product of the kernel that is compared with float64 in test_linear_bitmap_int8.py."""
    return linear_bitmap_int8.run_cpu(x, linear_bitmap_int8.to_panels(packed), bias, *packed.shape)


@needs_cpu
def test_the_layout_is_the_one_written_here():
    dense = torch.zeros(17, 300)
    dense[0, [1, 2, 3, 4, 5]] = torch.tensor([127.0, 2, 3, 4, -5])
    dense[5, 127], dense[1, 257], dense[16, 0] = 1, 1, 1
    operands = linear_bitmap_int8_index.to_index(BitmapInt8.pack(dense))
    steps, masks, places, values, step_offsets, value_offsets, scales, kind = operands
    # row 0 has five weights in the first window, a step takes four
    assert steps.tolist() == [[2, 0, 1], [1, 0, 0]]
    # weight k of row n is bit 4 n + k
    assert masks.tolist() == [0b1111 | 1 << 20, 1 << 0, 1 << 4, 1 << 0]
    assert places.tolist() == [1, 2, 3, 4, 127, 5, 1, 0] + [0] * 64
    assert values.tolist() == [127, 2, 3, 4, 1, -5, 1, 1] + [0] * 64
    assert step_offsets.tolist() == [0, 3, 4]
    assert value_offsets.tolist() == [0, 7, 8]
    assert scales.view(torch.float32)[:, 0, [0, 1, 2, 5]].tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]
    assert (list(kind.shape), kind.dtype) == ([0, 0], torch.float32)


@needs_cpu
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("group_size", [None, 128, 384])
def test_restore_gives_back_the_same_bits(shape, density, group_size):
    packed = weight(*shape, density, group_size=group_size)
    operands = KERNEL.prepare(packed)
    restored = KERNEL.restore(operands, *shape)
    restored.validate()
    for name in ("values", "scales", "bitmap", "row_offsets"):
        assert torch.equal(getattr(restored, name), getattr(packed, name)), name
    assert [restored.in_features, restored.group_size, restored.dtype] == [shape[1], group_size, torch.float32]
    assert torch.equal(KERNEL.dense(operands, *shape), packed.to_dense())


@needs_cpu
@dtypes
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_are_those_of_the_bitmaps_kernel(shape, group_size, density, dtype):
    """1 to 3 tokens are at most four rows of bytes; 65 and more are cut into several passes."""
    packed = weight(*shape, density, dtype, group_size)
    operands = linear_bitmap_int8_index.to_index(packed)
    for tokens in (0, 1, 2, 3, 5, 8, 17, 65, 130):
        x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        x[:1, 0] = 3000.0
        for b in (None, bias):
            y = linear_bitmap_int8_index.run(x, operands, b, *shape)
            assert (y.dtype, y.shape) == (dtype, (tokens, shape[0]))
            assert torch.equal(y, by_bitmap(x, packed, b))


@needs_cpu
@dtypes
def test_a_thousand_tokens_are_right(dtype):
    packed = weight(37, 300, dtype=dtype)
    x = torch.randn(1000, 300).to(dtype)
    y = linear_bitmap_int8_index.run(x, linear_bitmap_int8_index.to_index(packed), None, 37, 300)
    exact = x.double() @ packed.dequantised().double().T
    assert (y.double() - exact).norm() <= (4e-3 if dtype == torch.bfloat16 else 2e-6) * exact.norm()


@needs_cpu
@dtypes
def test_a_token_that_is_not_finite_is_nan_in_every_output_and_alone(dtype):
    packed = weight(37, 300, dtype=dtype)
    operands = linear_bitmap_int8_index.to_index(packed)
    x = torch.randn(70, 300).to(dtype)
    lost = torch.tensor([0, 2, 69])
    x[0, 3], x[2, 299], x[69, 0] = float("nan"), float("inf"), -float("inf")
    y = linear_bitmap_int8_index.run(x, operands, None, 37, 300)
    assert y[lost].isnan().all()
    assert linear_bitmap_int8_index.run(x[:1], operands, None, 37, 300).isnan().all()
    rest = torch.tensor([token for token in range(70) if token not in lost])
    assert torch.equal(y[rest], by_bitmap(x[rest], packed))


@needs_cpu
@dtypes
def test_sums_beyond_65536_inputs_do_not_overflow(dtype):
    dense = torch.full((3, 140_001), 1.0)
    dense[1] = -1.0
    packed = BitmapInt8.pack(dense.to(dtype))
    x = torch.full((1, 140_001), -1.0, dtype=dtype)
    y = linear_bitmap_int8_index.run(x, linear_bitmap_int8_index.to_index(packed), None, 3, 140_001)
    assert torch.equal(y, by_bitmap(x, packed))


@needs_cpu
def test_the_number_of_threads_changes_no_bit():
    operands = linear_bitmap_int8_index.to_index(weight(700, 3000, dtype=torch.bfloat16))
    x, before, results = torch.randn(9, 3000).bfloat16(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            results += [linear_bitmap_int8_index.run(x[:t], operands, None, 700, 3000)[0] for t in (1, 9)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_cpu
@pytest.mark.parametrize("leading", [(), (2, 3), (2, 1, 4, 3)], ids=str)
def test_any_leading_dimensions_and_strides_are_served(leading):
    packed, bias = weight(37, 300), torch.randn(74)[::2]
    x = torch.randn(*leading, 600)[..., ::2]
    y = linear_bitmap_int8_index.run(x, linear_bitmap_int8_index.to_index(packed), bias, 37, 300)
    assert torch.equal(y, by_bitmap(x, packed, bias))


@needs_cpu
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_layers_without_inputs_or_outputs_are_served(shape):
    operands = linear_bitmap_int8_index.to_index(BitmapInt8.pack(torch.zeros(shape)))
    for tokens in (0, 1, 3, 100):
        x, bias = torch.randn(tokens, shape[1]), torch.randn(shape[0])
        y = linear_bitmap_int8_index.run(x, operands, bias, *shape)
        assert torch.equal(y, bias.expand(tokens, -1))


@needs_cpu
@pytest.mark.parametrize("what", range(3), ids=["steps", "masks", "places"])
def test_operands_that_lie_are_refused_on_the_way_back_and_make_no_kernel_leave_them(what):
    """That nothing else is read is seen under the address sanitizer, in tests/sanitized/."""
    operands = list(linear_bitmap_int8_index.to_index(weight(37, 600)))
    operands[what] = torch.full_like(operands[what], 255 if what == 2 else -1)
    with pytest.raises(ValueError, match="panel 0 must keep as many weights as its offsets say"):
        linear_bitmap_int8_index.from_index(tuple(operands), 37, 600)
    x = torch.randn(9, 600)
    for tokens in (1, 9):
        assert not linear_bitmap_int8_index.run(x[:tokens], tuple(operands), None, 37, 600).isnan().any()


@needs_cpu
def test_arguments_that_do_not_fit_are_refused_in_words():
    operands = linear_bitmap_int8_index.to_index(weight(37, 300))
    x, bias, run = torch.randn(3, 300), torch.randn(37), linear_bitmap_int8_index.run
    with pytest.raises(ValueError, match=r"x must end with in_features = 300, got shape \[3, 299\]"):
        run(x[:, 1:], operands, bias, 37, 300)
    with pytest.raises(ValueError, match="x must have the weight's dtype torch.float32, got torch.bfloat16"):
        run(x.bfloat16(), operands, bias, 37, 300)
    with pytest.raises(ValueError, match="bias must hold 37 elements, got 36"):
        run(x, operands, bias[1:], 37, 300)
    with pytest.raises(ValueError, match=r"steps must hold 3 \* 5 elements, got 9"):
        run(torch.randn(3, 600), operands, bias, 37, 600)
    with pytest.raises(ValueError, match=r"scales must hold 48 \* 1 elements, got 32"):
        run(x, (*operands[:6], operands[6][1:], operands[7]), bias, 37, 300)
    with pytest.raises(ValueError, match="group_size must be a multiple of 128, got 64"):
        run(x, (*operands[:7], torch.empty(0, 64)), bias, 37, 300)
    with pytest.raises(ValueError, match="values must have elements of 1 bytes, got 2"):
        run(x, (*operands[:3], operands[3].bfloat16(), *operands[4:]), bias, 37, 300)
    packed = weight(37, 300)
    packed.bitmap[3, 1] ^= 4
    with pytest.raises(ValueError, match="bitmap keeps .* weights in row 3, row_offsets say"):
        linear_bitmap_int8_index.to_index(packed)


def test_a_weight_that_it_cannot_serve_or_never_wins_with_is_refused_in_words(monkeypatch):
    refuses = KERNEL.refuses
    assert "must be bfloat16 or float32, got torch.float16" in refuses(BitmapInt8.pack(torch.ones(2, 2).half()))
    if WHY_NOT is None:
        assert "at most 35% of the weights may be kept, got 50%" in refuses(BitmapInt8.pack(torch.eye(2)))
        assert "group_size must be a multiple of 128, got 64" in refuses(weight(3, 100, group_size=64))
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no compiler")
    assert refuses(weight(2, 2)) == "not built: no compiler"


@needs_cpu
def test_it_is_one_of_the_kernels_of_an_int8_bitmap_and_not_the_first():
    names = [kernel.name for kernel in LINEAR_KERNELS[BitmapInt8]]
    assert names == ["cpu", "cpu_index", "reference"]
    assert pick(LINEAR_KERNELS[BitmapInt8], weight(37, 300)).name == "cpu"


@needs_cpu
def test_the_op_is_registered_as_torch_wants_it():
    packed = weight(37, 300)
    operands = linear_bitmap_int8_index.to_index(packed)
    x, bias = torch.randn(3, 300), torch.randn(37)
    op = torch.ops.sparsekern.linear_bitmap_int8_index_cpu.default
    torch.library.opcheck(op, (x, *operands, bias, 37, 300))
    torch.library.opcheck(op, (x.requires_grad_(), *operands, bias.requires_grad_(), 37, 300))
    torch.library.opcheck(torch.ops.sparsekern.linear_bitmap_int8_index_cpu_weight.default, (*operands, 37, 300))
    g = torch.randn(3, 37)
    op(x, *operands, bias, 37, 300).backward(g)
    torch.testing.assert_close(x.grad, g @ packed.to_dense())
    torch.testing.assert_close(bias.grad, g.sum(0))


def test_the_reference_is_the_product():
    packed, x = weight(37, 100), torch.randn(5, 100)
    y = linear_bitmap_int8_index.reference(x, packed, None)
    torch.testing.assert_close(y, x @ packed.dequantised().T)
