"""permute(): the outputs stay, N:M loses less, and where channels are told apart nothing is touched."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import hf
from sparsekern.calibrate import Walk
from sparsekern.channel_sites import find
from sparsekern.stats import InputNorm
from tests import tiny_models

# layers whose inputs can be reordered, of one block or of an encoder's and a decoder's
SITES = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"), {"down_proj", "o_proj"}),
    **dict.fromkeys(("phi3", "deepseek_v3", "falcon_h1"), {"down_proj", "o_proj"}),
    **dict.fromkeys(("phi", "vit"), {"fc2", "dense"}),
    "vit": {"fc2", "o_proj"},
    **dict.fromkeys(("opt", "whisper"), {"fc2", "out_proj"}),
    "gpt2": {"c_proj"},
    "gpt_neox": {"dense_4h_to_h", "dense"},
    "bert": {"dense"},
    "albert": {"ffn_output", "dense"},
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "granite_moe", "gpt_oss"), {"o_proj"}),
    "llama4": {"down_proj", "o_proj"},
    "t5": {"wo", "o"},
    "gemma3n": {"down_proj", "o_proj"},
    **dict.fromkeys(("mamba2", "jetmoe"), set()),
}
# before transformers 5.17
OLDER_NAMES = {"vit": {"dense"}}


pytestmark = pytest.mark.usefixtures("one_thread")


def outputs(name, model):
    """What the model puts out on all batches."""
    with torch.no_grad():
        put_out = []
        for batch in tiny_models.batches(name):
            output = model(**batch) if isinstance(batch, dict) else model(batch)
            put_out.append(output.logits)
        return put_out


def saliency_kept(model, batches, pattern):
    """By layer, the part of Wanda's squared saliency that the mask keeps."""
    parts = {}
    for name, layer, stats in Walk(model, batches, InputNorm):
        saliency = hf.weight(layer).square() * stats.norm.square()
        parts[name] = float(saliency[pattern.mask(saliency)].sum() / saliency.sum())
    return parts


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_the_outputs_stay_and_every_site_that_can_be_is_in_use(name):
    if why := tiny_models.why_two_answers(name):
        pytest.skip(f"{name}: {why}")
    model = tiny_models.make(name)
    sites = SITES[name]
    if not sites <= {layer.rpartition(".")[2] for layer, _ in hf.layers(model)}:
        sites = OLDER_NAMES[name]
    # biases and norms start as zeros and ones, which every order leaves as they are
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    before, original = outputs(name, model), copy.deepcopy(model.state_dict())
    report = sk.permute(model, "2:4", tiny_models.batches(name))
    for now, was in zip(outputs(name, model), before, strict=True):
        torch.testing.assert_close(now, was, rtol=1e-3, atol=1e-4)
    assert report.difference < 1e-4
    kept = [site for site in report.sites if site.kept]
    assert {site.layer.rpartition(".")[2] for site in kept} == sites
    # each block has them
    assert len(kept) >= len(sites) * (len(hf.blocks(model)) - 1)
    changed = {
        key.rpartition(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, original[key])
    }
    assert changed == {layer for site in kept for layer in (site.layer, *site.before)}


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox", "opt", "bert"])
def test_the_mask_keeps_what_the_report_says(name):
    """The walk and the mask of the permuted model know nothing of the search."""
    model, batches, pattern = tiny_models.make(name), tiny_models.batches(name), sk.NM(2, 4)
    before = saliency_kept(model, batches, pattern)
    report = sk.permute(model, pattern, batches)
    after = saliency_kept(model, batches, pattern)
    for site in report.sites:
        assert before[site.layer] == pytest.approx(site.retained, rel=1e-4)
        assert after[site.layer] == pytest.approx(site.permuted, rel=1e-4)
        assert site.permuted > site.retained or not site.kept
    assert sum(after.values()) > sum(before.values())


