"""Experts in 3-D parameters are layers: which side their inputs are, which tokens they count, from whom they borrow."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import experts, hf
from sparsekern.calibrate import Walk
from sparsekern.experts import UnreadableExpertsError, orientation
from sparsekern.stats import Gram, InputNorm
from tests import tiny_models
from tests.plain_statistics import EveryToken, plain_statistics

pytestmark = pytest.mark.usefixtures("one_thread")

IN_3D = ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "granite_moe", "jetmoe", "gpt_oss", "llama4"]


class Experts(nn.Module):
    """Square experts, so that no shape tells their inputs from their outputs."""

    def __init__(self, multiply):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))
        self.multiply = multiply

    def forward(self, hidden_states, index, weights):
        out = torch.zeros_like(hidden_states)
        for expert in range(3):
            _, tokens = torch.where((index == expert).T)
            if len(tokens):
                out[tokens] += self.multiply(hidden_states[tokens], self.weight, expert)
        return out


@pytest.mark.parametrize(
    ("multiply", "transposed"),
    [
        (lambda x, w, e: nn.functional.linear(x, w[e]), False),
        (lambda x, w, e: x @ w[e].T, False),
        (lambda x, w, e: torch.mm(x, w.transpose(1, 2)[e]), False),
        (lambda x, w, e: x @ w[e], True),
        (lambda x, w, e: torch.addmm(x, x, w[e]), True),
        (lambda x, w, e: nn.functional.linear(x, w[e].mT), True),
        (lambda x, w, e: torch.bmm(x[None], w[e : e + 1])[0], True),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_forward_tells_which_side_of_a_square_expert_its_inputs_are(multiply, transposed, device):
    assert orientation(Experts(multiply).to(device)) == {"weight": transposed}


class SharedExperts(nn.Module):
    """Every token goes to every expert, all at once."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, hidden_states, gammas):
        x = hidden_states.expand(3, -1, -1)
        return torch.bmm(torch.bmm(x, self.up.mT) * gammas.T[:, :, None], self.down).sum(0)


def test_every_token_may_go_to_every_expert():
    module, x, got = SharedExperts(), torch.randn(5, 4), {}
    assert orientation(module) == {"up": False, "down": True}
    layers = {f"{n}.{i}": experts.Expert(module, n, i, n == "down") for n in ("up", "down") for i in range(3)}
    with experts.RoutedTokens(layers, lambda name, *what: got.update({name: what})):
        module(x, torch.ones(5, 3))
    assert got.keys() == layers.keys()
    for name, (tokens, rows, total) in got.items():
        inner = x @ module.up[int(name[-1])].T
        torch.testing.assert_close(tokens, x if name.startswith("up") else inner)
        assert (rows.tolist(), total) == ([0, 1, 2, 3, 4], 5)


@pytest.mark.parametrize(
    ("multiply", "reason"),
    [
        (lambda x, w, e: x @ w[e].double(), "the experts go through torch.Tensor.double"),
        (lambda x, w, e: torch.einsum("ti,oi->to", x, w[e]), "the experts go through torch.functional.einsum"),
        (lambda x, w, e: (w[e] @ x.T).T, "the experts go through torch.Tensor.matmul"),
        (lambda x, w, e: x @ w[torch.tensor([e])][0], "the experts go through torch.Tensor.__getitem__"),
        (lambda x, w, e: x[:, :2] @ w[e, :2], "not multiplied by one whole matrix after the other"),
        (lambda x, w, e: x, "Experts does not show how it multiplies by its experts"),
    ],
)
def test_experts_whose_inputs_cannot_be_known_stay_dense_with_the_reason(multiply, reason):
    module = Experts(multiply)
    with pytest.raises(UnreadableExpertsError, match=reason):
        orientation(module)
    block = nn.Module()
    block.good, block.experts = nn.Linear(4, 4), module
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    assert [name for name, _ in hf.layers(model)] == ["blocks.0.good"]
    [(name, why)] = hf.skipped(model)
    assert name == "blocks.0.experts"
    assert why.startswith("experts in one 3-D parameter: ")
    assert reason in why


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_experts_weight_is_a_view_as_outputs_times_inputs(name):
    model = tiny_models.make(name)
    layers = dict(hf.layers(model))
    before = copy.deepcopy(model.state_dict())
    layer = layers["model.layers.1.mlp.experts.gate_up_proj.2"]
    assert hf.weight(layer).shape == ((32, 32) if name == "gpt_oss" else (96, 32))
    hf.weight(layer)[5, 7] = 123.0
    now = model.model.layers[1].mlp.experts.gate_up_proj
    assert now[2, 7, 5] == 123 if name == "gpt_oss" else now[2, 5, 7] == 123
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == [
        "model.layers.1.mlp.experts.gate_up_proj"
    ]


