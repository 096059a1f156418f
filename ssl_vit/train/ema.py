"""Polyak averaging: a copy of the weights that follows the trained one, and is evaluated and exported in its place.

The factor grows towards its value, as min(factor, (1 + n) / (10 + n)) after n updates, so that a short run is not
judged by the weights it began with; the paper (Table 2) says 0.9999 and not how it begins.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ssl_vit.train.checkpoint import AVERAGE, Tensors
from ssl_vit.train.engine import Engine, share_of, whole


class Average:
    """The average of an engine's parameters, cut over the processes as they are."""

    def __init__(self, engine: Engine, factor: float, state: Tensors):
        self.factor, self._forget = factor, engine.forget_gathered
        self._current = {name: p.detach() for name, p in engine.parameters.items()}
        self._mean = {name: p.clone() for name, p in self._current.items()}
        for name, mean in self._mean.items() if state else ():
            mean.copy_(share_of(state[AVERAGE + name], mean))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after the run's update number `updates`, from 1."""
        factor = min(self.factor, (1 + updates) / (10 + updates))
        for name, mean in self._mean.items():
            mean.lerp_(self._current[name], 1 - factor)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """For a checkpoint: every average, whole, one after the other; called by all processes together."""
        for name, mean in self._mean.items():
            yield AVERAGE + name, whole(mean)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages stand in the model meanwhile, and the trained weights where the averages were."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, mean in self._mean.items():
            trained = self._current[name].clone()
            self._current[name].copy_(mean)
            mean.copy_(trained)
        self._forget()
