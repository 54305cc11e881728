"""The oracle of the calibration tests: hooks over ordinary forwards, nothing shared, nothing stopped.

The forwards of experts in 3-D parameters are written out again, token by token, so that they tell what they multiply.
"""

import functools
import inspect
from collections import defaultdict

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
    seen, handles, experts = {}, [], defaultdict(dict)
    for name, layer in layers:
        seen[name] = stats = statistic(hf.weight(layer).shape[1])
        add = stats.add
        if isinstance(layer, hf.Expert):
            experts[layer.module][layer.parameter, layer.index] = add
            continue
        handles.append(layer.register_forward_pre_hook(lambda _, args, add=add: add(args[0].flatten(0, -2))))
    for module, adds in experts.items():
        module.forward = functools.partial(FORWARDS[tuple(inspect.signature(module.forward).parameters)], module, adds)
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for batch in batches:
        model(batch, **cache) if isinstance(batch, torch.Tensor) else model(**batch, **cache)
    for handle in handles:
        handle.remove()
    for module in experts:
        del module.forward
    return seen


def routed(module, adds, hidden_states, index, weights):
    """Most families: index and weights [tokens, top_k]. gpt-oss keeps its experts transposed, and with a bias."""
    out = torch.zeros_like(hidden_states)
    for expert in range(len(module.gate_up_proj)):
        chosen = [(k, t) for k in range(index.shape[1]) for t in range(len(index)) if index[t, k] == expert]
        if not chosen:
            continue
        x = torch.stack([hidden_states[t] for _, t in chosen])
        adds["gate_up_proj", expert](x)
        if hasattr(module, "gate_up_proj_bias"):
            both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
            gate, up = both[:, ::2].clamp(max=module.limit), both[:, 1::2].clamp(-module.limit, module.limit)
            x = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
            y = x @ module.down_proj[expert] + module.down_proj_bias[expert]
        else:
            gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=1)
            x = module.act_fn(gate) * up
            y = x @ module.down_proj[expert].T
        adds["down_proj", expert](x)
        for row, (k, t) in enumerate(chosen):
            out[t] += y[row] * weights[t, k]
    return out


def every_token_to_every_expert(module, adds, hidden_states):
    """Llama4: [experts * tokens, hidden_size], a token's input to an expert that it is not routed to being zero."""
    out = []
    for expert, x in enumerate(hidden_states.chunk(len(module.gate_up_proj))):
        here = [t for t in range(len(x)) if x[t].count_nonzero()]
        gate, up = (x @ module.gate_up_proj[expert]).chunk(2, dim=1)
        inner = up * module.act_fn(gate)
        if here:
            adds["gate_up_proj", expert](x[here])
            adds["down_proj", expert](inner[here])
        out.append(inner @ module.down_proj[expert])
    return torch.cat(out)


def sorted_by_expert(module, adds, inputs, expert_size):
    """JetMoe, and Granite before 5.17: the first expert_size[0] tokens are the first expert's, and so on."""
    out = []
    for expert, x in enumerate(inputs.split(expert_size)):
        if len(x):
            adds["weight", expert](x)
        out.append(x @ module.weight[expert].T)
    return torch.cat(out)


FORWARDS = {
    ("hidden_states", "top_k_index", "top_k_weights"): routed,
    ("hidden_states", "router_indices", "routing_weights"): routed,
    ("hidden_states",): every_token_to_every_expert,
    ("inputs", "expert_size"): sorted_by_expert,
}


def assert_same_gram(got, want):
    assert (got.tokens, got.held_out_tokens) == (want.tokens, want.held_out_tokens)
    scale = want.hessian.abs().max().item()
    torch.testing.assert_close(got.hessian, want.hessian, rtol=1e-4, atol=1e-6 * scale)


def halve(layer):
    hf.weight(layer).mul_(0.5)
