"""Weights and biases that are not as usual: packed and run, pruned in a model, or refused with the layer's name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import sparsekern as sk
from sparsekern import hf
from sparsekern.formats import Bitmap
from sparsekern.pattern import NM

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-5}


def weight(rows=12, columns=48, seed=0):
    """2:4 sparse [rows, columns]; without groups where 4 does not divide the columns."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator)
    kept = torch.rand(rows, columns, generator=generator)
    return dense.where(NM(2, 4).mask(kept) if columns % 4 == 0 else kept > 0.5, 0.0)


AWKWARD = {
    "zero rows": lambda: weight().index_fill_(0, torch.tensor([0, 11]), 0),
    "zero columns": lambda: weight().index_fill_(1, torch.tensor([0, 5, 47]), 0),
    "all zero": lambda: torch.zeros(12, 48),
    "constant": lambda: weight().ne(0) * -0.3,
    "minus zeros": lambda: weight().where(weight() != 0, -0.0),
    "subnormal": lambda: weight() * 1e-40,
    "largest float16": lambda: (weight().sign() * 65504).half(),
    "largest bfloat16": lambda: (weight().sign() * 3.38e38).bfloat16(),
    "one row": lambda: weight(1, 48),
    "one column": lambda: weight(64, 1),
    "one weight": lambda: torch.ones(1, 1),
    "prime sizes": lambda: weight(13, 37),
    "not in 16s": lambda: weight(17, 36),
    "not in 64s": lambda: weight(65, 96),
    "transposed": lambda: weight(48, 12).T.contiguous().T.T,
    "rows of a larger one": lambda: weight(24, 48)[::2],
    "columns of a larger one": lambda: weight(12, 96)[:, 48:],
    "expanded": lambda: weight(1, 48).expand(12, 48),
    "bfloat16": lambda: weight().bfloat16(),
    "float64": lambda: weight().double(),
}


