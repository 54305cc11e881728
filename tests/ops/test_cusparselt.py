"""cusparselt: what torch's door to the library is given, with a stand-in for the library on the CPU; and on a card."""

import types

import pytest
import torch

from sparsekern import baselines
from sparsekern.formats import SemiStructured
from sparsekern.ops import cusparselt, linear_24
from sparsekern.pattern import NM


def problem(out_features, in_features, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(in_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight = weight.where(NM(2, 4).mask(weight.abs()), 0.0)
    return weight.to(device, dtype), torch.randn(out_features, generator=generator).to(device, dtype)


@pytest.fixture
def library(monkeypatch):
    """aten's two functions on the CPU, with the rules that the library documents; returns the algorithms asked for."""
    asked = []

    def compress(weight):
        assert weight.is_contiguous()
        packed = SemiStructured.pack(weight)
        return torch.cat([packed.values, packed.metadata.view(weight.dtype)], dim=1)

    # torch leaves out what is at its default
    def multiply(
        compressed,
        b,
        bias=None,
        alpha=None,
        out_dtype=None,
        transpose_result=False,
        alg_id=0,
        split_k=1,
        split_k_mode=-1,
    ):
        in_features, tokens = b.shape
        assert b.data_ptr() % 16 == 0
        assert tokens % 8 == in_features % 16 == len(compressed) % 16 == 0
        assert b.T.is_contiguous() or b.is_contiguous()
        asked.append((alg_id, split_k, split_k_mode))
        values, metadata = compressed.split([in_features // 2, in_features // 16], dim=1)
        weight = SemiStructured(values, metadata.contiguous().view(torch.int16), in_features).to_dense()
        y = weight.float() @ b.float() + (0 if bias is None else bias.float()[:, None])
        return (y.T if transpose_result else y).contiguous().to(b.dtype)

    stand_in = torch.library.Library("aten", "IMPL")
    stand_in.impl("_cslt_compress", compress, "CPU")
    stand_in.impl("_cslt_sparse_mm", multiply, "CPU")
    yield asked
    stand_in._destroy()


@pytest.mark.parametrize("tokens", [0, 1, 8, 13])
@pytest.mark.parametrize("dtype", cusparselt.DTYPES, ids=str)
def test_the_product_is_that_of_the_dense_weight(library, on_no_card, tokens, dtype):
    weight, bias = problem(48, 80, dtype)
    (compressed,) = cusparselt.prepare(SemiStructured.pack(weight))
    for x in (torch.randn(tokens, 80).to(dtype), torch.randn(80, 2, tokens).to(dtype).permute(1, 2, 0)):
        for b in (bias, None):
            y = cusparselt.run(x, (compressed,), b, 48, 80)
            expected = x.double() @ weight.double().T + (0 if b is None else b.double())
            assert y.shape == expected.shape
            assert y.is_contiguous()
            torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


def test_what_is_not_aligned_is_copied_first(library, on_no_card):
    weight, bias = problem(16, 32)
    (compressed,) = cusparselt.prepare(SemiStructured.pack(weight))
    x, shifted = torch.randn(8 * 32 + 1).bfloat16()[1:].view(8, 32), torch.cat([bias[:1], bias])[1:]
    assert x.data_ptr() % 16 == shifted.data_ptr() % 16 == 2
    y = cusparselt.run(x, (compressed,), shifted, 16, 32)
    torch.testing.assert_close(y, cusparselt.run(x.clone(), (compressed,), bias, 16, 32), rtol=0, atol=0)


@pytest.mark.parametrize("in_features", [16, 48, 2064])
def test_restore_is_the_inverse_of_prepare_bit_for_bit(library, in_features):
    weight, _ = problem(32, in_features)
    weight[3] = -weight[3].abs()
    packed = SemiStructured.pack(weight)
    restored = cusparselt.restore(cusparselt.prepare(packed), 32, in_features)
    for mine, saved in ((restored.values, packed.values), (restored.metadata, packed.metadata)):
        assert torch.equal(mine.view(torch.int16), saved.view(torch.int16))
    assert torch.equal(cusparselt.dense(cusparselt.prepare(packed), 32, in_features), weight + 0.0)


def test_the_kernel_takes_the_default_algorithm_and_the_baseline_the_one_that_was_found(library, monkeypatch):
    weight, bias = problem(16, 32)
    x = torch.randn(8, 32).bfloat16()
    cusparselt.multiply(x, cusparselt.compress(weight), None)
    found = {"alg_id": 3, "split_k": 2, "split_k_mode": 1}
    monkeypatch.setattr(baselines, "_search", lambda compressed, x, bias: tuple(found.values()))
    prepared = baselines.CUSPARSELT.prepare(weight, bias, 8)
    y = baselines.CUSPARSELT.run(x, prepared, bias)
    assert library == [(0, 1, -1), (3, 2, 1)]
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(2, 16).bfloat16(), "x must end with in_features = 32, got shape [2, 16]"),
        (torch.zeros(2, 32), "x must have the weight's dtype torch.bfloat16, got torch.float32"),
    ],
    ids=["size", "dtype"],
)
def test_what_does_not_fit_is_refused_in_words(library, on_no_card, x, said):
    (compressed,) = cusparselt.prepare(SemiStructured.pack(problem(16, 32)[0]))
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        cusparselt.run(x, (compressed,), None, 16, 32)


def weight_of(dtype, shape):
    """What is asked of a card's weight."""
    return types.SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype, shape=shape)


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "said"),
    [
        ((9, 0), torch.bfloat16, (32, 48), None),
        ((7, 5), torch.float16, (32, 48), "the card must have compute capability 8.0 or more, got 7.5"),
        ((9, 0), torch.float32, (32, 48), "the weight must be bfloat16 or float16, got torch.float32"),
        ((9, 0), torch.float16, (24, 48), "out_features must be a positive multiple of 16, got 24"),
        ((9, 0), torch.float16, (32, 0), "in_features must be a positive multiple of 16, got 0"),
    ],
    ids=str,
)
def test_the_kernel_says_why_it_cannot_serve(monkeypatch, capability, dtype, shape, said):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cusparselt.refuses(weight_of(dtype, shape)) == said


