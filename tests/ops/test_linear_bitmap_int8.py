"""linear_bitmap_int8: the reference against float64, then every kernel and instruction set against the same product."""

import pytest
import torch
from torch.nn.functional import linear

from sparsekern.formats.bitmap_int8 import BitmapInt8
from sparsekern.ops import compiled, linear_bitmap_int8
from sparsekern.ops.kernel import pick

WHY_NOT = compiled.why_not("cpu")
needs_cpu = pytest.mark.skipif(WHY_NOT is not None, reason=f"sparsekern._cpu: {WHY_NOT}")
SETS = compiled.cpu().linear_bitmap_int8_sets() if WHY_NOT is None else ()
KERNELS = {kernel.name: kernel for kernel in linear_bitmap_int8.KERNELS}
# relative errors of the whole output against float64
BOUND = {torch.bfloat16: 4e-3, torch.float32: 2e-6}
# of an input, as a fraction of the token's largest
STEP = {torch.bfloat16: 2.0**-15, torch.float32: 2.0**-23}
SHAPES = [(1, 1), (1, 100), (7, 37), (37, 7), (100, 257), (257, 100), (48, 1096)]

dtypes = pytest.mark.parametrize("dtype", list(BOUND), ids=str)
every_set = pytest.mark.parametrize("isa", SETS)


def weight(out_features, in_features, density=0.5, dtype=torch.float32, group_size=None):
    torch.manual_seed(out_features * 1000 + in_features)
    kept = torch.rand(out_features, in_features) < density
    return BitmapInt8.pack((torch.randn(out_features, in_features) * kept).to(dtype), group_size)


def exact(x, packed, bias=None):
    return linear(x.double(), packed.dequantised().double(), None if bias is None else bias.double())


def assert_right(y, x, packed, bias=None):
    """y must be within the dtype's bound of the float64 product."""
    wanted = exact(x, packed, bias)
    assert y.dtype == x.dtype
    assert y.shape == wanted.shape
    assert not y.isnan().any()
    assert (y.double() - wanted).norm() <= BOUND[x.dtype] * wanted.norm()


@dtypes
@pytest.mark.parametrize("group_size", [None, 8])
def test_the_reference_is_the_product_with_the_dequantised_weight(dtype, group_size):
    packed = weight(37, 100, dtype=dtype, group_size=group_size)
    x, bias = torch.randn(5, 100).to(dtype), torch.randn(37).to(dtype)
    assert_right(linear_bitmap_int8.reference(x, packed, bias), x, packed, bias)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("group_size", [None, 64, 128, 192])
def test_restore_gives_back_the_same_bits(kernel, density, shape, group_size):
    packed = weight(*shape, density, group_size=group_size)
    restored = kernel.restore(kernel.prepare(packed), *shape)
    restored.validate()
    for name in ("values", "scales", "bitmap", "row_offsets"):
        assert torch.equal(getattr(restored, name), getattr(packed, name)), name
    assert [restored.in_features, restored.group_size, restored.dtype] == [shape[1], group_size, torch.float32]


