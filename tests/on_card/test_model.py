"""A whole model: pruned, swapped, planned, generating, saved and loaded, where the card is."""

import pytest
import torch

import sparsekern as sk
from sparsekern import ops
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.linear import SparseLinear
from sparsekern.plan import Plan, Unmeasured, check_linear
from tests.on_card.subjects import input_of, weight_of
from tests.tiny_models import llama


@pytest.fixture
def model(place):
    """Its weights pruned to 2:4."""
    model = llama(hidden_size=64, intermediate_size=160).to(place).eval()
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach()
            module.weight.data = weight.where(sk.NM(2, 4).mask(weight.abs()), 0.0)
    return model


@torch.no_grad()
def test_a_swapped_model_has_the_dense_models_logits_and_comes_back(model, place):
    ids = torch.arange(12, device=place)[None]
    dense, weights = model(ids).logits, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = sk.sparsify(model, plan=Unmeasured())
    assert report.swapped
    torch.testing.assert_close(model(ids).logits, dense, rtol=1e-3, atol=1e-3)
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert generated.shape[1] > 12
    sk.densify(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_what_is_saved_from_a_card_loads_everywhere(model, place, tmp_path):
    ids = torch.arange(12, device=place)[None]
    dense = model(ids).logits
    sk.sparsify(model, plan=Unmeasured())
    sk.save(model, tmp_path / "out")
    loaded = sk.load(tmp_path / "out")
    torch.testing.assert_close(loaded(ids.cpu()).logits, dense.cpu(), rtol=1e-3, atol=1e-3)


def test_a_plan_measures_a_layer_on_the_card_it_is_on_and_can_be_kept(place, tmp_path):
    weight = weight_of((256, 256), SemiStructured, torch.bfloat16, place)
    plan = Plan(seconds=0.05, arena=1 << 20)
    decision = plan.decide((ops.pack(weight, SemiStructured), ops.pack(weight, Bitmap)), weight, tokens=(1, 8))
    (kind,) = plan.decisions
    assert kind.device == ("cpu" if place.type == "cpu" else torch.cuda.get_device_name(place))
    assert any(name.startswith("2:4") for name in kind.candidates)
    assert list(decision.times) == [1, 8]
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.decisions == plan.decisions


@pytest.mark.parametrize("tokens", [1, 64, 200])
def test_torchs_own_product_is_right_by_the_plans_measure(place, tokens):
    """On a card cuBLAS splits long sums; a kernel that expands for it must not be called wrong for that."""
    x, weight = input_of(tokens, 4096, torch.bfloat16, place), input_of(96, 4096, torch.bfloat16, place, seed=1)
    check_linear(torch.nn.functional.linear(x, weight), x, weight, None, "torch")


def test_a_layer_moves_to_a_card_and_back(card):
    layer = SparseLinear(ops.pack(weight_of((48, 96), SemiStructured, torch.bfloat16, "cpu"), SemiStructured))
    weight = layer.weight.clone()
    layer.to(card)
    assert layer.device == card
    assert torch.equal(layer.weight.cpu(), weight)
    layer.cpu()
    assert torch.equal(layer.weight, weight)
