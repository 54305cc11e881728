"""csrc/cuda/linear_24_prefill.cu without a card: every line runs on the CPU, and nvcc compiles it without spills."""

import ctypes
import re
import shutil
import subprocess
import types

import pytest
import torch

from sparsekern.formats import SemiStructured
from sparsekern.ops import compiled, fragments_24, linear_24
from sparsekern.pattern import NM
from tests.cuda_on_host.emulator import CSRC, ORDERS, build

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
# a card of one multiprocessor is filled by one large tile; one of 1000 asks for small ones
LARGE, SMALL = 1, 1000


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    return build(tmp_path_factory.mktemp("linear_24_prefill"), "linear_24_prefill.cpp", "linear_24_prefill.cu")


def problem(tokens, out_features, in_features, dtype):
    g = torch.Generator().manual_seed(in_features)
    weight = torch.randn(out_features, in_features, generator=g)
    weight = weight.where(NM(2, 4).mask(torch.rand(weight.shape, generator=g)), 0.0).to(dtype)
    # groups that keep one weight or none
    weight[torch.rand(weight.shape, generator=g) < 0.1] = 0
    x, bias = torch.randn(tokens, in_features, generator=g), torch.randn(out_features, generator=g)
    return x.to(dtype), weight, bias.to(dtype)


def run(program, x, weight, bias, **how):
    """y of the program, from the weight in the order that the kernel reads."""
    sizes = [x.shape[0], *weight.shape]
    tensors = [x, *fragments_24.reference(SemiStructured.pack(weight)), bias]
    return program.run(TYPES[x.dtype], tensors, sizes, [((x.shape[0], len(weight)), x.dtype)], **how)[0]


def assert_right(y, x, weight, bias):
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert (y.double() - expected).norm() <= TOLERANCE[x.dtype] * expected.norm()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features", "dtype", "multiprocessors"),
    [
        # less than an instruction; parts of tiles and of a chunk; whole chunks; two stages; more of them than memory
        (3, 5, 8, torch.bfloat16, SMALL),
        (67, 81, 328, torch.float16, SMALL),
        (33, 64, 512, torch.bfloat16, SMALL),
        (9, 40, 72, torch.float16, LARGE),
        (100, 272, 328, torch.bfloat16, LARGE),
        # a row of x that does not lie on 16 bytes
        (66, 24, 332, torch.bfloat16, LARGE),
    ],
    ids=str,
)
def test_the_kernel_matches_float64_and_reads_nothing_else(
    on_host, tokens, out_features, in_features, dtype, multiprocessors, order
):
    x, weight, bias = problem(tokens, out_features, in_features, dtype)
    y = run(on_host, x, weight, bias, order=order, multiprocessors=multiprocessors)
    assert_right(y, x, weight, bias)


def test_without_a_bias_nothing_is_added(on_host):
    x, weight, _ = problem(20, 33, 64, torch.bfloat16)
    assert_right(run(on_host, x, weight, None), x, weight, None)


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
def test_tensors_that_miss_16_bytes_are_read_and_written_right(on_host, dtype):
    x, weight, bias = problem(5, 18, 64, dtype)
    assert_right(run(on_host, x, weight, bias, shifts={0: 2, 3: 2}), x, weight, bias)


def test_tiles_in_strips_cover_every_token_and_output_once(on_host):
    """More than eight tiles of tokens: the last strip is narrower."""
    x, weight, bias = problem(9 * 64 + 1, 70, 8, torch.float16)
    assert_right(run(on_host, x, weight, bias, multiprocessors=SMALL), x, weight, bias)


def test_nan_reaches_the_outputs_that_keep_its_input_and_no_other(on_host):
    x, weight, bias = problem(70, 70, 260, torch.float16)
    x[3, 7] = float("nan")
    x[69, 259] = float("inf")
    y = run(on_host, x, weight, bias, multiprocessors=SMALL)
    assert torch.equal(y[3].isnan(), SemiStructured.pack(weight).to_dense()[:, 7] != 0)
    assert not y[4:69].isnan().any()
    assert torch.equal(~y[69].isfinite(), weight[:, 259] != 0)


def test_no_tokens_are_no_launch(on_host):
    x, weight, bias = problem(0, 16, 32, torch.bfloat16)
    assert run(on_host, x, weight, bias).shape == (0, 16)


