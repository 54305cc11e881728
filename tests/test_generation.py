"""Generation: what is timed is generate, what is compared is checked first, and the bytes are those that are read."""

import json
import re

import pytest
import torch
from torch._dynamo.utils import counters

from sparsekern import shapes
from sparsekern.generation import DENSE, NO_LINEAR, OWN, measure_generation, plot
from sparsekern.hf_generate import compile_forward, generate, generate_logits, random_model
from sparsekern.plan import Unmeasured
from sparsekern.swap import sparsify
from sparsekern.variants import peak, pruned

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
    found = measured(head="torch", sparsities=(0.5,))
    dense, own, *_ = found.variants
    assert dense.swap == {}
    assert dense.bytes == own.bytes
    assert "output embedding: as torch has it" in found.caption()


def compile_by(monkeypatch, backend):
    """What inductor adds takes a minute. Whoever compiles the same model next begins anew."""
    compile = torch.compile
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", lambda call: compile(call, backend=backend))


def test_a_compiled_model_generates_with_a_static_cache_by_two_whole_graphs(monkeypatch):
    compile_by(monkeypatch, "eager")
    found = measured(sparsities=(0.5,), cache="static", compiled=True, blocks=1)
    # the prompt and a token: no length of the cache is compiled for twice, and no op of ours breaks a graph
    assert counters["stats"]["unique_graphs"] == 2 * len(found.variants)
    assert not counters["graph_break"]
    torch._dynamo.reset()
    assert (found.compiled, found.cache, found.blocks) == (True, "static", 1)
    assert "torch.compile, static cache" in found.table().title


def test_a_model_through_inductor_generates_the_tokens_that_it_does_without():
    torch._dynamo.reset()
    counters.clear()
    model = pruned(random_model(TINY, torch.float32, blocks=1), 0.5)
    sparsify(model, plan=Unmeasured(), lm_head="int8")
    with torch.inference_mode():
        wanted, logits = generate_logits(model, torch.arange(3), 6, "static")
        compile_forward(model)
        new, compiled = generate_logits(model, torch.arange(3), 6, "static")
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    torch._dynamo.reset()
    assert torch.equal(new, wanted)
    torch.testing.assert_close(compiled, logits, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_that_says_something_else_is_not_timed(monkeypatch):
    def other(graph, inputs):
        return lambda *given: tuple(
            out * 1.5 if out.is_floating_point() and out.dim() == 3 else out for out in graph(*given)
        )

    compile_by(monkeypatch, other)
    monkeypatch.setattr("sparsekern.generation._alternate", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(RuntimeError, match="logits of 4 tokens, compiled and not, differ by 0.5, allowed is 0.1"):
        measured(sparsities=(0.5,), cache="static", compiled=True, blocks=1)
    torch._dynamo.reset()


def test_a_peak_counts_what_is_freed_again_however_often_the_call_ran_before():
    def call():
        return len([torch.ones(1 << 14, dtype=torch.uint8) for _ in range(4096)])

    found = [peak(call, torch.device("cpu")) for _ in range(2)]
    if None in found:
        pytest.skip("this machine does not say how much memory a process had")
    # 64 MB, but for what the heap holds in pieces and does not give back
    assert all(32 << 20 <= bytes < 96 << 20 for bytes in found)


def test_logits_that_disagree_are_not_timed(monkeypatch):
    from sparsekern import generation

    monkeypatch.setattr(generation, "logits", lambda model, ids: torch.randn(3, 5, dtype=torch.bfloat16))
    monkeypatch.setattr(generation, "_alternate", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(RuntimeError, match="logits of 3 tokens, sparse and dense, differ by"):
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


def test_a_model_that_does_not_fit_is_refused_before_it_is_built_and_told_what_would(monkeypatch):
    monkeypatch.setattr("sparsekern.generation.random_model", lambda *_: pytest.fail("it was built"))
    llama, free = shapes.find("llama-2-7b"), 24 << 30
    monkeypatch.setattr("sparsekern.generation.available", lambda: free)
    with pytest.raises(
        ValueError,
        match=r"llama-2-7b in all these variants needs 73\.4 GB, 25\.8 are free: (\d+) of its 32 blocks fit",
    ) as refused:
        measure_generation(llama)
    fitting = int(re.search(r"(\d+) of its 32", str(refused.value))[1])
    assert 6 <= fitting < 16
    with pytest.raises(pytest.fail.Exception, match="it was built"):
        measure_generation(llama, blocks=fitting)
    with pytest.raises(ValueError, match="are free: "):
        measure_generation(llama, blocks=fitting + 1)
    free = 1 << 30
    with pytest.raises(ValueError, match=r"1\.1 are free: give fewer sparsities or values"):
        measure_generation(llama)