def test_without_the_library_or_a_card_it_is_refused(monkeypatch):
    assert cusparselt.refuses(SemiStructured.pack(problem(16, 32)[0])) == (
        "the weight must be on a CUDA device, got cpu"
    )
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = cusparselt.refuses(weight_of(torch.bfloat16, (16, 32)))
    assert reason == f"torch {torch.__version__} brings no cuSPARSELt"


def test_it_is_one_of_the_kernels_of_linear_24_and_compiles_to_the_right_shape():
    kernel = next(kernel for kernel in linear_24.KERNELS if kernel.name == "cusparselt")
    x, compressed = torch.empty(2, 3, 32, device="meta"), torch.empty(48, 18, device="meta")
    assert kernel.run(x, (compressed,), None, 48, 32).shape == (2, 3, 48)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [0, 1, 8, 13, 200])
@pytest.mark.parametrize("dtype", cusparselt.DTYPES, ids=str)
def test_on_a_card_the_library_matches_float64_and_the_weight_comes_back(tokens, dtype):
    weight, bias = problem(272, 1040, dtype, "cuda")
    packed = SemiStructured.pack(weight)
    if reason := cusparselt.refuses(packed):
        pytest.skip(reason)
    operands = cusparselt.prepare(packed)
    assert torch.equal(cusparselt.restore(operands, 272, 1040).to_dense(), weight)
    x = torch.randn(tokens, 1040, device="cuda").to(dtype)
    for baseline in (lambda b: cusparselt.run(x, operands, b, 272, 1040), _searched(weight, x)):
        for b in (bias, None):
            expected = x.double() @ weight.double().T + (0 if b is None else b.double())
            assert (baseline(b).double() - expected).norm() <= 8e-3 * expected.norm()
    op = torch.ops.sparsekern.linear_24_cusparselt.default
    torch.library.opcheck(op, (x, *operands, bias, 272, 1040))


def _searched(weight, x):
    def run(bias):
        if len(x) == 0:
            return x.new_empty(0, len(weight))
        return baselines.CUSPARSELT.run(x, baselines.CUSPARSELT.prepare(weight, bias, len(x)), bias)

    return run
