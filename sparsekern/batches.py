"""batches: calibration batches, read once, and which of their tokens are padding."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

# token ids, or what the model's forward takes by keyword
Batch = Tensor | Mapping[str, Any]


def read_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The batches on the CPU: a generator is used up, and a loader that fails does so before any weight changed."""
    kept, counted = [], 0
    for number, batch in enumerate(batches):
        if isinstance(batch, Mapping):
            tensors = [item for item in batch.values() if isinstance(item, Tensor)]
        elif isinstance(batch, Tensor) and batch.dim() == 2 and not batch.is_floating_point():
            tensors = [batch]
        else:
            got = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"calibration batch {number} must be token ids [batch, tokens] or a dict, got {got}")
        if not tensors or not all(tensor.numel() for tensor in tensors):
            raise ValueError(f"calibration batch {number} holds no tokens")
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        counted += 1 if mask is None else int(mask.count_nonzero())
        kept.append(map_tensors(dict(batch) if isinstance(batch, Mapping) else batch, lambda t: t.detach().cpu()))
    if not kept:
        raise ValueError("calibration needs at least one batch, got none")
    if not counted:
        raise ValueError("calibration batches hold nothing but padding: attention_mask is 0 everywhere")
    return kept


class Padding:
    """Removes padding tokens from what a block's layers read, where a mask of the batch fits."""

    def __init__(self, batch: Batch):
        self._batch = batch if isinstance(batch, Mapping) else {}
        self._encoded: Tensor | None = None

    def enter(self, arguments: Mapping[str, Any]) -> None:
        self._encoded = arguments.get("encoder_hidden_states")

    def removed(self, x: Tensor) -> Tensor:
        """The tokens of x that count [tokens, in_features]."""
        tokens = x.reshape(-1, x.shape[-1])
        # a decoder's cross attention reads the encoder's tokens, the rest of the decoder its own
        mask = self._mask(self._encoded is not None and x.data_ptr() != self._encoded.data_ptr())
        if mask is None or _wide(x.shape[:-1]) not in (_wide(mask.shape), _wide((mask.numel(),))):
            return tokens
        return tokens[mask.reshape(-1).to(x.device) != 0]

    def removed_from_some(self, x: Tensor, rows: Tensor | None, total: int) -> Tensor:
        """The tokens that count of x [tokens, in_features], which are the `rows` of a block's `total` tokens."""
        mask = self._mask(self._encoded is not None)
        if mask is None or mask.all() or total not in (0, mask.numel()):
            return x
        if rows is None:
            raise ValueError("cannot tell which tokens of an expert are padding; calibrate on batches without padding")
        return x[mask.reshape(-1).to(x.device)[rows] != 0]

    def _mask(self, decoder: bool) -> Tensor | None:
        mask = self._batch.get("decoder_attention_mask" if decoder else "attention_mask")
        return mask if mask is not None and mask.dim() == 2 else None


def _wide(shape: Iterable[int]) -> tuple[int, ...]:
    # DeepSeek's attention reads its compressed keys and values as those of one head, [batch, 1, tokens, in_features]
    return tuple(size for size in shape if size != 1)


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
