"""The oracle of the calibration tests: hooks over ordinary forwards, nothing shared, nothing stopped."""

import inspect

import torch

from sparsekern import hf
from sparsekern.stats import Gram


class EveryToken:
    """A statistic that holds nothing out, to count what reaches it."""

    def __init__(self, in_features, device="cpu"):
        self.tokens, self._squares = 0, torch.zeros(in_features, device=device)

    def add(self, x):
        self.tokens += len(x)
        self._squares += x.float().square().sum(dim=0)

    @property
    def norm(self):
        return self._squares.sqrt()


@torch.no_grad()
def plain_statistics(model, batches, layers, statistic=Gram):
    """The statistics by name of what `layers` read while the model runs over the batches."""
    seen, handles = {}, []
    for name, layer in layers:
        seen[name] = stats = statistic(hf.weight(layer).shape[1])
        add = stats.add
        handles.append(layer.register_forward_pre_hook(lambda _, args, add=add: add(args[0].flatten(0, -2))))
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for batch in batches:
        model(batch, **cache) if isinstance(batch, torch.Tensor) else model(**batch, **cache)
    for handle in handles:
        handle.remove()
    return seen


def assert_same_gram(got, want):
    assert (got.tokens, got.held_out_tokens) == (want.tokens, want.held_out_tokens)
    scale = want.hessian.abs().max().item()
    torch.testing.assert_close(got.hessian, want.hessian, rtol=1e-4, atol=1e-6 * scale)


def halve(layer):
    hf.weight(layer).mul_(0.5)
