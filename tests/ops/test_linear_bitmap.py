"""linear_bitmap: the reference against float64, then every kernel and instruction set against both."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from sparsekern.formats.bitmap import Bitmap
from sparsekern.ops import compiled, linear_bitmap
from sparsekern.ops.kernel import pick

WHY_NOT = compiled.why_not("cpu")
needs_cpu = pytest.mark.skipif(WHY_NOT is not None, reason=f"sparsekern._cpu: {WHY_NOT}")
SETS = compiled.cpu().instruction_sets() if WHY_NOT is None else ()
KERNELS = {kernel.name: kernel for kernel in linear_bitmap.KERNELS}
WAYS = {"sparse": linear_bitmap.sparse, "through_dense": linear_bitmap.through_dense}
# relative errors of the whole output against float64
BOUND = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}

dtypes = pytest.mark.parametrize("dtype", BOUND, ids=str)
every_set = pytest.mark.parametrize("isa", SETS)


def weight(out_features, in_features, density=0.5, dtype=torch.float32):
    torch.manual_seed(out_features * 1000 + in_features)
    kept = torch.rand(out_features, in_features) < density
    return (torch.randn(out_features, in_features) * kept).to(dtype)


def problem(out_features, in_features, tokens, dtype, density=0.5):
    """A weight, its operands, an input and a bias."""
    dense = weight(out_features, in_features, density, dtype)
    operands = linear_bitmap.to_panels(Bitmap.pack(dense))
    return dense, operands, torch.randn(tokens, in_features).to(dtype), torch.randn(out_features).to(dtype)


def assert_right(y, x, dense, bias=None):
    """y must be within the dtype's bound of the float64 product."""
    exact = linear(x.double(), dense.double(), None if bias is None else bias.double())
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert not y.isnan().any()
    assert (y.double() - exact).norm() <= BOUND[x.dtype] * exact.norm()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (100, 257)], ids=str)
def test_the_reference_is_the_product(shape, dtype):
    dense = weight(*shape, dtype=dtype)
    x, bias = torch.randn(5, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    assert_right(linear_bitmap.reference(x, Bitmap.pack(dense), bias), x, dense, bias)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (100, 257), (257, 32), (0, 5), (5, 0)], ids=str)
@dtypes
def test_restore_gives_back_the_same_bits(kernel, density, shape, dtype):
    if kernel.name in ("cuda", "cuda_expanded") and dtype == torch.float32:
        pytest.skip("these kernels take weights of 2 bytes")
    packed = Bitmap.pack(weight(*shape, density=density, dtype=dtype))
    restored = kernel.restore(kernel.prepare(packed), *shape)
    restored.validate()
    assert restored.values.dtype == dtype
    for name in ("values", "bitmap", "row_offsets"):
        assert torch.equal(getattr(restored, name), getattr(packed, name)), name
    assert restored.in_features == packed.in_features


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (7, 37), (37, 7), (100, 257), (257, 100), (48, 1096)], ids=str)
def test_every_instruction_set_gives_the_product(way, shape, isa, dtype):
    for tokens in (1, 2, 3, 5, 7, 8, 11, 16, 17, 33, 64, 65, 130):
        dense, operands, x, bias = problem(*shape, tokens, dtype)
        for b in (None, bias):
            y = torch.full((tokens, shape[0]), float("nan"), dtype=dtype)
            way(x, operands, b, y, shape[1], isa)
            assert_right(y, x, dense, b)


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_empty_and_full_weights_are_multiplied(density, isa, dtype):
    for tokens in (1, 3, 16, 33):
        dense, operands, x, bias = problem(37, 100, tokens, dtype, density)
        y = torch.full((tokens, 37), float("nan"), dtype=dtype)
        linear_bitmap.sparse(x, operands, bias, y, 100, isa)
        assert_right(y, x, dense, bias)


@needs_cpu
@every_set
@dtypes
def test_rows_and_panels_without_weights_give_the_bias(isa, dtype):
    dense = weight(70, 90, dtype=dtype)
    dense[3] = 0
    dense[16:48] = 0
    bias, x = torch.randn(70).to(dtype), torch.randn(4, 90).to(dtype)
    y = torch.full((4, 70), float("nan"), dtype=dtype)
    linear_bitmap.sparse(x, linear_bitmap.to_panels(Bitmap.pack(dense)), bias, y, 90, isa)
    assert_right(y, x, dense, bias)
    assert torch.equal(y[:, 16:48], bias[16:48].expand(4, 32))


@needs_cpu
@every_set
@dtypes
def test_expansion_gives_the_dense_bits(isa, dtype):
    dense = weight(100, 257, dtype=dtype)
    operands = linear_bitmap.to_panels(Bitmap.pack(dense))
    for panels in (range(0, 7), range(2, 5), range(6, 7), range(3, 3)):
        rows = dense[panels.start * 16 : panels.stop * 16]
        out = torch.full(rows.shape, float("nan"), dtype=dtype)
        linear_bitmap.expand(operands, out, panels, 100, isa)
        assert torch.equal(out, rows)


