"""text: calibration and test text, its tokens, and the windows of tokens that a model is shown.

Where text comes from is the business of documents. A tokenizer is anything that is called like those of transformers.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekern.documents import Chat, Source, read_documents

# a calibration draws its windows from the beginning of a text, which may be larger than any memory
MOST_TOKENS = 1 << 22
# characters that are tokenised at once: a tokenizer keeps some hundred bytes for each of their tokens meanwhile
PIECE = 1 << 20


def read_text(source: Source) -> str:
    """The whole text of a source, see documents. Raises ValueError as that does, and for a source without text."""
    text = "".join(read_documents(source).pieces)
    if not text.strip():
        raise ValueError(f"{_named(source)} holds no text")
    return text


def tokenize(tokenizer: Any, text: str, special_tokens: bool = True) -> Tensor:
    """The tokens of the whole text [tokens] int64, in one piece, with the tokenizer's own special tokens or without."""
    # verbose=False: a text longer than the model's context is what we want here
    without = {} if special_tokens else {"add_special_tokens": False}
    return torch.tensor(tokenizer(text, verbose=False, **without)["input_ids"], dtype=torch.long)


def read_tokens(
    source: Source,
    tokenizer: Any,
    at_most: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The tokens of a source's text, or of its beginning: no more is read than gives `at_most` tokens.

    progress  called with the number of tokens so far

    Returns [tokens] int64. A long text is tokenised in pieces cut at ends of lines, and only the first gets the
    tokenizer's special tokens; chats, which the tokenizer's chat template makes text of, have theirs already. Raises
    ValueError as read_text does.
    """
    documents = read_documents(source, _template(tokenizer))
    tokens, count, blank = [], 0, True
    for number, piece in enumerate(_pieces(documents.pieces)):
        tokens.append(tokenize(tokenizer, piece, special_tokens=not (number or documents.templated)))
        count += len(tokens[-1])
        blank = blank and not piece.strip()
        if progress is not None:
            progress(count)
        if at_most is not None and count >= at_most:
            break
    if blank:
        raise ValueError(f"{_named(source)} holds no text")
    return torch.cat(tokens)[:at_most]


def read_calibration(
    source: Source,
    tokenizer: Any,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Calibration batches from a file, a dataset of the hub, or an iterable of texts or chats: `samples` windows.

    source    "text.txt", "data.jsonl", "data.parquet:column", "name:config:split", [...]: see documents
    progress  as in read_tokens

    Returns tensors [1, seqlen], drawn from the first MOST_TOKENS tokens of the text, or more where the windows ask for
    more. Raises ValueError as read_text and windows do.
    """
    at_most = max(MOST_TOKENS, 4 * samples * seqlen)
    return windows(read_tokens(source, tokenizer, at_most, progress), seqlen, samples, seed)


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


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """The same text in pieces of at most PIECE characters, cut at the end of a line, or else of a word."""
    held, size = [], 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size > PIECE:
            whole, start = "".join(held), 0
            while len(whole) - start > PIECE:
                end = start + PIECE
                cut = whole.rfind("\n", start, end) + 1 or max(whole.rfind(" ", start + 1, end), 0) or end
                yield whole[start:cut]
                start = cut
            held, size = [whole[start:]], len(whole) - start
    yield "".join(held)


def _template(tokenizer: Any) -> Callable[[Chat], str] | None:
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    return lambda chat: tokenizer.apply_chat_template(chat, tokenize=False)


def _named(source: Source) -> str:
    return repr(str(source)) if isinstance(source, str | Path) else "calibration"