@needs_cpu
@every_set
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_converts_to_the_same_panels_and_back(shape, density, isa):
    packed = weight(*shape, density)
    # an integer that is zero and kept all the same, which only a file may have
    packed.values[len(packed.values) // 2 :][:1] = 0
    panels, wanted = linear_bitmap_int8.to_panels(packed, isa), linear_bitmap_int8.to_panels(packed, "portable")
    for got, want in zip(panels, wanted, strict=True):
        assert torch.equal(got, want)
    restored = linear_bitmap_int8.from_panels(panels, *shape, isa)
    for name in ("values", "scales", "bitmap", "row_offsets"):
        assert torch.equal(getattr(restored, name), getattr(packed, name)), name


@needs_cpu
def test_the_panels_are_the_ones_written_here():
    dense = torch.zeros(17, 70)
    dense[0, 0], dense[0, 5], dense[1, 2], dense[15, 69], dense[16, 3] = 127, 1, -3, 5, 7
    dense[[1, 15, 16], [69, 0, 69]] = 127
    masks, values, panel_offsets, scales, kind = linear_bitmap_int8.to_panels(BitmapInt8.pack(dense))
    assert list(masks.shape) == [2, 2, 16]
    # a mask has bit 4n + j for row n, input 4q + j: those of inputs 0 to 3, 4 to 7, 68 to 71, then of row 16
    bits = {(0, 0, 0): 1 << 0 | 1 << 6 | 1 << 60, (0, 0, 1): 1 << 1, (0, 1, 1): 1 << 5 | 1 << 61}
    bits |= {(1, 0, 0): 1 << 3, (1, 1, 1): 1 << 1}
    assert {tuple(at.tolist()): int(masks[tuple(at)]) for at in masks.nonzero()} == bits
    assert values.tolist() == [127, -3, 127, 1, 127, 5, 7, 127] + [0] * linear_bitmap_int8.TAIL_BYTES
    assert panel_offsets.tolist() == [0, 6, 8]
    scales = scales.view(torch.float32)
    assert list(scales.shape) == [2, 1, 16]
    # the row of no weights has no scale, and there is no row 17
    assert scales[0, 0, [0, 1, 2, 15]].tolist() == [1, 1, 0, 1]
    assert scales[1, 0].tolist() == [1] + [0] * 15
    assert (list(kind.shape), kind.dtype) == ([0, 0], torch.float32)


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("group_size", [None, 64, 192])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_gives_the_product(shape, group_size, isa, dtype):
    packed = weight(*shape, dtype=dtype, group_size=group_size)
    operands = linear_bitmap_int8.to_panels(packed)
    for tokens in (1, 2, 3, 5, 8, 9, 17, 65, 130):
        x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        for b in (None, bias):
            y = torch.full((tokens, shape[0]), float("nan"), dtype=dtype)
            linear_bitmap_int8.sparse(x, operands, b, y, shape[1], isa)
            assert_right(y, x, packed, b)


@needs_cpu
@dtypes
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("outliers", [0, 1, 3])
def test_every_instruction_set_gives_the_same_bits(tokens, outliers, dtype):
    """The sums are exact, so that nothing depends on their order; outliers are rounded more finely."""
    packed = weight(100, 700, dtype=dtype, group_size=128)
    operands, x = linear_bitmap_int8.to_panels(packed), torch.randn(tokens, 700).to(dtype)
    x[:outliers, 5] = 3000.0
    results = []
    for isa in SETS:
        results.append(torch.full((tokens, 100), float("nan"), dtype=dtype))
        linear_bitmap_int8.sparse(x, operands, None, results[-1], 700, isa)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_cpu
@every_set
def test_a_token_does_not_change_with_those_beside_it(isa):
    operands = linear_bitmap_int8.to_panels(weight(50, 300, dtype=torch.bfloat16))
    x = torch.randn(20, 300).bfloat16()
    x[3, 7] = 2000.0
    together = torch.empty(20, 50).bfloat16()
    linear_bitmap_int8.sparse(x, operands, None, together, 300, isa)
    for token in range(20):
        alone = torch.empty(1, 50).bfloat16()
        linear_bitmap_int8.sparse(x[token : token + 1], operands, None, alone, 300, isa)
        assert torch.equal(alone[0], together[token])


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("outlier", [1.0, 40.0, 1e3, 1e6])
def test_an_input_is_rounded_by_no_more_than_is_said(outlier, isa, dtype):
    """Weights that see nothing of the outlier: what is wrong is the rounding of their own inputs."""
    dense = torch.randn(33, 500)
    dense[:, 11] = 0
    packed = BitmapInt8.pack(dense.to(dtype))
    x = torch.randn(4, 500).to(dtype)
    x[:, 11] = outlier
    y = torch.empty(4, 33, dtype=dtype)
    linear_bitmap_int8.sparse(x, linear_bitmap_int8.to_panels(packed), None, y, 500, isa)
    wanted, w = exact(x, packed), packed.dequantised().double()
    most = x.double().abs().amax(dim=1, keepdim=True)
    if dtype == torch.bfloat16:
        # two bytes while the largest is at most 64 times the mean, three after that
        fine = most > 64 * x.double().abs().mean(dim=1, keepdim=True)
        step = torch.where(fine, 2.0**-23, 2.0**-15)
    else:
        step = torch.full_like(most, 2.0**-23)
    epsilon = torch.finfo(dtype).eps
    allowed = step * most * w.abs().sum(dim=1) + epsilon * wanted.abs()
    assert ((y.double() - wanted).abs() <= allowed).all()


@needs_cpu
@every_set
@dtypes
def test_inputs_of_any_size_are_scaled(isa, dtype):
    packed = weight(20, 90, dtype=dtype)
    operands = linear_bitmap_int8.to_panels(packed)
    for factor in (1e-30, 1e-10, 1e10, 1e30):
        x = (torch.randn(3, 90) * factor).to(dtype)
        y = torch.empty(3, 20, dtype=dtype)
        linear_bitmap_int8.sparse(x, operands, None, y, 90, isa)
        assert_right(y, x, packed)
    x = torch.zeros(3, 90, dtype=dtype)
    linear_bitmap_int8.sparse(x, operands, None, y, 90, isa)
    assert torch.equal(y, torch.zeros(3, 20, dtype=dtype))


@needs_cpu
@every_set
@dtypes
def test_sums_beyond_65536_inputs_do_not_overflow(isa, dtype):
    """All inputs, integers and bytes as large as they get: 2^15 or 2^23 by 127 by 140000 inputs."""
    dense = torch.full((3, 140_001), 1.0)
    dense[1] = -1.0
    packed = BitmapInt8.pack(dense.to(dtype))
    x = torch.full((1, 140_001), -1.0, dtype=dtype)
    x[0, ::2] = -0.99609375
    y = torch.empty(1, 3, dtype=dtype)
    linear_bitmap_int8.sparse(x, linear_bitmap_int8.to_panels(packed), None, y, 140_001, isa)
    assert_right(y, x, packed)


@needs_cpu
@every_set
@dtypes
def test_expansion_gives_the_dense_bits(isa, dtype):
    for group_size in (None, 64):
        packed = weight(100, 257, dtype=dtype, group_size=group_size)
        operands = linear_bitmap_int8.to_panels(packed)
        for panels in (range(0, 7), range(2, 5), range(6, 7), range(3, 3)):
            rows = packed.to_dense()[panels.start * 16 : panels.stop * 16]
            out = torch.full(rows.shape, float("nan"), dtype=dtype)
            linear_bitmap_int8.expand(operands, out, panels, 100, isa)
            assert torch.equal(out, rows)


@needs_cpu
@every_set
@dtypes
def test_a_token_that_is_not_finite_is_nan_in_every_output_and_alone(isa, dtype):
    packed = weight(37, 70, dtype=dtype)
    operands = linear_bitmap_int8.to_panels(packed)
    x = torch.randn(12, 70).to(dtype)
    x[1, 3], x[2, 69], x[9, 0] = float("nan"), float("inf"), -float("inf")
    y = torch.zeros(12, 37, dtype=dtype)
    linear_bitmap_int8.sparse(x, operands, None, y, 70, isa)
    lost = torch.tensor([1, 2, 9])
    assert y[lost].isnan().all()
    rest = torch.tensor([token for token in range(12) if token not in lost])
    assert_right(y[rest], x[rest], packed)


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_masks_that_lie_make_no_kernel_leave_the_values(tokens, isa, dtype):
    """The result is wrong; what prepared the operands would have refused them. That nothing else is read is seen under
    the address sanitizer, in tests/sanitized/."""
    masks, *others = linear_bitmap_int8.to_panels(weight(37, 300, dtype=dtype))
    lying, x = (torch.full_like(masks, -1), *others), torch.randn(tokens, 300).to(dtype)
    y = torch.full((tokens, 37), float("nan"), dtype=dtype)
    linear_bitmap_int8.sparse(x, lying, None, y, 300, isa)
    linear_bitmap_int8.expand(lying, torch.empty(37, 300, dtype=dtype), range(0, 3), 37, isa)
    assert not y.isnan().any()
    with pytest.raises(ValueError, match="masks of panel 0 must keep as many weights as panel_offsets say"):
        linear_bitmap_int8.from_panels(lying, 37, 300, isa)


@needs_cpu
def test_every_kernel_prepares_only_what_is_consistent():
    packed = weight(7, 37)
    packed.bitmap[3, 1] ^= 4
    for kernel in KERNELS.values():
        with pytest.raises(ValueError, match="bitmap keeps .* weights in row 3, row_offsets say"):
            kernel.prepare(packed)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (1000,), (), (2, 3), (2, 1, 4, 3)])