@needs_cpu
@every_set
@dtypes
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_masks_that_lie_make_no_kernel_leave_the_values(tokens, isa, dtype):
    """The result is wrong; what prepared the operands would have refused them. That nothing else is read is seen under
    the address sanitizer, in tests/sanitized/."""
    _, (masks, values, panel_offsets), x, _ = problem(37, 300, tokens, dtype)
    lying = torch.full_like(masks, -1), values, panel_offsets
    y = torch.full((tokens, 37), float("nan"), dtype=dtype)
    linear_bitmap.sparse(x, lying, None, y, 300, isa)
    linear_bitmap.expand(lying, torch.empty(37, 300, dtype=dtype), range(0, 3), 37, isa)
    assert not y.isnan().any()


@needs_cpu
def test_every_kernel_prepares_only_what_is_consistent():
    packed = Bitmap.pack(weight(7, 37))
    flipped = packed.bitmap.clone()
    flipped[3, 1] ^= 4
    lying = Bitmap(packed.values, flipped, packed.row_offsets, 37)
    for kernel in linear_bitmap.KERNELS:
        with pytest.raises(ValueError, match="bitmap keeps .* weights in row 3, row_offsets say"):
            kernel.prepare(lying)


@needs_cpu
@every_set
@dtypes
def test_nan_and_inf_in_x_reach_what_they_reach_in_the_dense_product(isa, dtype):
    dense, operands, x, _ = problem(37, 70, 5, dtype, density=0.3)
    x[1, 3], x[2, 69] = float("nan"), float("inf")
    y = torch.zeros(5, 37, dtype=dtype)
    linear_bitmap.sparse(x, operands, None, y, 70, isa)
    assert torch.equal(y.isnan(), linear(x.float(), dense.float()).isnan())


@needs_cpu
@every_set
def test_bfloat16_is_rounded_to_nearest_even_and_saturates_to_inf(isa):
    dense = torch.eye(16, 32).bfloat16()
    operands = linear_bitmap.to_panels(Bitmap.pack(dense))
    x = torch.zeros(1, 32).bfloat16()
    x[0, :16] = torch.tensor([1.0, 1.0, 3e38, -3e38] + [1.0] * 12)
    # bfloat16 has 8 bits: 1 + 2^-8 is half way between 1 and 1 + 2^-7, and the even one of them is 1
    bias = torch.tensor([2.0**-8, 3 * 2.0**-8, 3e38, -3e38] + [0.0] * 12).bfloat16()
    y = torch.full((1, 16), float("nan")).bfloat16()
    linear_bitmap.sparse(x, operands, bias, y, 32, isa)
    assert torch.equal(y, (x[:, :16].float() + bias.float()).bfloat16())


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(
    "shape", [(0,), (1,), (2,), (3,), (7,), (16,), (17,), (33,), (1000,), (), (2, 3), (2, 1, 4, 3)]
)
@dtypes
def test_every_kernel_serves_any_leading_dimensions(kernel, shape, dtype):
    dense = weight(100, 257, dtype=dtype)
    packed = Bitmap.pack(dense)
    if reason := kernel.refuses(packed):
        pytest.skip(reason)
    x, bias = torch.randn(*shape, 257).to(dtype), torch.randn(100).to(dtype)
    for b in (None, bias):
        y = kernel.run(x, kernel.prepare(packed), b, 100, 257)
        assert_right(y, x, dense, b)
        torch.testing.assert_close(y, linear_bitmap.reference(x, packed, b), rtol=2e-2, atol=BOUND[dtype] * 50)


@needs_cpu
@dtypes
def test_x_and_bias_may_have_any_strides(dtype):
    dense, operands, _, _ = problem(37, 70, 1, dtype)
    bias = torch.randn(74).to(dtype)[::2]
    for x in (
        torch.randn(70, 6).to(dtype).T,
        torch.randn(6, 140).to(dtype)[:, ::2],
        torch.randn(1, 70).to(dtype).expand(9, 70),
        torch.randn(1).to(dtype).expand(3, 70),
        torch.randn(4, 70, 5).to(dtype).transpose(1, 2),
        torch.randn(211).to(dtype)[1:].view(3, 70),
    ):
        assert_right(KERNELS["cpu"].run(x, operands, bias, 37, 70), x, dense, bias)


@needs_cpu
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_layers_without_inputs_or_outputs_are_served(shape):
    out_features, in_features = shape
    operands = linear_bitmap.to_panels(Bitmap.pack(torch.zeros(shape)))
    for tokens in (0, 1, 3, 100):
        x, bias = torch.randn(tokens, in_features), torch.randn(out_features)
        y = KERNELS["cpu"].run(x, operands, bias, out_features, in_features)
        assert torch.equal(y, linear(x, torch.zeros(shape), bias))


