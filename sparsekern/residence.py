"""residence: where the weights of a model's blocks are while it is pruned, and what is known of blocks that are done.

InMemory is the answer of an ordinary model. A model whose weights stay on disk (streaming.py) gives another.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class InMemory:
    """All weights are there, all the time, and no block was done before.

    device   where a model on the meta device computes; None for a model whose weights are there
    checked  whether the layers were checked when a run that goes on now began
    """

    device: torch.device | None = None
    checked: bool = False

    @contextmanager
    def held(self, block: str, dense: bool = False) -> Iterator[None]:
        """While open, the block's weights are there and may be changed.

        dense  as they were before anything was pruned
        """
        yield

    def finished(self, block: str) -> Any | None:
        """What `over` was told when the block was done, by an earlier run; None when it is still to do."""

    def over(self, block: str, told: Any) -> None:
        """The block is done, and still held.

        told  what to say of it when the run goes on another time
        """
