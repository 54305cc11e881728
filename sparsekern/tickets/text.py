"""text: the shipped language model's architecture, two small blocks of it, on standard-library sources byte by byte.

It learns on the shipped calibration text and stops by, and is reported on, two halves of the held-out text, file by
file. Bytes are its tokens: nearly all weights are then in the layers that are pruned. Perplexity is a byte's. The peak
rate is that of 2e-3, 3e-3 and 5e-3 at which the dense network's validation loss was steadily low over three seeds.
"""

import functools
import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern import hf
from sparsekern.demo import MODEL
from sparsekern.tickets.problem import Problem

SEPARATOR = b"<|endoftext|>"
SIZES = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
WINDOW, BATCH = 64, 8
WINDOWS = 64  # of validation and of test, each
PEAK_RATE, WARMUP, CLIP_NORM = 3e-3, 20, 1.0
STEPS, EVERY = 600, 50
# what is left of the weights: 64, 41, 26, 17, 11, 6.9, 4.4, 2.8 and 1.8 %
RATE, ROUNDS, CONTROLLED = 0.36, 9, (2, 4, 5, 6, 8)


def problems(steps: int | None = None, rounds: int | None = None) -> list[Problem]:
    """The one network. `steps` and `rounds` are for a quick look."""
    train, validation, test = _parts()
    length, last = steps or STEPS, rounds or ROUNDS
    texts = {"train": train, "validation": validation, "test": test}
    return [
        Problem(
            name="llama",
            facts={
                "data": "Python's standard library: the shipped calibration text, and halves of the held-out text",
                "sha256": {name: hashlib.sha256(part.numpy().tobytes()).hexdigest() for name, part in texts.items()},
                "bytes": {name: len(part) for name, part in texts.items()},
                "windows": {"bytes": WINDOW, "validation": WINDOWS, "test": WINDOWS},
                "network": {"architecture": type(_model(0)).__name__, **SIZES},
                "recipe": f"AdamW, warmed up to {PEAK_RATE} over {WARMUP} steps, half a cosine down to a tenth of it, "
                f"batches of {BATCH} windows, gradients clipped to norm {CLIP_NORM}",
            },
            steps=length,
            every=EVERY,
            rewind_step=length // 20,
            rate=RATE,
            rounds=last,
            controlled=tuple(number for number in CONTROLLED if number <= last),
            score="perplexity",
            higher_is_better=False,
            fresh=_model,
            optimizer=lambda model: torch.optim.AdamW(
                model.parameters(), PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.1, fused=True
            ),
            learning_rate=functools.partial(_learning_rate, length),
            clip_norm=CLIP_NORM,
            loss=functools.partial(_loss, train),
            validate=functools.partial(_mean_loss, _windows(validation)),
            test=lambda model: math.exp(_mean_loss(_windows(test), model)),
            example=test[None, :1],
        )
    ]


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return hf.untrained(MODEL, **SIZES)


def _learning_rate(steps: int, step: int) -> float:
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    return PEAK_RATE * (0.55 + 0.45 * math.cos(math.pi * (step - WARMUP) / max(steps - 1 - WARMUP, 1)))


def _nats(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of ids [windows, WINDOW], each window on its own."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _loss(train: Tensor, model: nn.Module, seed: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed << 20) + step)
    starts = torch.randint(len(train) - WINDOW, (BATCH, 1), generator=generator)
    return _nats(model, train[starts + torch.arange(WINDOW)])


@torch.no_grad()
def _mean_loss(windows: Tensor, model: nn.Module) -> float:
    return _nats(model, windows).item()


def _windows(part: Tensor) -> Tensor:
    """WINDOWS windows of WINDOW bytes, evenly over the text."""
    starts = torch.linspace(0, len(part) - WINDOW, WINDOWS).long()
    return part[starts[:, None] + torch.arange(WINDOW)]


def _parts() -> tuple[Tensor, Tensor, Tensor]:
    """Bytes [n] int64 to train on, to stop by and to report; files are separated by a byte 0."""
    train, heldout = ((MODEL / name).read_bytes().split(SEPARATOR)[1:] for name in ("calibration.txt", "heldout.txt"))
    return tuple(
        torch.frombuffer(bytearray(b"\0" + b"\0".join(files)), dtype=torch.uint8).long()
        for files in (train, heldout[::2], heldout[1::2])
    )