def test_more_inputs_than_an_offset_holds_are_refused_before_anything_is_read(on_host):
    done = on_host.call("fp16", [None, None, None, None], [1, 1, 2**23 + 8])
    assert done.returncode == 71
    assert b"invalid configuration" in done.stderr


@pytest.mark.parametrize("leading", [(65,), (3, 5, 5)], ids=str)
def test_above_64_tokens_the_op_hands_the_kernel_the_right_addresses_and_sizes(
    on_host, on_no_card, leading, monkeypatch
):
    """The emulated kernel gets what the binding would get, and writes y where it is told."""
    tokens = torch.Size(leading).numel()
    x, weight, bias = problem(tokens, 7, 36, torch.bfloat16)
    operands = fragments_24.reference(SemiStructured.pack(weight))

    def multiply(*, stream, **given):
        sizes = [given[f"{name}_size"] for name in ("x", "values", "metadata", "bias", "y")]
        assert sizes == [tokens * 36, 2048, 128, 7, tokens * 7]
        assert (given["values"], given["metadata"]) == tuple(operand.data_ptr() for operand in operands)
        assert (stream, given["tokens"], given["out_features"], given["in_features"]) == (5, tokens, 7, 36)
        data = ctypes.string_at(given["x"], x.nbytes)
        y = run(on_host, torch.frombuffer(bytearray(data), dtype=x.dtype).view(tokens, 36), weight, bias)
        ctypes.memmove(given["y"], y.data_ptr(), y.nbytes)
        if built is not None:
            names = re.findall(r"(\w+): typing", built.linear_24_prefill_bf16.__doc__)
            assert set(names) == {"stream", *given}

    built = compiled.cuda()
    monkeypatch.setattr(compiled, "cuda", lambda: types.SimpleNamespace(linear_24_prefill_bf16=multiply))
    y = linear_24.run_cuda(x.view(*leading, 36), operands, bias, 7, 36)
    assert y.shape == (*leading, 7)
    assert_right(y.view(tokens, 7), x, weight, bias)


def test_the_binding_refuses_sizes_that_contradict_each_other():
    if compiled.cuda() is None:
        pytest.skip(f"sparsekern._cuda: {compiled.why_not('cuda')}")
    right = {
        **dict.fromkeys(["x", "values", "metadata", "bias", "y", "bias_size", "stream"], 0),
        **{"x_size": 65 * 36, "values_size": 2048, "metadata_size": 128, "y_size": 65 * 7},
        **{"tokens": 65, "out_features": 7, "in_features": 36},
    }
    with pytest.raises(ValueError, match="values must hold panels"):
        compiled.cuda().linear_24_prefill_bf16(**{**right, "values_size": 2047})
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="linear_24_prefill: .*(CUDA|driver|device)"):
            compiled.cuda().linear_24_prefill_fp16(**right)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("tokens", [65, 128, 1000, 4096])
@pytest.mark.parametrize("shape", [(1, 4), (129, 520), (1000, 4100), (4096, 4096)], ids=str)
def test_on_a_card_the_kernel_matches_float64(dtype, tokens, shape):
    kernel = next(kernel for kernel in linear_24.KERNELS if kernel.name == "cuda")
    x, weight, bias = (t.cuda() for t in problem(tokens, *shape, dtype))
    packed = SemiStructured.pack(weight)
    assert kernel.refuses(packed) is None
    operands = kernel.prepare(packed)
    for b in (bias, None):
        y = kernel.run(x, operands, b, *shape)
        assert_right(y, x, weight, b)
        assert torch.equal(y, kernel.run(x, operands, b, *shape))


# sm_80 leaves the fewest registers over
@pytest.mark.parametrize("arch", ["80"])
def test_nvcc_needs_no_spills_and_the_registers_that_the_file_states(arch, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc was found on PATH")
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    source = CSRC / "cuda/linear_24_prefill.cu"
    done = subprocess.run(
        ["nvcc", "-O3", "-std=c++17", gencode, "-Xptxas=-v", "-c", source, "-o", tmp_path / "linear_24_prefill.o"],
        capture_output=True,
        text=True,
    )
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    assert done.returncode == 0, done.stderr
    # three tiles of two types
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr) == [("0", "0")] * 6
    registers = sorted(int(used) for used in re.findall(r"Used (\d+) registers", done.stderr))
    assert len(registers) == 6
    assert registers[3] <= 138
    assert registers[5] <= 254
