"""Shapes: the published sizes add up to the published numbers of parameters."""

import pytest

from sparsekern import shapes


@pytest.mark.parametrize(
    ("name", "parameters"),
    # of the model cards, less the norms: 1.24 B, 6.74 B, 8.03 B, 70.6 B, 0.49 B
    [
        ("llama-3.2-1b", 1_235_746_816),
        ("llama-2-7b", 6_738_149_376),
        ("llama-3-8b", 8_029_995_008),
        ("llama-3-70b", 70_552_387_584),
        ("qwen2.5-0.5b", 493_961_216),
    ],
)
def test_weights_add_up(name, parameters):
    model = shapes.find(name)
    embeddings = model.head.weights * (1 if model.tied else 2)
    assert model.blocks * model.block_weights + embeddings == parameters


def test_qwen_has_a_bias_on_q_k_v_only():
    assert [layer.name for layer in shapes.find("qwen2.5-0.5b").layers if layer.bias] == ["q_proj", "k_proj", "v_proj"]


def test_an_unknown_model_is_refused_with_those_known():
    with pytest.raises(
        ValueError, match=r"'gpt-9'; known are llama-3.2-1b, llama-2-7b, llama-3-8b, llama-3-70b, qwen2.5-0.5b, tiny"
    ):
        shapes.find("gpt-9")
