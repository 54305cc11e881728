"""csrc/cuda/linear_bitmap.cu without a card: its own source runs on the CPU, and nvcc compiles it without spills."""

import ctypes
import re
import shutil
import subprocess
import types

import pytest
import torch

from sparsekern.formats import Bitmap
from sparsekern.ops import compiled, linear_bitmap
from tests.cuda_on_host.emulator import CSRC, build

SOURCE = CSRC / "cuda/linear_bitmap.cu"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    return build(tmp_path_factory.mktemp("linear_bitmap"), "linear_bitmap.cpp", "linear_bitmap.cu")


def run(program, x, packed, bias):
    """y of the program."""
    tensors = [x, packed.values, packed.bitmap, packed.row_offsets, bias]
    out_features, in_features = packed.shape
    sizes = [x.shape[0], out_features, in_features]
    return program.run(TYPES[x.dtype], tensors, sizes, [((x.shape[0], out_features), x.dtype)])[0]


def problem(tokens, out_features, in_features, dtype):
    g = torch.Generator().manual_seed(in_features)
    weight = torch.randn(out_features, in_features, generator=g)
    weight *= torch.rand(out_features, in_features, generator=g) < 0.5
    # one full and one empty row
    weight[0] = 1.5
    weight[-1] = 0.0
    x, bias = torch.randn(tokens, in_features, generator=g), torch.randn(out_features, generator=g)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features"),
    [(1, 1, 1), (1, 7, 37), (3, 37, 8), (4, 129, 64), (5, 2, 100), (9, 130, 17)],
    ids=str,
)
def test_the_kernel_matches_float64_and_reads_nothing_else(on_host, dtype, tokens, out_features, in_features):
    x, weight, bias = problem(tokens, out_features, in_features, dtype)
    packed = Bitmap.pack(weight)
    for b in (bias, None):
        expected = x.double() @ weight.double().T + (0 if b is None else b.double())
        torch.testing.assert_close(
            run(on_host, x, packed, b).double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def test_infinity_at_a_pruned_input_reaches_the_output_as_in_the_dense_product(on_host):
    x, packed = torch.tensor([[float("inf"), 1.0]]), Bitmap.pack(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    expected = linear_bitmap.reference(x, packed, None)
    assert expected[0].isnan().tolist() == [True, False]
    torch.testing.assert_close(run(on_host, x, packed, None), expected, equal_nan=True)


@pytest.mark.parametrize("leading", [(1,), (2, 3), ()], ids=str)
def test_the_op_hands_the_kernel_the_right_addresses_and_sizes(on_host, on_no_card, leading, monkeypatch):
    """The emulated kernel gets what the binding would get, and writes y where it is told."""
    x, weight, bias = problem(6, 7, 37, torch.float32)
    x, packed = x.flatten()[: 37 * torch.Size(leading).numel()].view(*leading, 37), Bitmap.pack(weight)

    def multiply(*, values, stream, **sizes):
        assert [sizes[f"{name}_size"] for name in ("x", "bitmap", "row_offsets", "bias")] == [x.numel(), 7 * 5, 8, 7]
        assert (stream, sizes["in_features"], values) == (5, 37, packed.values.data_ptr())
        assert (sizes["bitmap"], sizes["row_offsets"]) == (packed.bitmap.data_ptr(), packed.row_offsets.data_ptr())
        flat = torch.frombuffer(bytearray(ctypes.string_at(sizes["x"], 4 * x.numel())), dtype=torch.float32)
        y = run(on_host, flat.view(sizes["tokens"], 37), packed, bias)
        assert y.numel() == sizes["y_size"]
        ctypes.memmove(sizes["y"], y.data_ptr(), y.nbytes)
        if built is not None:
            names = re.findall(r"(\w+): typing", built.linear_bitmap_fp32.__doc__)
            assert set(names) == {"values", "stream", *sizes}

    built = compiled.cuda()
    monkeypatch.setattr(compiled, "cuda", lambda: types.SimpleNamespace(linear_bitmap_fp32=multiply))
    operands = packed.values, packed.bitmap, packed.row_offsets
    y = linear_bitmap.run_cuda(x, operands, bias, 7, 37)
    torch.testing.assert_close(y, linear_bitmap.reference(x, packed, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("tokens", [0, 1, 3, 31, 33])
def test_on_a_card_the_kernel_matches_float64(dtype, tokens):
    kernel = next(kernel for kernel in linear_bitmap.KERNELS if kernel.name == "cuda_rows")
    x, weight, bias = (t.cuda() for t in problem(tokens, 129, 1001, dtype))
    packed = Bitmap.pack(weight)
    assert kernel.refuses(packed) is None
    for b in (bias, None):
        y = kernel.run(x, kernel.prepare(packed), b, 129, 1001)
        expected = x.double() @ weight.double().T + (0 if b is None else b.double())
        assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    op = torch.ops.sparsekern.linear_bitmap_cuda.default
    torch.library.opcheck(op, (x, *kernel.prepare(packed), bias, 1001))


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc_needs_no_spills_and_few_registers(arch, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc was found on PATH")
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    done = subprocess.run(
        ["nvcc", "-O3", "-std=c++17", gencode, "-Xptxas=-v", "-c", SOURCE, "-o", tmp_path / "linear_bitmap.o"],
        capture_output=True,
        text=True,
    )
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills == [("0", "0")] * len(TYPES)
    # more than 64 would leave half of the warps out
    assert all(int(registers) <= 64 for registers in re.findall(r"Used (\d+) registers", done.stderr))


def test_a_launch_without_a_driver_is_a_runtime_error_in_cudas_words():
    if compiled.cuda() is None:
        pytest.skip(f"sparsekern._cuda: {compiled.why_not('cuda')}")
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver and a card")
    with pytest.raises(RuntimeError, match="linear_bitmap: .*(CUDA|driver|device)"):
        compiled.cuda().linear_bitmap_fp32(0, 1, 0, 0, 1, 0, 2, 0, 0, 0, 1, 1, 1, 0)


@pytest.mark.parametrize(("x_size", "said"), [(3, "x must hold"), (2, "y must hold")])
def test_the_binding_refuses_sizes_that_contradict_each_other(x_size, said):
    if compiled.cuda() is None:
        pytest.skip(f"sparsekern._cuda: {compiled.why_not('cuda')}")
    with pytest.raises(ValueError, match=said):
        compiled.cuda().linear_bitmap_fp32(0, x_size, 0, 0, 1, 0, 2, 0, 0, 0, 7, 1, 2, 0)
