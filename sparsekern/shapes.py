"""shapes: the linear layers of models that people run, from their published configurations.

Sources: the config.json of meta-llama/Llama-3.2-1B, Llama-2-7b-hf, Meta-Llama-3-8B and Meta-Llama-3-70B, and of
Qwen/Qwen2.5-0.5B.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One linear layer: its weight is [out_features, in_features], and `count` of them stand in a decoder block."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False
    count: int = 1

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ModelShape:
    """A model's decoder blocks, all alike, and its output embedding `head`, which is not pruned by default.

    tied  the output embedding is the input embedding
    """

    name: str
    blocks: int
    layers: tuple[LayerShape, ...]
    head: LayerShape
    tied: bool
    heads: int
    kv_heads: int

    @property
    def hidden(self) -> int:
        return self.head.in_features

    @property
    def intermediate(self) -> int:
        return self.layers[-1].in_features

    @property
    def vocabulary(self) -> int:
        return self.head.out_features

    @property
    def block_weights(self) -> int:
        """Weights of the linear layers of one decoder block."""
        return sum(layer.weights * layer.count for layer in self.layers)


def _llama(
    name: str,
    *,
    blocks: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool,
    qkv_bias: bool = False,
) -> ModelShape:
    kv = hidden // heads * kv_heads
    layers = (
        LayerShape("q_proj", hidden, hidden, qkv_bias),
        LayerShape("k_proj", kv, hidden, qkv_bias),
        LayerShape("v_proj", kv, hidden, qkv_bias),
        LayerShape("o_proj", hidden, hidden),
        LayerShape("gate_proj", intermediate, hidden),
        LayerShape("up_proj", intermediate, hidden),
        LayerShape("down_proj", hidden, intermediate),
    )
    return ModelShape(name, blocks, layers, LayerShape("lm_head", vocabulary, hidden), tied, heads, kv_heads)


_LLAMA_3_2_1B = _llama(
    "llama-3.2-1b",
    blocks=16,
    hidden=2048,
    intermediate=8192,
    heads=32,
    kv_heads=8,
    vocabulary=128256,
    tied=True,
)
_LLAMA_2_7B = _llama(
    "llama-2-7b",
    blocks=32,
    hidden=4096,
    intermediate=11008,
    heads=32,
    kv_heads=32,
    vocabulary=32000,
    tied=False,
)
_LLAMA_3_8B = _llama(
    "llama-3-8b",
    blocks=32,
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    vocabulary=128256,
    tied=False,
)
_LLAMA_3_70B = _llama(
    "llama-3-70b",
    blocks=80,
    hidden=8192,
    intermediate=28672,
    heads=64,
    kv_heads=8,
    vocabulary=128256,
    tied=False,
)
_QWEN_2_5_05B = _llama(
    "qwen2.5-0.5b",
    blocks=24,
    hidden=896,
    intermediate=4864,
    heads=14,
    kv_heads=2,
    vocabulary=151936,
    tied=True,
    qkv_bias=True,
)
# for tests: every part is there and nothing takes long
_TINY = _llama(
    "tiny",
    blocks=2,
    hidden=64,
    intermediate=160,
    heads=4,
    kv_heads=2,
    vocabulary=256,
    tied=True,
)

MODELS = {model.name: model for model in (_LLAMA_3_2_1B, _LLAMA_2_7B, _LLAMA_3_8B, _LLAMA_3_70B, _QWEN_2_5_05B, _TINY)}


def find(name: str) -> ModelShape:
    """The model called `name`. Raises ValueError for an unknown one, naming those there are."""
    if name not in MODELS:
        raise ValueError(f"no shapes are known of model {name!r}; known are {', '.join(MODELS)}")
    return MODELS[name]
