"""prune() over a whole model: exact masks, an untouched rest, and errors that come before any weight changes."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekern as sk
from sparsekern import hf
from sparsekern.methods import METHODS
from sparsekern.stats import Gram
from tests import tiny_models

VOCAB = 61

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def batches():
    return list(torch.randint(0, VOCAB, (6, 2, 24), generator=torch.Generator().manual_seed(1)))


def linears(model):
    return {name: layer for name, layer in model.model.named_modules() if isinstance(layer, nn.Linear)}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("pattern", ["2:4", "4:8", 0.6], ids=str)
def test_every_block_layer_is_pruned_and_nothing_else_changes(model, batches, method, pattern):
    before = copy.deepcopy(model)
    report = sk.prune(model, method(), pattern, batches)
    for layer in linears(model).values():
        assert (layer.weight == 0).sum() == round(sk.as_pattern(pattern).sparsity * layer.weight.numel())
    assert len(report.layers) == len(linears(model)) == 14
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {f"{layer.name}.weight" for layer in report.layers}
    assert "lm_head" in dict(report.skipped)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_every_architecture_is_pruned_to_exact_counts_and_still_runs(name):
    model = tiny_models.make(name)
    report = sk.prune(model, sk.SparseGPT(block_size=16), 0.5, tiny_models.batches(name))
    layers = dict(hf.layers(model))
    assert {row.name for row in report.layers} | {name for name, _ in report.skipped} >= set(layers)
    for row in report.layers:
        weight = hf.weight(layers[row.name])
        # dead inputs lose their weights as well, and count
        assert (weight == 0).sum() >= round(0.5 * weight.numel()), row.name
        assert row.dead_inputs or (weight == 0).sum() == round(0.5 * weight.numel()), row.name
        assert weight.isfinite().all()


def test_conv1d_is_pruned_along_its_inputs():
    model = tiny_models.make("gpt2")
    sk.prune(model, sk.Wanda(), "2:4", tiny_models.batches("gpt2"))
    layer = dict(hf.layers(model))["transformer.h.0.mlp.c_fc"]
    # transformers keeps it as [in_features, out_features]
    assert ((layer.weight.unflatten(0, (-1, 4)) != 0).sum(dim=1) == 2).all()


def test_the_report_holds_the_errors_of_the_layers_as_they_now_are(model, batches):
    """The first block's inputs do not depend on any pruned weight, so a plain forward tells what the errors must be."""
    before = copy.deepcopy(model)
    report = sk.prune(model, sk.Wanda(), "2:4", batches)
    seen = Gram(32)
    layer = before.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: seen.add(args[0].reshape(-1, 32)))
    with torch.no_grad():
        for batch in batches:
            before(batch, use_cache=False)
    row = next(row for row in report.layers if row.name == "model.layers.0.self_attn.q_proj")
    pruned = model.model.layers[0].self_attn.q_proj.weight
    assert row.error == pytest.approx(seen.error(layer.weight.detach(), pruned.detach()), rel=1e-4)
    assert row.held_out_error == pytest.approx(seen.held_out_error(layer.weight.detach(), pruned.detach()), rel=1e-4)
    assert (row.damping, row.dead_inputs, row.sparsity) == (None, 0, 0.5)


def test_the_report_shows_the_damping_that_was_used(model, batches):
    report = sk.prune(model, sk.SparseGPT(block_size=16, damping=0.02), "2:4", batches)
    assert {(row.damping, row.retries) for row in report.layers} == {(0.02, 0)}


def test_the_report_shows_a_damping_that_had_to_be_raised(model):
    # one token, repeated: a second moment of rank one, that no float32 factorisation takes without damping
    batches = [torch.full((1, 24), 7)]
    report = sk.prune(model, sk.SparseGPT(block_size=16, damping=0.0), "2:4", batches)
    raised = [row for row in report.layers if row.retries]
    assert raised
    assert all(row.damping >= 1e-4 for row in raised)
    assert f"{len(raised)} layers needed more damping" in str(report)
    assert report.calibration == "replay"
    assert report.to_json()["layers"][0]["name"] == report.layers[0].name


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_pruning_twice_changes_nothing(model, batches, method):
    sk.prune(model, method(), 0.5, batches)
    once = copy.deepcopy(model.state_dict())
    sk.prune(model, method(), 0.5, batches)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


def test_magnitude_needs_no_calibration(model):
    report = sk.prune(model, sk.Magnitude(), 0.5)
    assert report.sparsity == 0.5
    assert report.held_out_error is None


def test_wanda_prunes_the_same_weights_with_and_without_errors(model, batches):
    other = copy.deepcopy(model)
    sk.prune(model, sk.Wanda(), "2:4", batches)
    report = sk.prune(other, sk.Wanda(), "2:4", batches, errors=False)
    assert report.held_out_error is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_bf16_models_hold_exact_zeros_and_no_negative_ones(model, batches):
    model.bfloat16()
    sk.prune(model, sk.SparseGPT(), "2:4", batches)
    for layer in linears(model).values():
        assert layer.weight.dtype == torch.bfloat16
        assert not torch.signbit(layer.weight[layer.weight == 0]).any()


def test_layers_are_skipped_by_name(model, batches):
    before = copy.deepcopy(model)
    report = sk.prune(model, sk.Wanda(), 0.5, batches, skip=["*.down_proj"])
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before.model.layers[1].mlp.down_proj.weight)
    assert ("model.layers.1.mlp.down_proj", "skipped by name") in report.skipped


