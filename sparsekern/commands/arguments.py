"""What several commands take: a model, a text, a window; ValueError for what makes no sense."""

from typing import Annotated

import torch
import typer

from sparsekern import hf, text
from sparsekern.commands.output import progress_bar

SEQLEN = 2048  # what published perplexities are measured at
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Model = Annotated[str, typer.Argument(help="directory of a checkpoint, or its name on the hub")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]
Seqlen = Annotated[int | None, typer.Option(help="tokens a window; 2048, or the model's positions if fewer")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: the checkpoint's own")]


def load(model: str, dtype: str):
    hf.quiet()
    return hf.load(model, dtype=dtype_of(dtype))


def dtype_of(name: str) -> torch.dtype | None:
    if name not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES.get(name)


def window(model, seqlen: int | None) -> int:
    """Raises ValueError for a window that the model has no positions for."""
    positions = hf.positions(model)
    if seqlen is not None and positions is not None and seqlen > positions:
        raise ValueError(f"seqlen must be at most the model's {positions} positions, got {seqlen}")
    if seqlen is not None and seqlen < 2:
        raise ValueError(f"seqlen must be at least 2, got {seqlen}")
    return seqlen or min(SEQLEN, positions or SEQLEN)


def tokens_of(tokenizer, source: str) -> torch.Tensor:
    """All of a text, tokenised in one piece: what perplexity is measured on."""
    return text.tokenize(tokenizer, text.read_text(source))


def calibration_of(tokenizer, source: str, samples: int, seqlen: int, seed: int) -> list[torch.Tensor]:
    with progress_bar("calibration text") as update:
        return text.read_calibration(
            source, tokenizer, samples, seqlen, seed, lambda count: update(count, None, f"{count:,} calibration tokens")
        )