@needs_cpu
def test_arguments_that_do_not_fit_are_refused_in_words():
    _, operands, x, bias = problem(37, 70, 3, torch.float32)
    run = KERNELS["cpu"].run
    with pytest.raises(ValueError, match=r"x must end with in_features = 70, got shape \[3, 69\]"):
        run(x[:, 1:], operands, bias, 37, 70)
    with pytest.raises(ValueError, match="x must have the weight's dtype torch.float32, got torch.bfloat16"):
        run(x.bfloat16(), operands, bias, 37, 70)
    with pytest.raises(ValueError, match="bias must have the weight's dtype torch.float32, got torch.float64"):
        run(x, operands, bias.double(), 37, 70)
    with pytest.raises(ValueError, match="bias must hold 37 elements, got 36"):
        run(x, operands, bias[1:], 37, 70)
    with pytest.raises(ValueError, match="masks must hold panels"):
        run(torch.randn(3, 99), operands, bias, 37, 99)
    with pytest.raises(ValueError, match="panel_offsets must run from 0 to the"):
        run(x, (operands[0], operands[1][:-1], operands[2]), bias, 37, 70)
    falling = operands[2].clone()
    falling[1] = falling[2] + 1
    with pytest.raises(ValueError, match="panel_offsets must not fall, panel 1 does"):
        run(x, (*operands[:2], falling), bias, 37, 70)
    with pytest.raises(ValueError, match="does not have the instruction set amx"):
        linear_bitmap.sparse(x, operands, bias, torch.zeros(3, 37), 70, "amx")


def test_a_weight_that_no_compiled_kernel_serves_is_refused_in_words(monkeypatch):
    refuses = KERNELS["cpu"].refuses
    double = Bitmap.pack(torch.ones(2, 2))
    object.__setattr__(double, "values", double.values.double())
    assert "must be bfloat16, float16 or float32, got torch.float64" in refuses(double)
    packed = Bitmap.pack(torch.ones(2, 2))
    on_meta = Bitmap(packed.values.to("meta"), packed.bitmap.to("meta"), packed.row_offsets.to("meta"), 2)
    assert "must be on the CPU, got meta" in refuses(on_meta)
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no compiler")
    assert refuses(packed) == "not built: no compiler"
    assert pick(linear_bitmap.KERNELS, packed).name == "reference"


@needs_cpu
@dtypes
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_the_op_is_registered_as_torch_wants_it(tokens, dtype):
    _, operands, x, bias = problem(37, 70, tokens, dtype)
    op = torch.ops.sparsekern.linear_bitmap_cpu.default
    torch.library.opcheck(op, (x, *operands, bias, 37, 70))
    torch.library.opcheck(op, (x[None], *operands, None, 37, 70))
    torch.library.opcheck(op, (x.requires_grad_(), *operands, bias.requires_grad_(), 37, 70))
    torch.library.opcheck(torch.ops.sparsekern.linear_bitmap_cpu_weight.default, (*operands, 37, 70))


def test_every_registered_op_is_checked_by_opcheck():
    names = torch._C._dispatch_get_all_op_names()
    names = {name.removeprefix("sparsekern::") for name in names if name.startswith("sparsekern::")}
    tests = [path.read_text() for path in Path(__file__).parents[1].glob("**/test_*.py")]
    checked = "".join(text for text in tests if "torch.library.opcheck(" in text)
    assert {name for name in names if f".{name}.default" not in checked} == set()


@needs_cpu
def test_torch_compile_takes_the_whole_graph():
    dense, operands, x, bias = problem(37, 70, 5, torch.float32)
    compiled_run = torch.compile(
        lambda x: KERNELS["cpu"].run(x, operands, bias, 37, 70).relu(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for tokens in (5, 1, 9, 80):
        x = torch.randn(tokens, 70)
        torch.testing.assert_close(compiled_run(x), linear(x, dense, bias).relu(), rtol=1e-4, atol=1e-4)


@needs_cpu
@dtypes
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_the_same_input_gives_the_same_bits(tokens, dtype):
    _, operands, x, bias = problem(700, 800, tokens, dtype)
    first = KERNELS["cpu"].run(x, operands, bias, 700, 800)
    for _ in range(20):
        assert torch.equal(KERNELS["cpu"].run(x, operands, bias, 700, 800), first)


@needs_cpu
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_grad_mode_is_served(mode):
    dense, operands, x, bias = problem(37, 70, 3, torch.float32)
    with mode():
        assert_right(KERNELS["cpu"].run(x, operands, bias, 37, 70), x, dense, bias)


ONE_OPENMP = """
import torch
from sparsekern.formats.bitmap import Bitmap
from sparsekern.ops import linear_bitmap
torch.set_num_threads(2)
kernel = linear_bitmap.KERNELS[0]
kernel.run(torch.randn(3, 700), kernel.prepare(Bitmap.pack(torch.randn(600, 700))), None, 600, 700)
torch.randn(500, 500) @ torch.randn(500, 500)
with open("/proc/self/maps") as maps:
    found = {line.split()[-1] for line in maps if "gomp" in line or "libomp" in line or "iomp" in line}
assert len(found) == 1, found
"""


@needs_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_torchs_threads_and_ours_are_of_one_openmp():
    done = subprocess.run([sys.executable, "-c", ONE_OPENMP], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
