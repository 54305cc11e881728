"""FixedMasks: training that leaves pruned weights at zero, whatever the optimizer.

A zero in a weight does not survive training by itself: weight decay leaves it alone, but its gradient, momentum and the
moments of Adam do not. Here, for a weight W and its mask m (True = kept),

    dL/dW  <- dL/dW where m, else 0      as soon as it is computed: a clipped norm counts kept weights only
    W      <- W where m, else +0.0       after every step of the optimizer
    state  <- state where m, else 0      every state of W's own shape: momentum, first and second moments

so that a pruned weight is exactly +0.0 whenever the training loop looks at it, and nothing of it is left in the
optimizer that could move it later.

    masks = FixedMasks.of(model)            # the zeros that are there; or FixedMasks(model, {"fc.weight": kept})
    masks.attach(optimizer)
    ...                                     # train as ever: closures, GradScaler, clipping, schedules, several groups
    masks.detach()                          # the optimizer is as before, the zeros stay
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element
Select = Callable[[str, nn.Parameter], bool]


class FixedMasks:
    """Masks of some parameters of `model`, and what keeps them while it is trained.

    masks  by parameter name, bool of the parameter's shape, True = kept; of a tied parameter under any of its names

    Nothing is changed until `apply` or `attach`. Raises ValueError for a name that is no parameter, a mask of another
    shape or dtype, two names of one parameter with different masks, and a parameter on the meta device.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]):
        self._model = model
        self._parameters: dict[str, nn.Parameter] = {}
        self._kept: dict[str, Tensor] = {}
        self._handles: dict[int, list] = {}
        named, first = dict(model.named_parameters(remove_duplicate=False)), {}
        for name, mask in masks.items():
            if name not in named:
                raise ValueError(f"{name!r} is no parameter of {type(model).__name__}; {_near(name, named)}")
            parameter = named[name]
            if mask.dtype != torch.bool or mask.shape != parameter.shape or not mask.dim():
                raise ValueError(
                    f"{name}: a mask must be bool of the parameter's shape {list(parameter.shape)}, "
                    f"got {list(mask.shape)} of {mask.dtype}"
                )
            if parameter.is_meta:
                raise ValueError(f"{name}: the weight is on the meta device; load the model without offloading")
            # a copy: whoever made the mask may change it
            kept = mask.detach().to(parameter.device, copy=True)
            if (other := first.setdefault(id(parameter), name)) != name:
                if not torch.equal(kept, self._kept[other]):
                    raise ValueError(f"{name} and {other} are one tied parameter, and their masks differ")
                continue
            self._parameters[name], self._kept[name] = parameter, kept

    @classmethod
    def of(cls, model: nn.Module, select: Select | None = None) -> "FixedMasks":
        """The zeros that are there as the masks; a parameter without zeros gets none.

        select  called with name and parameter; None: every matrix (and convolution, and stack of experts) that is no
                embedding, because the zeros of a bias or of a padding row were not pruned

        Raises ValueError when nothing holds a zero, and for a matrix that holds nothing else: LoRA starts with such
        ones, and a mask would keep it there for good. `select` says which is meant.
        """
        embeddings = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
            for parameter in module.parameters(recurse=False)
        }
        masks = {}
        for name, parameter in model.named_parameters():
            if not (select(name, parameter) if select else parameter.dim() > 1 and id(parameter) not in embeddings):
                continue
            kept = parameter.detach() != 0
            if select is None and kept.numel() and not kept.any():
                raise ValueError(
                    f"{name}: all of its weights are zero, and a mask would keep them so; say with `select` which "
                    "parameters were pruned"
                )
            if not kept.all():
                masks[name] = kept
        if not masks:
            raise ValueError(f"no selected weight of {type(model).__name__} holds a zero; prune it first")
        return cls(model, masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """By parameter name, bool, True = kept: copies."""
        return {name: kept.clone() for name, kept in self._kept.items()}

    @property
    def sparsity(self) -> float:
        """The fraction pruned of all weights that have a mask."""
        size = sum(kept.numel() for kept in self._kept.values())
        return 1 - sum(int(kept.sum()) for kept in self._kept.values()) / max(size, 1)

    def attach(self, optimizer: Optimizer) -> "FixedMasks":
        """Zero the pruned weights now and after every step of `optimizer`; attaching twice is attaching once.

        Several optimizers may share a model. Returns self. Raises ValueError when the optimizer holds none of the
        masked parameters, and for an LBFGS that has stepped already: its directions are of unpruned steps.
        """
        optimizer = innermost(optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in self._parameters.values()):
            raise ValueError(
                "the optimizer holds none of the masked parameters; make it from the parameters of this model"
            )
        if isinstance(optimizer, LBFGS) and optimizer.state:
            raise ValueError("LBFGS has stepped before the masks were attached; attach them to a new one")
        if not self._handles:
            # of frozen ones no gradient is computed
            trained = (p for p in self._parameters.items() if p[1].requires_grad)
            self._handles[0] = [parameter.register_hook(self._gradient_hook(name)) for name, parameter in trained]
        if id(optimizer) not in self._handles:
            self._handles[id(optimizer)] = [
                optimizer.register_step_pre_hook(lambda *_: self._before_step()),
                optimizer.register_step_post_hook(lambda optimizer, *_: self._after_step(optimizer)),
            ]
        self._after_step(optimizer)
        return self

    def detach(self) -> None:
        """Let go of every optimizer and gradient; what is zero stays zero until it is trained."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def apply(self) -> None:
        """Set every pruned weight to +0.0 now."""
        for _, parameter, kept in self._current():
            _keep(parameter, kept)

    def check(self) -> None:
        """Raises ValueError unless every pruned weight is exactly +0.0, and every parameter the one that was masked."""
        for name, parameter, kept in self._current():
            values = parameter.detach()[~kept]
            if moved := int(((values != 0) | values.signbit()).sum()):
                raise ValueError(
                    f"{name}: {moved} of {len(values)} pruned weights are not +0.0; attach the masks to every "
                    "optimizer, and do not write to the weights between its steps"
                )

    def _current(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        for name, parameter in self._parameters.items():
            module, _, leaf = name.rpartition(".")
            if self._model.get_submodule(module)._parameters.get(leaf) is not parameter:
                raise ValueError(
                    f"{name} is another tensor than the one that was masked; make the masks and the optimizer after "
                    "whatever replaces parameters"
                )
            if self._kept[name].device != parameter.device:
                self._kept[name] = self._kept[name].to(parameter.device)
            yield name, parameter, self._kept[name]

    def _gradient_hook(self, name: str) -> Callable[[Tensor], Tensor]:
        def masked(gradient: Tensor) -> Tensor:
            if gradient.layout != torch.strided:
                raise ValueError(f"{name}: its gradient is sparse, and masks need a dense one; build it sparse=False")
            kept = self._kept[name].to(gradient.device)
            if gradient.requires_grad:
                # of a gradient that is itself differentiated
                return gradient.masked_fill(~kept, 0)
            return _keep(gradient.clone(), kept)

        return masked

    @torch.no_grad()
    def _before_step(self) -> None:
        # a gradient may be older than the masks, or written by hand
        for _, parameter, kept in self._current():
            if parameter.grad is not None:
                _keep(parameter.grad, kept)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer) -> None:
        for _, parameter, kept in self._current():
            _keep(parameter, kept)
            for state in optimizer.state.get(parameter, {}).values():
                # a quantised state has codes, of which 0 need not mean zero; its gradients were always 0
                if isinstance(state, Tensor) and state.shape == parameter.shape and not _is_code(state):
                    _keep(state, kept)


def _keep(tensor: Tensor, kept: Tensor) -> Tensor:
    """+0.0 in place where `kept` is False, whatever stood there: NaN too. Returns `tensor`."""
    if tensor.is_complex():
        return tensor.masked_fill_(~kept, 0)
    # its bits as integers, times 0 or 1: several times faster than masked_fill_, which branches on every element
    tensor.detach().view(BITS[tensor.element_size()]).mul_(kept)
    return tensor


def innermost(optimizer: Optimizer) -> Optimizer:
    """What a wrapper such as accelerate's steps in the end; an optimizer that wraps none comes back."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _is_code(state: Tensor) -> bool:
    return not (state.is_floating_point() or state.is_complex())


def _near(name: str, named: Mapping[str, nn.Parameter]) -> str:
    """The parameters that end alike, or else the first ones."""
    leaf = name.rpartition(".")[2]
    alike = [other for other in named if other.rpartition(".")[2] == leaf] or list(named)
    return f"it has {', '.join(alike[:3])}{', ...' if len(alike) > 3 else ''}" if alike else "it has none"