def test_query_heads_that_share_a_key_and_value_head_share_the_order():
    model = tiny_models.make("llama")
    before = copy.deepcopy(model)
    sk.permute(model, "2:4", tiny_models.batches("llama"))
    columns = before.model.layers[0].self_attn.o_proj.weight.T
    moved = (
        (model.model.layers[0].self_attn.o_proj.weight.T[:, None] == columns).all(dim=2).nonzero()[:, 1].view(2, 2, 8)
    )
    own = torch.arange(32).view(2, 2, 8)
    assert torch.equal(moved.sort(dim=2).values, own)
    assert torch.equal(moved[:, 0] - own[:, 0, :1], moved[:, 1] - own[:, 1, :1])
    rows = before.model.layers[0].self_attn.v_proj.weight
    of_values = (model.model.layers[0].self_attn.v_proj.weight[:, None] == rows).all(dim=2).nonzero()[:, 1].view(2, 8)
    assert torch.equal(of_values - 8 * torch.arange(2)[:, None], moved[:, 0] - own[:, 0, :1])


class _ScaledMLP(nn.Module):
    """A perceptron that treats each of its channels in its own way, which no name and no shape shows."""

    def __init__(self, mlp, scale):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )
        self.scale = scale

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * self.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_site_whose_channels_are_told_apart_is_found_out_and_left_alone(dtype):
    model, batches = tiny_models.make("llama").to(dtype), tiny_models.batches("llama")
    planted = model.model.layers[1]
    planted.mlp = _ScaledMLP(planted.mlp, torch.linspace(0.2, 2, 48, dtype=dtype))
    before, weights = outputs("llama", model), copy.deepcopy(planted.mlp.state_dict())
    report = sk.permute(model, "2:4", batches)
    left = {site.layer: site.why for site in report.sites if not site.kept}
    assert "another order changes what is put out" in left["model.layers.1.mlp.down_proj"]
    assert all(torch.equal(value, weights[key]) for key, value in planted.mlp.state_dict().items())
    assert {f"model.layers.{block}.mlp.down_proj" for block in (0, 2)} <= {s.layer for s in report.sites if s.kept}
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    for now, was in zip(outputs("llama", model), before, strict=True):
        torch.testing.assert_close(now, was, **close)
    assert "model.layers.1.mlp.down_proj: stays in its order" in str(report)


def test_values_that_another_block_reads_keep_their_order():
    """gemma3n's last block attends to what an earlier one has left behind: its o_proj would need the same order."""
    if why := tiny_models.why_two_answers("gemma3n"):
        pytest.skip(f"gemma3n: {why}")
    report = sk.permute(tiny_models.make("gemma3n"), "2:4", tiny_models.batches("gemma3n"))
    assert [site.layer for site in report.sites if "tells their channels apart" in (site.why or "")]


def test_a_head_that_groups_do_not_divide_is_named():
    model = tiny_models.llama(num_attention_heads=16, num_key_value_heads=4, head_dim=6)
    report = sk.permute(model, "2:4", tiny_models.batches("llama"))
    left = {site.layer: site.why for site in report.sites if not site.kept}
    assert left["model.layers.0.self_attn.o_proj"] == "a head has 6 channels, not a multiple of 4"


def test_permuting_a_pruned_model_changes_nothing():
    model, batches = tiny_models.make("qwen2"), tiny_models.batches("qwen2")
    sk.prune(model, sk.Wanda(), "2:4", batches)
    before = copy.deepcopy(model.state_dict())
    report = sk.permute(model, "2:4", batches)
    assert not [site for site in report.sites if site.kept]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_model():
    models = [tiny_models.make("llama") for _ in range(2)]
    reports = [sk.permute(model, "2:4", tiny_models.batches("llama"), seed=5) for model in models]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert [site.permuted for site in reports[0].sites] == [site.permuted for site in reports[1].sites]
    assert reports[0].to_json()["sites"][0]["layer"] == reports[0].sites[0].layer


def test_an_unstructured_pattern_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="helps N:M patterns only: 50% keeps weights wherever they stand"):
        sk.permute(tiny_models.make("llama"), 0.5, tiny_models.batches("llama"))


def test_undoing_an_order_gives_back_the_same_bits():
    model = tiny_models.make("phi3")
    before, layers = copy.deepcopy(model.state_dict()), dict(hf.layers(model))
    for site in find(model)[0].values():
        order = torch.rand(site.columns.shape[::2]).argsort(1)
        site.reorder(layers, order)
        assert not torch.equal(layers[site.consumer].weight, before[f"{site.consumer}.weight"])
        site.reorder(layers, order.argsort(1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