@dtypes
def test_every_kernel_serves_any_leading_dimensions(kernel, shape, dtype):
    packed = weight(100, 257, dtype=dtype)
    if reason := kernel.refuses(packed):
        pytest.skip(reason)
    x, bias = torch.randn(*shape, 257).to(dtype), torch.randn(100).to(dtype)
    for b in (None, bias):
        assert_right(kernel.run(x, kernel.prepare(packed), b, 100, 257), x, packed, b)


@needs_cpu
@dtypes
def test_x_and_bias_may_have_any_strides(dtype):
    packed, bias = weight(37, 70, dtype=dtype), torch.randn(74).to(dtype)[::2]
    for x in (
        torch.randn(70, 6).to(dtype).T,
        torch.randn(1, 70).to(dtype).expand(9, 70),
        torch.randn(4, 70, 5).to(dtype).transpose(1, 2),
        torch.randn(211).to(dtype)[1:].view(3, 70),
    ):
        assert_right(KERNELS["cpu"].run(x, KERNELS["cpu"].prepare(packed), bias, 37, 70), x, packed, bias)


@needs_cpu
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_layers_without_inputs_or_outputs_are_served(shape):
    out_features, in_features = shape
    operands = KERNELS["cpu"].prepare(BitmapInt8.pack(torch.zeros(shape)))
    for tokens in (0, 1, 3, 100):
        x, bias = torch.randn(tokens, in_features), torch.randn(out_features)
        y = KERNELS["cpu"].run(x, operands, bias, out_features, in_features)
        assert torch.equal(y, linear(x, torch.zeros(shape), bias))