def refused(model, match, *args, **kwargs):
    """The call raises, and no weight has changed."""
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=match):
        sk.prune(model, *args, **kwargs)
    same = zip(model.parameters(), before.parameters(), strict=True)
    assert all(a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in same)


def test_a_layer_that_m_does_not_divide_is_named_before_anything_changes(model, batches):
    match = r"model\.layers\.0\.self_attn\.q_proj: pattern 5:7 needs in_features to be a multiple of 7, got 32"
    refused(model, match, sk.Wanda(), "5:7", batches)


@pytest.mark.parametrize(
    "method", [sk.SparseGPT(48), sk.Refine(sk.SparseGPT(48)), sk.GPTQ(first=sk.SparseGPT(48))], ids=str
)
def test_a_group_that_no_block_of_the_method_holds_is_refused_before_anything_changes(model, batches, method):
    refused(model, r"q_proj: block_size 48 is not a multiple of the group of pattern 4:32", method, "4:32", batches)


def test_a_nan_weight_is_named_before_anything_changes(model, batches):
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    refused(model, r"model\.layers\.1\.mlp\.up_proj: weight holds 1 NaN", sk.Wanda(), 0.5, batches)


def test_a_skip_that_names_no_layer_is_refused(model):
    refused(model, r"skip 'nosuch\*' names no layer", sk.Magnitude(), 0.5, skip=["nosuch*"])


def test_one_name_to_skip_needs_no_list(model):
    assert len(sk.prune(model, sk.Magnitude(), 0.5, skip="*.down_proj").layers) == 12


def test_a_repair_that_overflows_the_models_dtype_is_named_and_not_written(model, batches):
    class Huge:
        needs = Gram

        def prune(self, weight, stats, pattern):
            return weight.float() * 1e8

    model.half()
    refused(model, r"q_proj: the repaired weight overflows torch\.float16", Huge(), 0.5, batches)


def test_kept_weights_of_a_float64_model_keep_their_bits(model):
    before = copy.deepcopy(model.double())
    sk.prune(model, sk.Magnitude(), 0.5)
    for name, layer in linears(model).items():
        kept = layer.weight != 0
        assert torch.equal(layer.weight[kept], linears(before)[name].weight[kept])


def test_a_meta_weight_is_named_with_the_remedy(model):
    model.model.layers[1].mlp.up_proj.to("meta")
    refused(model, r"model\.layers\.1\.mlp\.up_proj: .*meta device.*without offloading", sk.Magnitude(), 0.5)


def test_a_method_without_the_calibration_it_needs_is_refused(model):
    refused(model, "Wanda needs calibration batches, got None", sk.Wanda(), 0.5)


def test_no_layer_left_is_refused(model):
    refused(model, "has no layer left to prune: 14 skipped by name", sk.Magnitude(), 0.5, skip=["*"])


def test_a_pattern_for_each_layer_leaves_the_others_dense(model, batches):
    wanted = {"model.layers.0.mlp.up_proj": "2:4", "model.layers.1.self_attn.o_proj": 0.75}
    report = sk.prune(model, sk.Wanda(), wanted, batches)
    assert {row.name: row.sparsity for row in report.layers} == {
        "model.layers.0.mlp.up_proj": 0.5, "model.layers.1.self_attn.o_proj": 0.75,
    }  # fmt: skip
    assert ("model.layers.0.mlp.down_proj", "no pattern names it") in report.skipped
    assert (model.model.layers[0].mlp.down_proj.weight != 0).all()
    assert report.pattern == "2:4 and 75%"


def test_a_pattern_for_a_layer_that_is_not_there_is_refused(model):
    with pytest.raises(ValueError, match=r"pattern names 'model.layers.7', which is no layer"):
        sk.prune(model, sk.Magnitude(), {"model.layers.7": 0.5})


@pytest.mark.parametrize("method", [sk.Magnitude(), sk.OBD()], ids=repr)
def test_scope_model_prunes_the_lowest_of_all_layers(model, batches, method):
    for index, layer in enumerate(linears(model).values()):
        layer.weight.data.mul_(1 + index)
    sizes = [layer.weight.numel() for layer in linears(model).values()]
    before = {name: layer.weight.data.clone() for name, layer in linears(model).items()}
    report = sk.prune(model, method, sk.Unstructured(0.6, "model"), batches)
    zeros = [int((layer.weight == 0).sum()) for layer in linears(model).values()]
    assert sum(zeros) == round(0.6 * sum(sizes))
    assert len({row.sparsity for row in report.layers}) > 2
    if isinstance(method, sk.Magnitude):
        after = linears(model)
        kept = torch.cat([before[name][layer.weight != 0].abs() for name, layer in after.items()])
        gone = torch.cat([before[name][layer.weight == 0].abs() for name, layer in after.items()])
        assert gone.max() <= kept.min()


def test_scope_model_is_refused_where_layers_depend_on_each_other(model, batches):
    with pytest.raises(ValueError, match='Wanda cannot rank the weights of all layers at once, as scope "model" needs'):
        sk.prune(model, sk.Wanda(), sk.Unstructured(0.5, "model"), batches)


def test_refine_lowers_the_error_of_every_layer_and_keeps_its_mask(model, batches):
    refined = copy.deepcopy(model)
    plain = sk.prune(model, sk.Wanda(), "2:4", batches)
    report = sk.prune(refined, sk.Wanda(), "2:4", batches, refine=10)
    assert report.layers[0].error < plain.layers[0].error
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(first) == 0, refined.get_parameter(first) == 0)
    assert report.method == "Refine(method=Wanda, steps=10)"
