"""Layers whose inputs are correlated and of unequal strength, as those of language models are."""

import torch
from torch import Tensor


def layer(out_features: int, in_features: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight [out_features, in_features] and its inputs [tokens, in_features], the same for the same seed.

    The weight is normal with unequal rows and a mild heavy tail. The inputs are a mix of in_features / 8 sources whose
    strength falls, noise and a mean, times log-normal scales of the channels; one channel in a hundred is 20 times as
    strong as the rest.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = 0.02 * normal(out_features, in_features) * torch.exp(0.3 * normal(out_features, 1))
    weight *= 1 + 0.15 * normal(out_features, in_features).square()
    rank = in_features // 8
    x = (normal(tokens, rank) / torch.arange(1, rank + 1).sqrt()) @ normal(rank, in_features)
    x = x / x.std() + 0.3 * normal(tokens, in_features) + 0.5 * normal(in_features)
    scale = torch.exp(0.5 * normal(in_features))
    scale[torch.randperm(in_features, generator=generator)[: max(in_features // 100, 1)]] *= 20
    return weight, x * scale
