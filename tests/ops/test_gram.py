"""gram: every kernel against float64, at sizes that divide nothing, and the half that is summed."""

import pytest
import torch

from sparsekern.ops import compiled, gram
from sparsekern.ops.kernel import pick

SETS = compiled.cpu().gram_sets() if compiled.cpu() else ()
HALVES = [torch.bfloat16, torch.float16]


def tokens(count, in_features, dtype=torch.float32, seed=0):
    return torch.randn(count, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def upper_error(total, x):
    """Of the upper triangle, relative to its norm in float64."""
    exact = (x.double().T @ x.double()).triu()
    return float((total.double().triu() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kernel", gram.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", gram.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 48), (130, 67), (513, 200), (1025, 401)], ids=str)
def test_every_kernel_matches_float64(kernel, dtype, shape):
    x, total = tokens(*shape, dtype), torch.zeros(shape[1], shape[1])
    if reason := kernel.refuses(total, x):
        pytest.skip(f"{kernel.name}: {reason}")
    kernel.run(total, x)
    assert upper_error(total, x) < 3e-6


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512"])
@pytest.mark.parametrize("dtype", gram.DTYPES, ids=str)
def test_every_instruction_set_matches_float64(isa, dtype):
    if isa not in SETS:
        pytest.skip(f"this machine or build does not have {isa}")
    if isa == "avx512_bf16" and dtype != torch.bfloat16:
        pytest.skip("it multiplies bfloat16 only")
    x, total = tokens(777, 391, dtype), torch.zeros(391, 391)
    gram._cpu(total, x, isa)
    assert upper_error(total, x) < 3e-6


@pytest.mark.parametrize("kernel", gram.KERNELS, ids=lambda kernel: kernel.name)
def test_batches_add_up_and_mirror_makes_the_sum_whole(kernel):
    x, total = tokens(300, 1100), torch.zeros(1100, 1100)
    if reason := kernel.refuses(total, x):
        pytest.skip(f"{kernel.name}: {reason}")
    for part in x.split(110):
        kernel.run(total, part)
    gram.mirror(total)
    assert torch.equal(total, total.T)
    torch.testing.assert_close(total.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kernel", gram.KERNELS, ids=lambda kernel: kernel.name)
def test_halves_are_summed_in_float32(kernel, dtype):
    # 4097 ones: bfloat16 stops counting at 256, float16 at 2048; 240 squared is past the largest float16
    x, total = torch.ones(4097, 3).to(dtype), torch.zeros(3, 3)
    if reason := kernel.refuses(total, x):
        pytest.skip(f"{kernel.name}: {reason}")
    kernel.run(total, x)
    assert total[0, 2] == 4097
    kernel.run(total, 240 * x)
    assert total[0, 2] == 4097 + 4097 * 240**2


@pytest.mark.parametrize("kernel", gram.KERNELS, ids=lambda kernel: kernel.name)
def test_a_slice_of_tokens_and_a_transposed_x_are_read_right(kernel):
    whole, total = tokens(64, 30, torch.bfloat16), torch.zeros(30, 30)
    if reason := kernel.refuses(total, whole):
        pytest.skip(f"{kernel.name}: {reason}")
    kernel.run(total, whole[7:50])
    assert upper_error(total, whole[7:50]) < 3e-6
    transposed, total = whole.T, torch.zeros(64, 64)
    kernel.run(total, transposed)
    assert upper_error(total, transposed) < 3e-6


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_no_tokens_or_no_inputs_add_nothing(shape):
    total = torch.ones(shape[1], shape[1])
    gram.accumulate(total, tokens(*shape))
    assert total.eq(1).all()


def test_the_sum_does_not_depend_on_the_number_of_threads():
    x, before = tokens(900, 500, torch.bfloat16), torch.get_num_threads()
    sums = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        total = torch.zeros(500, 500)
        gram.accumulate(total, x)
        sums.append(total.triu())
    torch.set_num_threads(before)
    if pick(gram.KERNELS, total, x).name != "cpu":
        pytest.skip("the compiled kernel does not serve here")
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_without_the_compiled_module_the_library_serves(monkeypatch):
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no compiler")
    assert pick(gram.KERNELS, torch.zeros(3, 3), torch.zeros(2, 3)).name == "tile_rows"


@pytest.mark.parametrize("kernel", gram.KERNELS, ids=lambda kernel: kernel.name)
def test_what_cannot_be_summed_is_refused(kernel):
    total = torch.zeros(3, 3)
    for wrong, said in [
        ((total, torch.zeros(4, 2)), r"x must be \[tokens, 3\], got \[4, 2\]"),
        ((total, torch.zeros(4, 3, dtype=torch.int32)), "x must be bfloat16, float16 or float32, got torch.int32"),
        ((torch.zeros(2, 3), torch.zeros(4, 3)), r"total must be \[in_features, in_features\] float32, got \[2, 3\]"),
        ((torch.zeros(6, 6)[::2, ::2], torch.zeros(4, 3)), r"total must be contiguous, got strides \[12, 2\]"),
    ]:
        with pytest.raises(ValueError, match=said):
            kernel.run(*wrong)


@pytest.mark.skipif(compiled.cpu() is None, reason=str(compiled.why_not("cpu")))
def test_impossible_sizes_are_refused_before_anything_is_read():
    x, total = torch.zeros(4, 3), torch.zeros(3, 3)

    def run(x_size=12, total_size=9, tokens=4, in_features=3, threads=1, isa="avx512", dtype="float32"):
        compiled.cpu().gram(
            dtype, x.data_ptr(), x_size, total.data_ptr(), total_size, tokens, in_features, threads, isa
        )

    for wrong, said in [
        ({"threads": 0}, "threads must be positive, got 0"),
        ({"tokens": -1}, "tokens must not be negative, got -1"),
        ({"x_size": 11}, "x must hold tokens \\* in_features elements, got 11"),
        ({"total_size": 8}, "total must hold in_features \\* in_features elements, got 8"),
        ({"isa": "avx1024"}, "does not have the instruction set avx1024"),
    ]:
        with pytest.raises(ValueError, match=said):
            run(**wrong)
