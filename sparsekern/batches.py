"""batches: calibration batches, read once, and which of their tokens are padding."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

# token ids, or what the model's forward takes by keyword
Batch = Tensor | Mapping[str, Any]
KEYWORDS = 'a dict of what forward takes by keyword, like {"pixel_values": images}'


def read_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The batches on the CPU: a generator is used up, and a loader that fails does so before any weight changed."""
    kept, counted = [], 0
    for number, batch in enumerate(batches):
        if isinstance(batch, Mapping):
            tensors = [item for item in batch.values() if isinstance(item, Tensor)]
        elif isinstance(batch, Tensor) and batch.dim() == 2 and not batch.is_floating_point():
            tensors = [batch]
        else:
            raise ValueError(
                f"calibration batch {number} must be token ids [batch, tokens] or {KEYWORDS}, got {_got(batch)}"
            )
        if (
            not tensors
            and isinstance(batch, Mapping)
            and any(isinstance(item, list) and item for item in batch.values())
        ):
            raise ValueError(
                f"calibration batch {number} holds lists and no tensor; call the tokenizer or processor with"
                ' return_tensors="pt"'
            )
        if not tensors or not all(tensor.numel() for tensor in tensors):
            raise ValueError(f"calibration batch {number} holds no tokens")
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        counted += 1 if mask is None else int(mask.count_nonzero())
        kept.append(map_tensors(dict(batch) if isinstance(batch, Mapping) else batch, lambda t: t.detach().cpu()))
    if not kept:
        raise ValueError("calibration needs at least one batch, got none; a generator gives its batches only once")
    if not counted:
        raise ValueError("calibration batches hold nothing but padding: attention_mask is 0 everywhere")
    return kept


class Padding:
    """Removes padding tokens from what a block's layers read, where a mask of the batch fits.

    attention_mask is the encoder's where there is one, unless the batch holds an image or a sound beside input_ids:
    then it is the text's. A mask of another length than what a layer reads, of samples where it reads frames, fits
    nothing, and all tokens count.
    """

    def __init__(self, batch: Batch):
        self._batch = batch if isinstance(batch, Mapping) else {}
        floats = [item for item in self._batch.values() if isinstance(item, Tensor) and item.is_floating_point()]
        self._beside_text = "input_ids" in self._batch and any(item.dim() > 2 for item in floats)
        self._encoded: Tensor | None = None
        self._untold = False

    def enter(self, arguments: Mapping[str, Any]) -> None:
        """A block is called with these arguments, by name."""
        self._encoded = arguments.get("encoder_hidden_states")
        told = any("mask" in name and isinstance(value, Tensor) for name, value in arguments.items())
        # a model tells the blocks of a padded text what to leave out; those it tells nothing read something else
        self._untold = not told and (self._beside_text or "attention_mask" in arguments)

    def removed(self, x: Tensor) -> Tensor:
        """The tokens of x that count [tokens, in_features]."""
        tokens = x.reshape(-1, x.shape[-1])
        mask = self._mask(self._encoded is not None and x.data_ptr() == self._encoded.data_ptr())
        if mask is None or _wide(x.shape[:-1]) not in (_wide(mask.shape), _wide((mask.numel(),))):
            return tokens
        return tokens[mask.reshape(-1).to(x.device) != 0]

    def removed_from_some(self, x: Tensor, rows: Tensor | None, total: int) -> Tensor:
        """The tokens that count of x [tokens, in_features], which are the `rows` of a block's `total` tokens."""
        mask = self._mask(of_the_encoder=False)
        if mask is None or mask.all() or total not in (0, mask.numel()):
            return x
        if rows is None:
            raise ValueError("cannot tell which tokens of an expert are padding; calibrate on batches without padding")
        return x[mask.reshape(-1).to(x.device)[rows] != 0]

    def _mask(self, of_the_encoder: bool) -> Tensor | None:
        """The mask of what a cross attention reads of the encoder, or of the block's own tokens."""
        own = "attention_mask" if self._encoded is None or self._beside_text else "decoder_attention_mask"
        name = "attention_mask" if of_the_encoder and not self._beside_text else own
        if (of_the_encoder and self._beside_text) or (self._untold and not of_the_encoder):
            return None
        mask = self._batch.get(name)
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _got(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"{batch.dtype} {list(batch.shape)}"
    text = isinstance(batch, str) or (isinstance(batch, list | tuple) and all(isinstance(item, str) for item in batch))
    return (
        f"{type(batch).__name__}; read_calibration(texts, tokenizer) makes batches of text"
        if text
        else type(batch).__name__
    )


def _wide(shape: Iterable[int]) -> tuple[int, ...]:
    # DeepSeek's attention reads its compressed keys and values as those of one head, [batch, 1, tokens, in_features]
    return tuple(size for size in shape if size != 1)


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """What a module is called with, by the names that its forward has for it, defaults and **kwargs included."""
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        rest = [name for name, taken in signature.parameters.items() if taken.kind is taken.VAR_KEYWORD]
        return bound.arguments | {key: value for name in rest for key, value in bound.arguments.pop(name).items()}
    except TypeError:
        # a decorated forward may take more than it says
        return {**{str(position): value for position, value in enumerate(args)}, **kwargs}


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        # a ModelOutput is a dict that is made from keywords
        return type(value)(**{key: map_tensors(item, change) for key, item in value.items()})
    return value
