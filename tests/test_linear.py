"""SparseLinear: the same outputs, the same bits back, and a model that goes on working with it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekern as sk
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import LINEAR_KERNELS, compiled
from sparsekern.ops.kernel import Kernel
from sparsekern.pattern import NM

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
FORMATS = pytest.mark.parametrize("format", [Bitmap, SemiStructured], ids=lambda format: format.name)
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def pruned_linear(out_features=37, in_features=100, dtype=torch.float32, bias=True):
    """A Linear that any format can hold."""
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias).to(dtype)
    weight = linear.weight.data
    weight.mul_(NM(2, 4).mask(weight.abs().float()))
    return linear.requires_grad_(False)


@pytest.fixture
def model():
    """A pruned Llama whose output embedding is its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    sk.prune(model, sk.Magnitude(), "2:4")
    return model


@FORMATS
@DTYPES
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_equal_the_dense_layer_within_rounding(format, dtype, bias):
    linear = pruned_linear(dtype=dtype, bias=bias)
    sparse = sk.SparseLinear.from_linear(linear, format)
    for shape in ((100,), (1, 100), (2, 3, 100), (0, 100), (33, 100)):
        x = torch.randn(shape, dtype=dtype)
        y, expected = sparse(x), nn.functional.linear(x.double(), linear.weight.double())
        expected = expected + (linear.bias.double() if bias else 0)
        assert y.shape == expected.shape
        assert y.dtype == dtype
        assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@FORMATS
@DTYPES
def test_weight_gives_back_the_same_bits(format, dtype):
    linear = pruned_linear(dtype=dtype)
    sparse = sk.SparseLinear.from_linear(linear, format)
    assert torch.equal(sparse.weight, linear.weight)
    assert not torch.signbit(sparse.weight[sparse.weight == 0]).any()
    sparse.packed.validate()


def test_no_dense_copy_stays():
    linear = pruned_linear(256, 256, torch.bfloat16, bias=False)
    sparse = sk.SparseLinear.from_linear(linear, Bitmap)
    held = sum(buffer.nbytes for buffer in sparse.buffers())
    assert held == sparse.nbytes < 0.6 * linear.weight.nbytes
    assert not list(sparse.parameters())


@FORMATS
def test_a_memory_format_for_images_leaves_a_layer_as_it_is(format):
    """Some operands have four dimensions; in another order the kernels would read something else."""
    linear = pruned_linear(dtype=torch.bfloat16)
    x = torch.randn(3, linear.in_features).bfloat16()
    for kernel in LINEAR_KERNELS[format]:
        packed = sk.SparseLinear.from_linear(linear, format).packed
        if kernel.refuses(packed) is not None:
            continue
        sparse = sk.SparseLinear(packed, linear.bias, kernel)
        before = sparse(x)
        sparse.to(memory_format=torch.channels_last)
        assert all(buffer.is_contiguous() for buffer in sparse.buffers())
        assert torch.equal(sparse(x), before)


@FORMATS
def test_the_state_dict_is_that_of_the_dense_layer(format):
    linear = pruned_linear()
    sparse = sk.SparseLinear.from_linear(linear, format)
    assert set(sparse.state_dict()) == {"weight", "bias"}
    back = nn.Linear(100, 37)
    back.load_state_dict(sparse.state_dict())
    assert torch.equal(back.weight, linear.weight)
    assert torch.equal(back.bias, linear.bias)


@FORMATS
def test_a_dense_state_dict_is_packed_on_load(format):
    sparse = sk.SparseLinear.from_linear(pruned_linear(), format)
    other = pruned_linear()
    other.weight.mul_(2)
    sparse.load_state_dict(other.state_dict())
    assert torch.equal(sparse.weight, other.weight)
    with pytest.raises(RuntimeError, match=r"weight: expected \[37, 100\], got \[100, 37\]"):
        sparse.load_state_dict({"weight": other.weight.T, "bias": other.bias})
    with pytest.raises(RuntimeError, match="Missing key"):
        sparse.load_state_dict({"bias": other.bias})


