"""text: calibration and test text, its tokens, and the windows of tokens that a model is shown.

Imports neither ours nor transformers: a tokenizer is anything that is called like theirs.
"""

from pathlib import Path

import torch
from torch import Tensor


def read_text(source: str | Path) -> str:
    """The text of a local UTF-8 file, or of a dataset: "name", "name:config" or "name:config:split".

    A dataset's split is "train" unless named; its column is "text", and its rows are joined by blank lines. Raises
    ValueError when there is no such file or dataset, or it is empty.
    """
    path = Path(source).expanduser()
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(source)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    elif path.exists():
        raise ValueError(f"{str(source)!r} is not a file")
    elif isinstance(source, Path) or source.startswith((".", "/", "~")) or source.endswith(".txt"):
        raise ValueError(f"no such file: {str(source)!r}")
    else:
        text = _read_dataset(source)
    if not text.strip():
        raise ValueError(f"{str(source)!r} holds no text")
    return text


def tokenize(tokenizer, text: str) -> Tensor:
    """The tokens of the whole text [tokens] int64, in one piece, with the tokenizer's own special tokens."""
    # verbose=False: a text longer than the model's context is what we want here
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def windows(tokens: Tensor, seqlen: int, count: int | None = None, seed: int = 0) -> list[Tensor]:
    """Calibration batches: `count` windows of the tokens, in random order.

    tokens  [tokens] int64
    seqlen  tokens a window
    count   how many; None: as many as fit side by side

    Returns tensors [1, seqlen]. No token is drawn twice as long as the windows fit side by side; beyond that windows
    overlap, and each starts elsewhere. The same seed draws the same. Raises ValueError when there are too few tokens.
    """
    if seqlen < 1:
        raise ValueError(f"seqlen must be at least 1, got {seqlen}")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if len(tokens) < seqlen:
        raise ValueError(f"a window needs {seqlen} tokens, the text has {len(tokens)}; give more text or less seqlen")
    generator = torch.Generator().manual_seed(seed)
    side_by_side, places = len(tokens) // seqlen, len(tokens) - seqlen + 1
    count = side_by_side if count is None else count
    if count <= side_by_side:
        first = torch.randint(len(tokens) - side_by_side * seqlen + 1, (1,), generator=generator)
        starts = first + seqlen * torch.randperm(side_by_side, generator=generator)[:count]
    elif count <= places:
        starts = torch.randperm(places, generator=generator)[:count]
    else:
        raise ValueError(f"{len(tokens)} tokens hold {places} windows of {seqlen}, not {count}; give more text")
    return [tokens[start : start + seqlen][None] for start in starts.tolist()]


def _read_dataset(source: str) -> str:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{source!r} is no local file, and datasets of the hub need the datasets library: pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(
            f"cannot load dataset {source!r}: {reason}; give a local text file, or check the name and the network"
        ) from error
    if "text" not in rows.column_names:
        raise ValueError(f'dataset {source!r} has no column "text", only {", ".join(rows.column_names)}')
    return "\n\n".join(rows["text"])
