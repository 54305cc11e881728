"""hf_generate: a model of a published shape with random weights, and transformers' generate with a clock in it."""

import time
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from sparsekern.shapes import ModelShape

CACHES = ("dynamic", "static")
RECOMPILED = 64
RUN = (1 << 22) + 1237  # no multiple of a row, so that rows differ


def random_model(shape: ModelShape, dtype: torch.dtype, blocks: int | None = None) -> nn.Module:
    """A causal language model of this shape with random weights, in eval mode; `blocks` of its decoder blocks.

    The weights are one run of normal numbers over and over: a thousand million of them would take half a minute.
    """
    bias = any(layer.bias for layer in shape.layers)
    # the one architecture here whose q, k and v have a bias
    config_class = transformers.Qwen2Config if bias else transformers.LlamaConfig
    config = config_class(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=blocks or shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    # what builds without weights ties none either
    model.tie_weights()
    run = torch.randn(RUN, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    for weight in {id(p): p for module in layers for p in module.parameters()}.values():
        for part in weight.data.view(-1).split(RUN):
            part.copy_(run[: len(part)])
    return model


def generate(model: nn.Module, ids: Tensor, new_tokens: int, cache: str = "dynamic") -> tuple[Tensor, list[float]]:
    """transformers' own greedy generate.

    ids    [tokens] of the prompt
    cache  of keys and values: "dynamic" grows with the text, "static" has its size from the beginning

    Returns the new ids [new_tokens], and how many seconds after the call each of them was there.
    """
    stamps: list[float] = []
    done = ids.new_zeros(1, dtype=torch.bool)

    def stamp(seen: Tensor, scores: Tensor, **_) -> Tensor:
        # on a card the token is there when its work is done
        if seen.is_cuda:
            torch.cuda.synchronize(seen.device)
        stamps.append(time.perf_counter())
        return done

    start = time.perf_counter()
    out = _generate(model, ids, new_tokens, cache, stopping_criteria=transformers.StoppingCriteriaList([stamp]))
    return out[0, len(ids) :], [stamp - start for stamp in stamps]


def generate_logits(model: nn.Module, ids: Tensor, new_tokens: int, cache: str = "dynamic") -> tuple[Tensor, Tensor]:
    """What `generate` generates, [new_tokens], and the logits that it chose from, [new_tokens, vocabulary]."""
    out = _generate(model, ids, new_tokens, cache, return_dict_in_generate=True, output_logits=True)
    # generate casts them to float32
    return out.sequences[0, len(ids) :], torch.cat(out.logits).to(model.dtype)


def _generate(model: nn.Module, ids: Tensor, new_tokens: int, cache: str, **more: Any) -> Any:
    settings = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        # random weights say anything, the end among it
        "eos_token_id": None,
        "pad_token_id": 0,
        "use_cache": True,
    }
    if cache == "static":
        settings["cache_implementation"] = "static"
    return model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **settings, **more)


def compile_forward(model: nn.Module) -> None:
    """torch.compile for `model`'s forward, in place."""
    # several models of one class are compiled, each for a prompt and for a token; past the limit they would run eagerly
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILED)
    model.forward = torch.compile(model.forward)
