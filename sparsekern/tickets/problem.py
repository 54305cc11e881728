"""Problem: one network, its data and its recipe, as an experiment with tickets needs them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.training import Training

PRODUCT_SPARSITY = 0.9


@dataclass(frozen=True)
class Problem:
    """A network that is trained, stopped early by its validation loss, and reported on a test set that nothing chose.

    facts          what a reader needs to know of data, network and recipe, as JSON
    steps          of one training; `every` so many it is validated
    rewind_step    of late rewinding
    rate           pruned each round, `rounds` times
    controlled     the rounds that the controls are run at
    score          what is reported, such as "accuracy"; `higher_is_better`
    fresh          seed -> theta_0
    optimizer      of a model; its rates are set to learning_rate(step) before each step
    clip_norm      that gradients are clipped to; None: they are not
    loss           model, seed, step -> the loss of that step's batch: nothing else decides the batch
    validate       model -> loss on the validation set
    test           model -> score on the test set
    example        the input that latency is measured with
    """

    name: str
    facts: Mapping[str, Any]
    steps: int
    every: int
    rewind_step: int
    rate: float
    rounds: int
    controlled: tuple[int, ...]
    score: str
    higher_is_better: bool
    fresh: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    learning_rate: Callable[[int], float]
    clip_norm: float | None
    loss: Callable[[nn.Module, int, int], Tensor]
    validate: Callable[[nn.Module], float]
    test: Callable[[nn.Module], float]
    example: Tensor

    @property
    def settings(self) -> dict[str, Any]:
        """What a recorded run must agree in."""
        names = ("name", "steps", "every", "rewind_step", "rate", "score")
        return {**{name: getattr(self, name) for name in names}, "facts": dict(self.facts)}

    @property
    def product_round(self) -> int:
        """The first round at PRODUCT_SPARSITY or beyond, else the last."""
        beyond = (number for number in range(self.rounds + 1) if (1 - self.rate) ** number <= 1 - PRODUCT_SPARSITY)
        return next(beyond, self.rounds)

    def trainer(self, seed: int, at_last_rate: bool = False) -> Callable[[nn.Module, Training], dict[str, Any]]:
        """A training function for find_ticket.

        at_last_rate  after round 0 the learning rate stays at its last value: fine-tuning

        Its metrics: the step of the lowest validation loss, the test score there, and the test score at the end.
        """

        def train(model: nn.Module, training: Training) -> dict[str, Any]:
            optimizer = self.optimizer(model)
            training.attach(optimizer)
            rows = []
            for step in range(training.start, self.steps):
                rate = self.learning_rate(self.steps - 1 if at_last_rate and training.round else step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
                self.loss(model, seed, step).backward()
                if self.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
                optimizer.step()
                if (step + 1) % self.every == 0 or step + 1 == self.steps:
                    rows.append((self.validate(model), step + 1, self.test(model)))
            validation_loss, early_step, score = min(rows)
            return {
                "early_step": early_step,
                "validation_loss": validation_loss,
                "score": score,
                "last_score": rows[-1][2],
            }

        return train