def test_finding_the_layers_leaves_no_trace():
    model, batch = tiny_models.make("mixtral"), tiny_models.batches("mixtral")[0]
    called = []
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: called.append(1))
    want = model(batch).logits
    hf.layers(model)
    assert called == [1]
    assert torch.equal(model(batch).logits, want)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm", "eager"])
def test_the_fused_way_of_a_model_is_its_own_again_between_two_layers(way):
    model, batches = tiny_models.make("mixtral"), tiny_models.batches("mixtral")
    model.set_experts_implementation(way)
    walk = Walk(model, batches, InputNorm)
    for _ in walk:
        assert model.config._experts_implementation == way
    assert walk.how == "replay"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_padding_is_not_routed(name, monkeypatch):
    """Rows with padding give the statistics of the same rows without, one by one."""
    monkeypatch.setattr(experts, "ENOUGH", 0)
    model, rows = tiny_models.make(name), [batch[:1] for batch in tiny_models.batches(name)]
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows])
    want = plain_statistics(model, rows, hf.layers(model), EveryToken)
    for layer_name, _, stats in Walk(model, [{"input_ids": ids, "attention_mask": (ids != 0).long()}], EveryToken):
        assert stats.tokens == want[layer_name].tokens, layer_name
        torch.testing.assert_close(stats.norm, want[layer_name].norm, rtol=1e-4, atol=1e-5)


def test_tokens_are_not_guessed_where_a_forward_does_not_show_which_are_padding():
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0

    class Shuffles(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 32, 32))

        def forward(self, hidden_states, index, weights):
            x, half = hidden_states.flip(0), len(hidden_states) // 2
            return torch.cat([x[:half] @ self.weight[0], x[half:] @ self.weight[1]])

    model = tiny_models.make("mixtral")
    model.model.layers[1].mlp.experts = Shuffles()
    assert "model.layers.1.mlp.experts.0" in dict(hf.layers(model))
    match = r"model\.layers\.1\.mlp\.experts\.0: calibration batch 0: cannot tell which tokens .* are padding"
    with pytest.raises(ValueError, match=match):
        list(Walk(model, [{"input_ids": ids, "attention_mask": mask}], InputNorm))
    list(Walk(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], InputNorm))


