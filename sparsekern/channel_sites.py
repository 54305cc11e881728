"""Where a layer's inputs can be put in another order: what the layers before them put out, in the same order.

A site is a layer (the consumer) whose inputs are, channel by channel, made from outputs of other layers of its block
(the producers) with nothing between them that knows one channel from another:

    down(act(gate(x)) * up(x))      the rows of gate and up, halves of one matrix or two, with the columns of down
    o(attention(q, k, v))           the rows of v within a head with the columns of o; query heads that share a key
                                    and value head share the order

They are found by the names that models give them and by shape; whether nothing is in between is not in the names, so
permute.py tries each site on the model before it believes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekern import hf

# producers -> consumer, names below the same module; of several that fit, the first
PERCEPTRONS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("fc_in",), "fc_out"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
    (("ffn",), "ffn_output"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
)
VALUES = (
    ("v_proj", ("o_proj", "out_proj", "dense")),
    ("v", ("o",)),
    ("value", ("dense",)),
    ("self.value", ("output.dense",)),
    ("v_lin", ("out_lin",)),
)
# rows [q of all heads, k of all heads, v of all heads]
STACKED = (
    ("qkv_proj", ("o_proj", "out_proj")),
    ("c_attn", ("c_proj",)),
    ("Wqkv", ("Wo", "out_proj")),
    ("qkv", ("proj",)),
)
# rows [q, k, v of the first head, q, k, v of the second, ...]
INTERLEAVED = (("query_key_value", ("dense",)),)
# rows [k without positions, v of the first head, ...]: multi-head latent attention
LATENT = (("kv_b_proj", ("o_proj",)),)
# what an attention module calls the size of a head; that of v comes first, where it has its own
HEAD_SIZES = ("v_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


@dataclass(frozen=True, eq=False)
class Site:
    """A layer whose inputs may change places.

    consumer   name of the layer
    columns    [units, copies, channels] its inputs: each unit (a key and value head) is ordered by itself, and its
               copies (the query heads that read it) alike
    producers  name of each layer before it, with its rows [units, channels]; the halves of one layer stand separately
    """

    consumer: str
    columns: Tensor
    producers: tuple[tuple[str, Tensor], ...]

    @torch.no_grad()
    def reorder(self, layers: dict[str, nn.Module], order: Tensor) -> None:
        """Put channel order[unit, i] where the i-th was, in place; `order.argsort(1)` undoes it bit for bit."""
        units, copies, channels = self.columns.shape
        moved = self.columns.gather(2, order[:, None, :].expand(units, copies, channels))
        weight = hf.weight(layers[self.consumer])
        weight[:, self.columns.flatten()] = weight[:, moved.flatten()]
        for name, rows in self.producers:
            layer, moved = layers[name], rows.gather(1, order)
            for tensor in (hf.weight(layer), *(() if layer.bias is None else (layer.bias.data,))):
                tensor[rows.flatten()] = tensor[moved.flatten()]


def find(model: nn.Module) -> tuple[dict[str, Site], dict[str, str]]:
    """The sites by consumer, and the consumers that look like one and are none, with the reason.

    Layers that must not be touched (tied, wrapped by an adapter: see hf.layers) belong to no site, and neither do
    experts that lie in one parameter.
    """
    layers = {name: layer for name, layer in hf.layers(model) if isinstance(layer, nn.Module)}
    sites: dict[str, Site] = {}
    refused: dict[str, str] = {}
    for consumer in layers:
        for find_one in (_perceptron, _attention):
            found = find_one(model, layers, consumer)
            if isinstance(found, Site):
                sites[consumer] = found
            elif found is not None:
                refused[consumer] = found
    return sites, refused


def _before(layers: dict[str, nn.Module], consumer: str, name: str, producer: str) -> str | None:
    """The full name of the layer `producer` beside the consumer, which goes by `name`; None when there is none."""
    if not consumer.endswith(f".{name}"):
        return None
    full = consumer.removesuffix(name) + producer
    return full if full in layers else None


def _perceptron(model: nn.Module, layers: dict[str, nn.Module], consumer: str) -> Site | str | None:
    for names, last in PERCEPTRONS:
        before = [_before(layers, consumer, last, name) for name in names]
        if None in before:
            continue
        device, inputs = layers[consumer].weight.device, hf.weight(layers[consumer]).shape[1]
        # gate and up in one matrix, one below the other
        outputs = {len(hf.weight(layers[name])) for name in before}
        halves = 2 if len(before) == 1 and outputs == {2 * inputs} else 1
        if outputs != {halves * inputs}:
            return f"reads {inputs} channels, {before[0]} puts out {len(hf.weight(layers[before[0]]))}"
        rows = torch.arange(halves * inputs, device=device).view(halves, 1, inputs)
        columns = torch.arange(inputs, device=device).view(1, 1, inputs)
        return Site(consumer, columns, tuple((name, half) for name in before for half in rows))
    return None


def _attention(model: nn.Module, layers: dict[str, nn.Module], consumer: str) -> Site | str | None:
    for table, layout in ((VALUES, _alone), (STACKED, _stacked), (INTERLEAVED, _interleaved), (LATENT, _latent)):
        for value, consumers in table:
            for last in consumers:
                if before := _before(layers, consumer, last, value):
                    return _heads(model, layers, consumer, before, layout)
    return None


def _heads(model: nn.Module, layers: dict[str, nn.Module], consumer: str, value: str, layout) -> Site | str:
    inputs, outputs = hf.weight(layers[consumer]).shape[1], len(hf.weight(layers[value]))
    size = _head_size(model, value, consumer)
    if size is None or inputs % size:
        return f"the size of a head is not known: {inputs} channels, head size {size}"
    rows = layout(torch.arange(outputs), inputs, size)
    if rows is None or not len(rows) or inputs % rows.numel():
        return f"the layout of {value} is not known: {outputs} outputs for {inputs} channels in heads of {size}"
    device = layers[consumer].weight.device
    # query heads that share a key and value head are neighbours
    columns = torch.arange(inputs, device=device).view(len(rows), -1, size)
    return Site(consumer, columns, ((value, rows.to(device)),))


def _alone(rows: Tensor, inputs: int, size: int) -> Tensor | None:
    return rows.view(-1, size) if len(rows) % size == 0 else None


def _stacked(rows: Tensor, inputs: int, size: int) -> Tensor | None:
    both = len(rows) - inputs
    return rows[inputs + both // 2 :].view(-1, size) if both > 0 and both % (2 * size) == 0 else None


def _interleaved(rows: Tensor, inputs: int, size: int) -> Tensor | None:
    return rows.view(-1, 3, size)[:, 2] if len(rows) == 3 * inputs else None


def _latent(rows: Tensor, inputs: int, size: int) -> Tensor | None:
    heads = inputs // size
    return rows.view(heads, -1)[:, -size:] if len(rows) % heads == 0 and len(rows) > inputs else None


def _head_size(model: nn.Module, *names: str) -> int | None:
    """As the attention module itself says, or else the model's config."""
    for name in names:
        path = name.split(".")[:-1]
        # the module that holds the layer, then the one around it
        for depth in (len(path), len(path) - 1):
            module = model.get_submodule(".".join(path[:depth]))
            for attribute in HEAD_SIZES:
                if isinstance(size := getattr(module, attribute, None), int) and size > 0:
                    return size
    config = getattr(model, "config", None)
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    size = getattr(config, "head_dim", None)
    return size or (hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None)
