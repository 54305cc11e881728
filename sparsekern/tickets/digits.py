"""digits: a fully connected network of 300 and 100 units, and a small convolutional one, on scikit-learn's digits.

1797 images of 8 x 8 pixels: 1000 to train on, 297 to stop by, 500 to report, each class in the same share everywhere.
The recipe follows the fully connected network of the paper: Adam, batches of 60, stopped early by the loss on a
validation set. Its rate is higher, 4e-3 instead of 1.2e-3, because there are a fiftieth of the images: both networks'
dense validation loss then passes its lowest point. For the last third it falls to a tenth, so that fine-tuning is not
rewinding.

Source of the recipe: Frankle & Carbin 2019, https://arxiv.org/abs/1803.03635, figure 2 and section 2.
"""

import functools
import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.tickets.problem import Problem

RATE, BATCH = 4e-3, 60
TRAINED, VALIDATED = 1000, 297
SPLIT_SEED = 0
ROUNDS = 18
CONTROLLED = (3, 6, 8, 10, 12, 14, 16, 18)
# convolutions take longer a step
STEPS = {"mlp": 400, "cnn": 300}
EVERY = 10


def problems(steps: int | None = None, rounds: int | None = None) -> list[Problem]:
    """Both networks. `steps` and `rounds` are for a quick look.

    Raises ValueError when scikit-learn is missing, and for steps that rewinding needs.
    """
    (train, validation, test), digest = _split()
    chosen = []
    for name, build in (("mlp", _mlp), ("cnn", _cnn)):
        length, last = steps or STEPS[name], rounds or ROUNDS
        chosen.append(
            Problem(
                name=name,
                facts={
                    "data": "scikit-learn's digits, 8 x 8 pixels",
                    "sha256": digest,
                    "images": {"train": len(train[1]), "validation": len(validation[1]), "test": len(test[1])},
                    "network": " ".join(str(build(0)).split()),
                    "recipe": f"Adam, {RATE}, a tenth of it after two thirds of the steps, batches of {BATCH}",
                },
                steps=length,
                every=EVERY,
                rewind_step=length // 20,
                rate=0.2,
                rounds=last,
                controlled=tuple(number for number in CONTROLLED if number <= last),
                score="accuracy",
                higher_is_better=True,
                fresh=build,
                optimizer=lambda model: torch.optim.Adam(model.parameters(), RATE, fused=True),
                learning_rate=functools.partial(_learning_rate, length),
                clip_norm=None,
                loss=functools.partial(_loss, train),
                validate=functools.partial(_validation_loss, validation),
                test=functools.partial(_accuracy, test),
                example=test[0][:1],
            )
        )
    return chosen


def _mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def _cnn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 10)),
    )


def _learning_rate(steps: int, step: int) -> float:
    return RATE if step < 2 * steps // 3 else RATE / 10


def _loss(train: tuple[Tensor, Tensor], model: nn.Module, seed: int, step: int) -> Tensor:
    images, labels = train
    generator = torch.Generator().manual_seed((seed << 20) + step)
    chosen = torch.randint(len(labels), (BATCH,), generator=generator)
    return F.cross_entropy(model(images[chosen]), labels[chosen])


@torch.no_grad()
def _validation_loss(validation: tuple[Tensor, Tensor], model: nn.Module) -> float:
    return F.cross_entropy(model(validation[0]), validation[1]).item()


@torch.no_grad()
def _accuracy(test: tuple[Tensor, Tensor], model: nn.Module) -> float:
    tensors = (*model.parameters(), *model.buffers())
    dtype = next(tensor.dtype for tensor in tensors if tensor.is_floating_point())
    right = model(test[0].to(dtype)).argmax(1) == test[1]
    return int(right.sum()) / len(right)


def _split() -> tuple[list[tuple[Tensor, Tensor]], str]:
    """Train, validation and test as (images [n, 64] in 0..1, labels [n]), and the sha256 of all images and labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the digits come with scikit-learn, which is not installed: pip install 'sparsekern[lottery]'"
        ) from None
    bunch = load_digits()
    digest = hashlib.sha256(bunch.data.tobytes() + bunch.target.astype("int64").tobytes()).hexdigest()
    images, labels = torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target, dtype=torch.long)
    # every class in turn, in random order within the class, so that any stretch holds all of them alike
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    rank = torch.empty(len(labels))
    for label in labels.unique():
        own = order[labels[order] == label]
        rank[own] = (torch.arange(len(own)) + 0.5) / len(own)
    shuffled = rank.argsort(stable=True)
    parts = shuffled.split([TRAINED, VALIDATED, len(labels) - TRAINED - VALIDATED])
    return [(images[part], labels[part]) for part in parts], digest