@FORMATS
def test_a_cast_repacks_for_a_kernel_of_the_new_dtype(format):
    linear = pruned_linear()
    sparse = sk.SparseLinear.from_linear(linear, format).to(torch.bfloat16)
    assert torch.equal(sparse.weight, linear.weight.bfloat16())
    x = torch.randn(3, 100, dtype=torch.bfloat16)
    torch.testing.assert_close(sparse(x), linear.bfloat16()(x), rtol=2e-2, atol=2e-2)


@FORMATS
def test_a_copy_is_independent(format):
    sparse = sk.SparseLinear.from_linear(pruned_linear(), format)
    other = copy.deepcopy(sparse)
    other.load_state_dict({"weight": torch.zeros(37, 100), "bias": torch.zeros(37)})
    assert sparse.weight.any()
    assert not other.weight.any()


@FORMATS
def test_it_works_under_inference_mode_and_compile(format):
    linear = pruned_linear()
    sparse = sk.SparseLinear.from_linear(linear, format)
    x = torch.randn(5, 100)
    compiled = torch.compile(sparse, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), linear(x), rtol=1e-4, atol=1e-5)


def test_a_weight_that_no_kernel_takes_is_refused_with_every_reason(monkeypatch):
    kernels = (Kernel("first", None, lambda packed: "too wide"), Kernel("second", None, lambda packed: "too odd"))
    monkeypatch.setitem(LINEAR_KERNELS, Bitmap, kernels)
    with pytest.raises(ValueError, match="no kernel accepts these arguments\n  first: too wide\n  second: too odd"):
        sk.SparseLinear.from_linear(pruned_linear(), Bitmap)


def test_sparsify_swaps_the_blocks_and_generate_says_the_same(model):
    ids = torch.randint(0, 61, (1, 5))
    with torch.no_grad():
        logits = model(ids).logits
    said = model.generate(ids, max_new_tokens=12, do_sample=False)
    report = sk.sparsify(model, plan=sk.Unmeasured())
    assert len(report.swapped) == 14
    assert report.dense == [("lm_head", "skipped by name")]
    assert isinstance(model.model.layers[0].mlp.down_proj, sk.SparseLinear)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), said)


def test_a_swapped_model_is_one_graph(model):
    sk.sparsify(model, plan=sk.Unmeasured())
    ids = torch.randint(0, 61, (1, 5))
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits
        # aot_eager traces as inductor does, and leaves out what takes long
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_layer_in_two_places_stays_one_layer():
    linear = pruned_linear(100, 100)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    report = sk.sparsify(model, plan=sk.Unmeasured())
    assert isinstance(model[0], sk.SparseLinear)
    assert model[0] is model[2]
    assert len(report.swapped) == 2
    assert report.packed_bytes == model[0].nbytes
    sk.densify(model)
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]


def test_a_head_is_left_dense_whatever_holds_it():
    model = nn.ModuleDict({"language_model": nn.ModuleDict({"lm_head": pruned_linear(), "up": pruned_linear()})})
    report = sk.sparsify(model, plan=sk.Unmeasured())
    assert report.dense == [("language_model.lm_head", "skipped by name")]
    assert [row["name"] for row in report.swapped] == ["language_model.up"]


def test_a_weight_that_lies_in_anothers_memory_is_tied():
    model = nn.Sequential(nn.Embedding(64, 100), pruned_linear(32, 100))
    model[1].weight = nn.Parameter(model[0].weight.detach()[32:])
    assert sk.sparsify(model, plan=sk.Unmeasured()).dense == [("1", "its weight is tied")]


def test_a_layer_with_a_hook_stays_dense():
    model = nn.Sequential(pruned_linear())
    model[0].register_forward_hook(lambda module, args, output: output * 0)
    assert "forward hooks" in dict(sk.sparsify(model, plan=sk.Unmeasured()).dense)["0"]


def test_a_24_weight_is_served_by_a_compiled_kernel_and_stays_24():
    model = nn.Sequential(pruned_linear())
    (row,) = sk.sparsify(model, plan=sk.Unmeasured()).swapped
    if row["kernel"] == "reference":
        pytest.skip(f"no compiled kernel: {compiled.why_not('cpu')}")
    assert (row["format"], row["kernel"]) == ("2:4", "cpu_bitmap")