def test_nan_names_the_expert():
    model = tiny_models.make("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[2] = torch.nan
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts\.down_proj\.2: calibration batch 0: .*NaN"):
        list(Walk(model, tiny_models.batches("mixtral"), InputNorm))


@pytest.mark.parametrize("name", IN_3D)
@pytest.mark.parametrize("pattern", ["2:4", 0.6], ids=str)
def test_every_expert_is_pruned_to_its_exact_count_and_its_router_is_not(name, pattern):
    model, batches = tiny_models.make(name), tiny_models.batches(name)
    before = copy.deepcopy(model)
    report = sk.prune(model, sk.SparseGPT(block_size=16), pattern, batches)
    rows, layers = {row.name: row for row in report.layers}, dict(hf.layers(model))
    assert rows.keys() == layers.keys()
    for layer_name, layer in layers.items():
        weight, row = hf.weight(layer), rows[layer_name]
        assert (weight == 0).sum() == round(sk.as_pattern(pattern).sparsity * weight.numel())
        assert pattern != "2:4" or ((weight.unflatten(1, (-1, 4)) != 0).sum(dim=2) == 2).all()
        assert 0 < row.error < 1
    routers = [n for n, p in model.named_parameters() if p.dim() == 2 and ("router" in n or ".gate." in n)]
    assert routers
    assert all(torch.equal(model.get_parameter(n), before.get_parameter(n)) for n in routers)
    assert f"{sum(row.fallback is not None for row in report.layers)} experts fell back" in str(report)


def test_shared_experts_are_layers_as_before():
    report = sk.prune(tiny_models.make("deepseek_v3"), sk.Wanda(), 0.5, tiny_models.batches("deepseek_v3"))
    rows = {row.name: row for row in report.layers}
    assert rows["model.layers.1.mlp.shared_experts.down_proj"].fallback is None


def test_an_expert_without_tokens_is_pruned_with_all_experts_statistics_and_listed():
    model, batches = tiny_models.make("mixtral"), tiny_models.batches("mixtral")
    router = model.model.layers[0].mlp.gate
    router.register_forward_hook(lambda _, args, out: route_past(3, args[0], router))
    report = sk.prune(model, sk.SparseGPT(block_size=16), "2:4", batches)
    rows = {row.name: row for row in report.layers}
    row = rows["model.layers.0.mlp.experts.gate_up_proj.3"]
    assert row.fallback == "0 tokens of its own, 2 of all 4 experts"
    assert row.sparsity == 0.5
    assert not any("experts" in name for name, _ in report.skipped)
    assert rows["model.layers.0.self_attn.q_proj"].fallback is None


def test_obd_leaves_an_expert_without_tokens_dense_and_lists_it():
    """Its gradient is zero: there is nothing to rank its weights by."""
    model, batches = tiny_models.make("mixtral"), tiny_models.batches("mixtral")
    router = model.model.layers[0].mlp.gate
    router.register_forward_hook(lambda _, args, out: route_past(3, args[0], router))
    report = sk.prune(model, sk.OBD(), 0.5, batches)
    dense = {f"model.layers.0.mlp.experts.{name}.3" for name in ("gate_up_proj", "down_proj")}
    assert {name for name, reason in report.skipped if reason.startswith("never called")} == dense
    assert {row.name for row in report.layers} == dict(hf.layers(model)).keys() - dense
    assert {row.sparsity for row in report.layers} == {0.5}


def route_past(expert, x, router):
    """What a router of transformers returns, with `expert` never chosen."""
    logits = nn.functional.linear(x.reshape(-1, x.shape[-1]), router.weight)
    logits[:, expert] = -torch.inf
    weights, chosen = logits.softmax(-1).topk(2, dim=-1)
    return logits, weights / weights.sum(-1, keepdim=True), chosen


def gram(x):
    stats = Gram(x.shape[1])
    stats.add(x)
    return stats


def test_an_expert_with_few_tokens_borrows_from_those_beside_it():
    """32 inputs: two tokens' worth of everybody's second moment are counted in below 64 tokens of one's own."""
    module = nn.Module()
    module.up, module.other = nn.Parameter(torch.zeros(3, 8, 32)), nn.Parameter(torch.zeros(1, 8, 32))
    layers = {f"up.{i}": experts.Expert(module, "up", i, False) for i in range(3)}
    layers["other.0"] = experts.Expert(module, "other", 0, False)
    many, few, apart = torch.randn(80, 32), torch.randn(16, 32), torch.randn(80, 32)
    stats = {"up.0": gram(many), "up.1": gram(few), "other.0": gram(apart)}
    assert experts.borrow(layers, stats, Gram) == {
        "up.1": "14 tokens of its own, 2 of all 3 experts",
        "up.2": "0 tokens of its own, 2 of all 3 experts",
    }
    own, everybody = few[:14].T @ few[:14], (few[:14].T @ few[:14] + many[:70].T @ many[:70]) / 84
    torch.testing.assert_close(stats["up.1"].hessian, (own + 2 * everybody) / 16)
    torch.testing.assert_close(stats["up.2"].hessian, everybody)
    torch.testing.assert_close(stats["up.0"].hessian, many[:70].T @ many[:70] / 70)
    torch.testing.assert_close(stats["other.0"].hessian, apart[:70].T @ apart[:70] / 70)


def test_experts_that_nobody_reaches_have_nobody_to_borrow_from():
    module = nn.Module()
    module.up = nn.Parameter(torch.zeros(2, 8, 32))
    stats = {}
    assert experts.borrow({"up.0": experts.Expert(module, "up", 0, False)}, stats, Gram) == {}
    assert stats == {}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_saved_model_of_experts_loads_with_its_zeros(name, tmp_path):
    model = tiny_models.make(name)
    sk.prune(model, sk.Magnitude(), "2:4")
    hf.save(model, None, tmp_path / "out", {})
    loaded = dict(hf.layers(hf.load(tmp_path / "out")))
    for layer_name, layer in hf.layers(model):
        assert torch.equal(hf.weight(loaded[layer_name]), hf.weight(layer)), layer_name


def test_sparsify_leaves_experts_as_they_are():
    model = tiny_models.make("mixtral")
    sk.prune(model, sk.Magnitude(), "2:4")
    before = copy.deepcopy(model.model.layers[0].mlp.experts.state_dict())
    sk.sparsify(model)
    after = model.model.layers[0].mlp.experts.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
