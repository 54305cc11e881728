"""Training: what a training function is given, so that its masks hold, its steps are counted and it can be rewound.

It notices a function that would spoil the experiment: one that trains other weights than it was handed, with an
optimizer that remembers an earlier round, or without the masks.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.fixed_masks import FixedMasks, innermost
from sparsekern.lottery_journal import digest


class Training:
    """One round's training of `model`.

    round    0 is the dense network
    start    the step to begin at, 0 or the one that was rewound to
    steps    that the optimizer which was attached first has taken
    capture  the step after which the state of the model is kept in `captured`; None: never
    """

    def __init__(self, model: nn.Module, masks: FixedMasks, round: int, start: int, capture: int | None):
        self.round, self.steps, self.captured = round, 0, None
        self._model, self._masks, self._start, self._capture = model, masks, start, capture
        self._start_was_read = False
        self._handed = _digest(model)
        self._optimizers: list[Optimizer] = []
        self._counter = None

    @property
    def start(self) -> int:
        self._start_was_read = True
        return self._start

    @property
    def masks(self) -> dict[str, Tensor]:
        """By parameter name, bool, True = kept: copies."""
        return self._masks.masks

    @property
    def sparsity(self) -> float:
        """The fraction pruned of the weights that may be pruned."""
        return self._masks.sparsity

    def attach(self, optimizer: Optimizer) -> None:
        """Hold the masks through every step of `optimizer`. Call it before the first step, once for each optimizer.

        Raises ValueError for weights that are not the ones that were handed over, for an optimizer that has stepped
        before, and for one that holds none of the masked parameters.
        """
        if not self.steps and _digest(self._model) != self._handed:
            raise ValueError(
                f"round {self.round}: the weights were changed before the optimizer was attached; train must begin "
                "with the weights of the model that it is given"
            )
        if innermost(optimizer).state:
            raise ValueError(
                f"round {self.round}: the optimizer has stepped before, and its momentum belongs to other weights; "
                "make a new one in train"
            )
        self._masks.attach(optimizer)
        self._optimizers.append(innermost(optimizer))
        if self._counter is None:
            # after the hook of the masks
            self._counter = innermost(optimizer).register_step_post_hook(lambda *_: self._after_step())

    def run(self, train: Callable[[nn.Module, "Training"], Any]) -> Any:
        """Call `train`, see that it kept to the rules, and let go of its optimizers; returns what it returned."""
        try:
            if self._capture == 0:
                self._after_step(taken=0)
            returned = train(self._model, self)
            self._check()
        finally:
            self._masks.detach()
            if self._counter is not None:
                self._counter.remove()
        return returned

    def _after_step(self, taken: int = 1) -> None:
        self.steps += taken
        if self.steps == self._capture:
            self.captured = {name: value.detach().clone() for name, value in self._model.state_dict().items()}

    def _check(self) -> None:
        where = f"round {self.round}"
        if not self._optimizers:
            raise ValueError(f"{where}: train attached no optimizer; call training.attach(optimizer) before it steps")
        if not self.steps:
            raise ValueError(
                f"{where}: the attached optimizer took no step after step {self._start}; train beyond rewind_step, "
                "and with the optimizer that was attached"
            )
        self._masks.check()
        held = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        for name in self._masks.masks:
            parameter = self._model.get_parameter(name)
            if parameter.requires_grad and id(parameter) not in held:
                raise ValueError(
                    f"{where}: {name} is in no attached optimizer; attach the one that trains it, or leave it out with "
                    "`select`"
                )
        if self._start and not self._start_was_read:
            raise ValueError(
                f"{where}: train did not read training.start, which is {self._start}; it must begin there once rewound"
            )
        if self._capture is not None and self.captured is None:
            raise ValueError(f"{where}: train took {self.steps} steps, and rewind_step is {self._capture}")


def _digest(model: nn.Module) -> str:
    # a forward pass may move buffers before the optimizer is there
    return digest(dict(model.named_parameters()))