def test_what_packing_would_make_larger_stays_dense():
    model = nn.Sequential(nn.Linear(64, 64))
    reason = dict(sk.sparsify(model, plan=sk.Unmeasured()).dense)["0"]
    assert "bitmap: packed it would take 17,416 bytes, dense 16,384" in reason


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_pickled_layer_comes_back(format, dtype):
    sparse = sk.SparseLinear.from_linear(pruned_linear(dtype=dtype), format)
    assert torch.equal(pickle.loads(pickle.dumps(sparse)).weight, sparse.weight)


@pytest.mark.parametrize("size", [1e-39, 3e38], ids=["subnormal", "overflowing"])
@DTYPES
def test_weights_at_the_ends_of_the_range_are_no_kernel_fault(size, dtype):
    linear = pruned_linear(64, 64, dtype, bias=False)
    linear.weight.data.copy_(linear.weight.sign() * size)
    sk.sparsify(nn.Sequential(linear))


def test_one_layer_alone_or_no_tokens_are_refused(model):
    with pytest.raises(ValueError, match="model is one nn.Linear"):
        sk.sparsify(pruned_linear())
    with pytest.raises(ValueError, match="model is one SparseLinear"):
        sk.densify(sk.SparseLinear.from_linear(pruned_linear()))
    with pytest.raises(ValueError, match=r"tokens must be one or more positive numbers, got \[\]"):
        sk.sparsify(model, tokens=())


def test_densify_gives_back_the_same_bits(model):
    before = copy.deepcopy(model)
    sk.sparsify(model, plan=sk.Unmeasured())
    sk.densify(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
        assert not torch.signbit(model.state_dict()[name][value == 0]).any()


def test_a_swapped_model_saves_what_plain_transformers_loads(model, tmp_path):
    weights = copy.deepcopy(model.state_dict())
    sk.sparsify(model, plan=sk.Unmeasured())
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_tied_weights_are_never_swapped(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    report = sk.sparsify(model, plan=sk.Unmeasured(), skip=())
    assert report.dense == [("lm_head", "its weight is tied")]


def test_a_dense_weight_stays_dense_and_the_report_says_why(model):
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    report = sk.sparsify(model)
    reason = dict(report.dense)["model.layers.0.mlp.up_proj"]
    assert "2:4: not 2:4: row 0, columns 0..3 hold 4 nonzeros" in reason
    assert "bitmap: " in reason
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert reason in str(report)


def test_every_layer_is_accounted_for_whatever_wins(model):
    report = sk.sparsify(model, tokens=(1, 4))
    assert len(report.swapped) + len(report.dense) == 15
    assert report.to_json()["dense_bytes"] == sum(
        model.get_submodule(row["name"]).weight.nbytes for row in report.swapped
    )


def test_a_missing_compiled_module_is_warned_of_with_the_reason(model, monkeypatch):
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no C++ compiler was found")
    with pytest.warns(UserWarning, match="the reference ops serve on a CPU: not built: no C\\+\\+ compiler was found"):
        sk.sparsify(model, plan=sk.Unmeasured())


def test_a_meta_weight_is_refused_with_its_name_before_anything_is_swapped(model):
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: weight is on the meta device"):
        sk.sparsify(model, plan=sk.Unmeasured())
    assert not [module for module in model.modules() if isinstance(module, sk.SparseLinear)]


def test_a_weight_that_happens_to_be_2_4_takes_the_smaller_format(tmp_path):
    """One weight of every hundred is 2:4 as well, where half of the places would be stored."""
    linear = nn.Linear(100, 64, bias=False)
    linear.weight.data[:, torch.arange(100) % 100 != 7] = 0
    model = nn.Sequential(linear)
    assert sk.save(model, tmp_path / "saved").packed["0"]["format"] == "bitmap"
    assert sk.sparsify(model, plan=sk.Unmeasured()).swapped[0]["format"] == "bitmap"