@needs_cpu
def test_arguments_that_do_not_fit_are_refused_in_words():
    operands, x, bias = linear_bitmap_int8.to_panels(weight(37, 70)), torch.randn(3, 70), torch.randn(37)
    run = KERNELS["cpu"].run
    with pytest.raises(ValueError, match=r"x must end with in_features = 70, got shape \[3, 69\]"):
        run(x[:, 1:], operands, bias, 37, 70)
    with pytest.raises(ValueError, match="x must have the weight's dtype torch.float32, got torch.bfloat16"):
        run(x.bfloat16(), operands, bias, 37, 70)
    with pytest.raises(ValueError, match="bias must hold 37 elements, got 36"):
        run(x, operands, bias[1:], 37, 70)
    with pytest.raises(ValueError, match=r"masks must hold 3 \* 48 elements, got 96"):
        run(torch.randn(3, 129), operands, bias, 37, 129)
    falling = operands[2].clone()
    falling[1] = falling[2] + 1
    with pytest.raises(ValueError, match="panel_offsets must not fall, panel 1 does"):
        run(x, (*operands[:2], falling, *operands[3:]), bias, 37, 70)
    with pytest.raises(ValueError, match="does not have the instruction set amx"):
        linear_bitmap_int8.sparse(x, operands, bias, torch.zeros(3, 37), 70, "amx")


def test_a_weight_that_no_compiled_kernel_serves_is_refused_in_words(monkeypatch):
    refuses = KERNELS["cpu"].refuses
    assert "must be bfloat16 or float32, got torch.float16" in refuses(BitmapInt8.pack(torch.ones(2, 2).half()))
    assert "must be on the CPU, got meta" in refuses(BitmapInt8.pack(torch.ones(2, 2)).to("meta", torch.float32))
    assert "group_size must be a multiple of 64, got 32" in refuses(weight(3, 100, group_size=32))
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no compiler")
    packed = weight(2, 2)
    assert refuses(packed) == "not built: no compiler"
    assert pick(linear_bitmap_int8.KERNELS, packed).name == "reference"


@needs_cpu
@dtypes
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_op_is_registered_as_torch_wants_it(tokens, dtype):
    operands = linear_bitmap_int8.to_panels(weight(37, 70, dtype=dtype))
    x, bias = torch.randn(tokens, 70).to(dtype), torch.randn(37).to(dtype)
    op = torch.ops.sparsekern.linear_bitmap_int8_cpu.default
    torch.library.opcheck(op, (x, *operands, bias, 37, 70))
    torch.library.opcheck(op, (x.requires_grad_(), *operands, bias.requires_grad_(), 37, 70))
    torch.library.opcheck(torch.ops.sparsekern.linear_bitmap_int8_cpu_weight.default, (*operands, 37, 70))


@needs_cpu
def test_the_gradient_of_x_is_that_of_the_dense_weight():
    packed = weight(37, 70)
    x, g = torch.randn(5, 70, requires_grad=True), torch.randn(5, 37)
    KERNELS["cpu"].run(x, KERNELS["cpu"].prepare(packed), None, 37, 70).backward(g)
    torch.testing.assert_close(x.grad, g @ packed.to_dense())
