"""Generation: what is timed is generate, what is compared is checked first, and the bytes are those that are read."""

import json

import pytest
import torch

from sparsekern import shapes
from sparsekern.generation import DENSE, NO_LINEAR, OWN, measure_generation, plot
from sparsekern.hf_generate import generate, random_model
from sparsekern.plan import Unmeasured

TINY = shapes.find("tiny")


def measured(**changes):
    quick = {"values": ("bfloat16",), "prompt": 3, "new_tokens": 4, "seconds": 0, "plan": Unmeasured()}
    return measure_generation(TINY, **quick | changes)


@pytest.mark.parametrize("name", ["tiny", "qwen2.5-0.5b"])
def test_a_random_model_has_the_published_shape_and_every_layer_weights_of_its_own(name):
    shape = shapes.find(name)
    model = random_model(shape, torch.bfloat16, blocks=1)
    for layer in shape.layers:
        (linear,) = (module for path, module in model.named_modules() if path.endswith(layer.name))
        assert linear.weight.shape == (layer.out_features, layer.in_features)
        assert (linear.bias is not None) == layer.bias
        assert 0.015 < linear.weight.float().std() < 0.025
        assert not torch.equal(linear.weight[0], linear.weight[1])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.norm.weight.eq(1).all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_is_greedy_and_says_when_each_token_was_there(cache):
    model = random_model(TINY, torch.float32)
    ids = torch.arange(5)
    with torch.no_grad():
        new, stamps = generate(model, ids, 4, cache)
        for token in new:
            assert model(ids[None], use_cache=False).logits[0, -1].argmax() == token
            ids = torch.cat([ids, token[None]])
    assert len(stamps) == 4
    assert 0 < stamps[0] < stamps[1] < stamps[2] < stamps[3]


def test_every_variant_is_measured_and_its_gains_told_apart():
    seen = []
    found = measured(sparsities=(0.5, 0.75), progress=lambda *at: seen.append(at))
    assert [each.name for each in found.variants] == [DENSE, OWN, "50% bfloat16", "75% bfloat16", NO_LINEAR]
    assert all(each.difference < 0.05 for each in found.variants)
    dense, own, half, quarter, nothing = found.variants
    linear = 2 * (TINY.blocks * TINY.block_weights + TINY.head.weights)
    assert dense.read_bytes == own.read_bytes == linear
    # the output embedding is a copy in own panels
    assert own.bytes - dense.bytes == TINY.head.weights * 2
    assert nothing.read_bytes == 0
    assert linear > half.read_bytes > quarter.read_bytes
    assert 1 < found.ceiling(half) < found.ceiling(quarter) < 4
    assert found.limit(half) == pytest.approx(found.bandwidth.median / half.read_bytes)
    assert all(done <= all for done, all, _ in seen)
    data = json.loads(json.dumps(found.to_json()))
    assert data["variants"][1]["decode_tokens_s"] == pytest.approx(1 / own.decode.median)
    assert "50% bfloat16" in found.caption() or found.table().row_count == 5


def test_the_model_that_is_timed_dense_is_not_touched():
    found = measured(own_head=False, sparsities=(0.5,))
    dense, own, *_ = found.variants
    assert dense.swap == {}
    assert dense.bytes == own.bytes
    assert not found.own_head


def test_a_compiled_model_generates_with_a_static_cache(monkeypatch):
    compile = torch.compile
    # what inductor adds takes a minute
    monkeypatch.setattr(torch, "compile", lambda call: compile(call, backend="eager"))
    found = measured(sparsities=(0.5,), cache="static", compiled=True, blocks=1)
    # whoever compiles the same model next begins anew
    torch._dynamo.reset()
    assert (found.compiled, found.cache, found.blocks) == (True, "static", 1)
    assert "torch.compile, static cache" in found.table().title


def test_logits_that_disagree_are_not_timed(monkeypatch):
    from sparsekern import generation

    monkeypatch.setattr(generation, "logits", lambda model, ids: torch.randn(3, 5, dtype=torch.bfloat16))
    monkeypatch.setattr(generation, "_alternate", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(RuntimeError, match="logits of 3 tokens differ by"):
        measured(sparsities=(0.5,))


def test_a_plot_is_a_png(tmp_path):
    plot(measured(sparsities=(0.5,)), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"sparsities": ()}, "sparsities must be one or more of 0..1"),
        ({"sparsities": (1.0,)}, "sparsities must be one or more of 0..1"),
        ({"new_tokens": 2}, "prompt must be at least 1 token and new_tokens 3, got 3 and 2"),
        ({"cache": "paged"}, "cache must be one of dynamic, static, got 'paged'"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        measured(**choice)


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr("sparsekern.generation.available", lambda: 1 << 30)
    with pytest.raises(
        ValueError, match=r"llama-2-7b in all these variants needs 6\d\.\d GB, 1\.1 are free: give fewer"
    ):
        measure_generation(shapes.find("llama-2-7b"))
