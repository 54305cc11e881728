"""model: a whole language model of 8B's shape with random weights: decode and prefill, dense against sparse.

transformers' model with its static cache of keys and values; one forward pass is captured into a CUDA graph, a sample
is one replay. Decode is one token behind PAST others, prefill PREFILL tokens behind none; one sequence. What is swapped
is what `sparsify` decides on this card for decode: a layer stays dense where no sparse form is faster.

The dense model has weights without zeros. Each sparse one is checked against its own dense form, with zeros, first.
"""

import copy
import gc
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor, nn

from card.clock import check_linear, time_variants
from card.layers import keep_two_of_four, prune_at_random
from card.worker import Case, Json, Setting
from sparsekern import hf, shapes, sparsify
from sparsekern.linear import SparseLinear
from sparsekern.measure import weight_bytes
from sparsekern.plan import Plan

MODEL = "llama-3-8b"
PATTERNS = ("2:4", "50%", "60%", "70%")
PAST, PREFILL = 512, 2048
# root mean square of the logits' difference over that of the logits; 32 layers of bfloat16 rounding lie between
LARGEST_DIFFERENCE = 0.1


def cases(setting: Setting) -> Iterator[Case]:
    holder: list[nn.Module] = []
    for pattern in PATTERNS[1:2] if setting.tiny else PATTERNS:
        yield Case(f"model {pattern}", lambda pattern=pattern: measure(pattern, holder, setting))


def random_model(shape: shapes.ModelShape, setting: Setting) -> nn.Module:
    """Made where it stays: 8 billion weights are drawn on the card."""
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=PAST + PREFILL,
        # so that every layer changes what passes through it, at any size
        initializer_range=shape.hidden**-0.5,
    )
    torch.manual_seed(0)
    with torch.device(setting.device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


class Step:
    """A forward pass of `tokens` tokens behind `past` others, with nothing in it that waits for the card."""

    def __init__(self, model: nn.Module, tokens: int, past: int):
        device = next(model.parameters()).device
        self.model, self.past = model, past
        length = past + tokens
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        generator = torch.Generator().manual_seed(tokens)
        vocabulary = model.config.vocab_size
        self.before = torch.randint(vocabulary, (1, past), generator=generator).to(device)
        self.ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(device)
        self.positions = torch.arange(past, length, device=device)[None]
        # [1, 1, tokens, length]: a mask that is given is not made anew in every pass
        self.mask = (torch.arange(length, device=device)[None, :] <= self.positions[0][:, None])[None, None]
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        """The keys and values of the tokens before; without any, the cache is made by a first pass."""
        ids = self.before if self.past else self.ids[:, :1]
        size = ids.shape[1]
        length = self.mask.shape[-1]
        positions = torch.arange(size, device=ids.device)
        mask = (torch.arange(length, device=ids.device)[None, :] <= positions[:, None])[None, None]
        self._forward(ids, positions[None], mask)
        self.lengths = [layer.cumulative_length for layer in self.cache.layers]

    @torch.no_grad()
    def __call__(self, _: int = 0) -> Tensor:
        """The logits of the last token [1, 1, vocabulary]; the cache is as it was before, but for the tokens' place."""
        torch._foreach_zero_(self.lengths)
        torch._foreach_add_(self.lengths, self.past)
        return self._forward(self.ids, self.positions, self.mask)

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits


def pruned_copy(model: nn.Module, pattern: str) -> nn.Module:
    """`model` with zeros in the weights of its blocks; all other tensors are shared."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    pruned = copy.deepcopy(model, shared)
    for _, layer in hf.layers(pruned):
        weight = layer.weight.detach()
        zeros = keep_two_of_four(weight) if pattern == "2:4" else prune_at_random(weight, float(pattern[:-1]) / 100)
        layer.weight = nn.Parameter(zeros, requires_grad=False)
    return pruned


def measure(pattern: str, holder: list[nn.Module], setting: Setting) -> Iterator[Json]:
    """A row for decode and one for prefill, of the model with its weights pruned by one pattern."""
    # the model of the pattern before may be held by a cycle of its modules
    gc.collect()
    shape = shapes.find("tiny" if setting.tiny else MODEL)
    past, prefill = (5, 7) if setting.tiny else (PAST, PREFILL)
    if not holder:
        holder.append(random_model(shape, setting))
    dense = holder[0]
    sparse = pruned_copy(dense, pattern)
    steps = {"decode": (1, past), "prefill": (prefill, 0)}
    expected = {name: Step(sparse, *sizes)() for name, sizes in steps.items()}
    swap = sparsify(sparse, tokens=(1,), plan=Plan(0.02 if setting.tiny else 0.3))
    check_one_layer(sparse, setting)
    for name, (tokens, before) in steps.items():
        passes = {"dense": Step(dense, tokens, before), "sparse": Step(sparse, tokens, before)}
        logits = passes["sparse"]()
        off = float((logits.double() - expected[name].double()).norm() / expected[name].double().norm())
        # NaN is not within anything
        if not off <= LARGEST_DIFFERENCE:
            raise RuntimeError(f"{pattern} {name}: the logits differ by {off:.2g}, allowed is {LARGEST_DIFFERENCE}")
        timed = time_variants(passes, "dense", setting, rounds=100, seconds=6.0)
        yield {
            "model": shape.name,
            "pattern": pattern,
            "pass": name,
            "tokens": tokens,
            "past": before,
            "difference": off,
            "bytes": {"dense": weight_bytes(dense), "sparse": weight_bytes(sparse)},
            "swapped": len(swap.swapped),
            "stay_dense": len(swap.dense),
            "swap": str(swap)[:2000],
            **timed.to_json(),
        }


def check_one_layer(model: nn.Module, setting: Setting) -> None:
    """The largest swapped layer against float64, every output written. Raises RuntimeError when it is wrong."""
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    if layers:
        layer = max(layers, key=lambda layer: layer.out_features * layer.in_features)
        x = torch.randn(8, layer.in_features, device=setting.device).to(layer.dtype)
        check_linear(lambda _: layer(x), x, layer._dense())