def layer(w, bias=None, requires_grad=False):
    linear = nn.Linear(w.shape[1], w.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(w, requires_grad=requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=requires_grad)
    return linear


class Model(nn.Module):
    """One block of one layer."""

    def __init__(self, linear):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(linear)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_an_awkward_weight_is_swapped_says_the_same_and_comes_back(kind, has_bias):
    w = AWKWARD[kind]()
    bias = torch.randn(len(w)).to(w.dtype) if has_bias else None
    model = Model(layer(w, bias))
    # small, so that the largest weights do not overflow
    x = torch.randn(5, w.shape[1]).to(w.dtype) * (1e-6 if "largest" in kind else 1)
    report = sk.sparsify(model, plan=sk.Unmeasured())
    assert len(report.swapped) + len(report.dense) == 1
    assert all(reason for _, reason in report.dense)
    exact = x.double() @ w.double().T + (bias.double() if has_bias else 0)
    scale = (x.double().abs() @ w.double().abs().T).max() + 1e-30
    assert (model(x).double() - exact).abs().max() <= TOLERANCE[w.dtype] * (scale + exact.abs().max())
    sk.densify(model)
    assert torch.equal(model.blocks[0][0].weight, w)
    zeros = model.blocks[0][0].weight[w == 0]
    assert not report.swapped or not torch.signbit(zeros).any()


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("method", [sk.Magnitude(), sk.SparseGPT(), sk.ADMM()], ids=lambda m: type(m).__name__)
def test_an_awkward_weight_of_a_model_is_pruned_or_refused_with_its_name(kind, method):
    if "largest" in kind and not isinstance(method, sk.Magnitude):
        pytest.skip("a repair makes what is kept larger, and is refused where it overflows: test_oneshot.py")
    w = AWKWARD[kind]()
    model = Model(layer(w))
    calibration = [{"x": torch.randn(4, 8, w.shape[1]).to(w.dtype) * (1e-6 if "largest" in kind else 1)}]
    if kind == "expanded":
        with pytest.raises(ValueError, match=r"^blocks\.0\.0: weight is expanded: .*; clone it first$"):
            sk.prune(model, method, 0.75, calibration)
        return
    asked, before = round(0.75 * w.numel()), w.clone()
    sk.prune(model, method, 0.75, calibration)
    zeros = int((w == 0).sum())
    # the model's own memory was written to, wherever it lies
    assert hf.weight(model.blocks[0][0]).data_ptr() == w.data_ptr()
    assert zeros == max(asked, int((before == 0).sum()))
    assert not torch.signbit(w[w == 0]).any()
    assert w.isfinite().all()
    assert (w[before == 0] == 0).all()


def test_what_lies_beside_a_weight_in_the_same_memory_stays():
    whole = weight(24, 96)
    before = whole.clone()
    sk.prune(Model(layer(whole[::2, 48:])), sk.Magnitude(), "1:4")
    assert torch.equal(whole[1::2], before[1::2])
    assert torch.equal(whole[:, :48], before[:, :48])
    assert not torch.equal(whole, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_bias_of_another_dtype_is_refused_at_the_swap_and_not_in_the_forward(dtype):
    linear = layer(weight().bfloat16(), torch.randn(12).to(dtype))
    with pytest.raises(
        ValueError, match=rf"bias must be \[12\] in the weight's dtype torch.bfloat16, got \[12\] in {dtype}"
    ):
        sk.SparseLinear.from_linear(linear)
    report = sk.sparsify(Model(linear), plan=sk.Unmeasured())
    assert not report.swapped
    assert report.dense == [
        ("blocks.0.0", f"its bias is {dtype}, its weight torch.bfloat16: torch multiplies no such two")
    ]


def test_a_layer_that_required_gradients_is_pruned_and_swapped_without():
    model = Model(layer(weight(), torch.zeros(12), requires_grad=True))
    sk.prune(model, sk.Magnitude(), 0.75)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    sk.sparsify(model, plan=sk.Unmeasured())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (parametrizations.weight_norm(nn.Linear(8, 8)), "parametrised"),
        (layer(torch.zeros(8, 8, dtype=torch.int8)), "its weight is torch.int8"),
    ],
    ids=["parametrised", "quantised"],
)
def test_a_weight_that_is_no_plain_number_is_left_alone_by_both_halves(linear, reason):
    model = Model(linear)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"has no layer left to prune|has no layer to prune \(.*{reason}"):
        sk.prune(model, sk.Magnitude(), 0.5)
    assert dict(hf.skipped(model))["blocks.0.0"].startswith(reason)
    sk.sparsify(model, plan=sk.Unmeasured())
    assert not any(isinstance(module, sk.SparseLinear) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_weight_that_is_not_finite_stays_dense_and_is_not_pruned(bad):
    w = weight()
    w[3, 5] = bad
    model = Model(layer(w))
    with pytest.raises(ValueError, match=r"^blocks\.0\.0: weight holds 1 NaN or infinite values$"):
        sk.prune(model, sk.Magnitude(), 0.75)
    ((name, reason),) = sk.sparsify(model, plan=sk.Unmeasured()).dense
    assert name == "blocks.0.0"
    assert "weight holds 1 NaN or infinite values, the first in row 3, column 5" in reason


def test_sparsifying_changes_no_output_beyond_rounding_and_densifying_gives_the_same_outputs():
    w = weight(64, 96)
    model, x = Model(layer(w, torch.randn(64))), torch.randn(7, 96)
    before = model(x)
    sk.sparsify(model, plan=sk.Unmeasured())
    swapped = model(x)
    torch.testing.assert_close(swapped, before, rtol=1e-5, atol=1e-5)
    sk.densify(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("format", [Bitmap], ids=lambda format: format.name)
def test_a_nan_input_at_a_pruned_weight_reaches_the_output_as_in_the_dense_product(format):
    """0 x NaN is NaN in a dense product; a kernel that skipped zeros would hide it."""
    linear = layer(torch.eye(16, 32))
    sparse = sk.SparseLinear.from_linear(linear, format)
    for bad in (torch.nan, torch.inf):
        x = torch.zeros(2, 32)
        x[0, 20] = bad
        assert linear(x)[0].isnan().all()
        assert sparse(x)[0].isnan().all()
        assert not sparse(x)[1].isnan().any()
