"""Polyak averaging: a copy of the weights that follows the trained one, and is evaluated and exported in its place.

The factor grows towards its value, as min(factor, (1 + n) / (10 + n)) after n updates, so that a short run is not
judged by the weights it began with; the paper (Table 2) says 0.9999 and not how it begins.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ssl_vit.train.checkpoint import AVERAGE_PREFIX, Tensors
from ssl_vit.train.engine import Engine, full_tensor, local_shard


class Ema:
    """The average of an engine's parameters, cut over the processes as they are."""

    def __init__(self, engine: Engine, decay: float, state: Tensors):
        self.decay, self._reshard = decay, engine.reshard
        self._weights = {name: p.detach() for name, p in engine.parameters.items()}
        self._averages = {name: p.clone() for name, p in self._weights.items()}
        for name, average in self._averages.items() if state else ():
            average.copy_(local_shard(state[AVERAGE_PREFIX + name], average))

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after the run's update number `num_updates`, from 1."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        for name, average in self._averages.items():
            average.lerp_(self._weights[name], 1 - decay)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """For a checkpoint: every average, whole, one after the other; called by all processes together."""
        for name, average in self._averages.items():
            yield AVERAGE_PREFIX + name, full_tensor(average)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The averages stand in the model meanwhile, and the trained weights where the averages were."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._averages.items():
            weight = self._weights[name].clone()
            self._weights[name].copy_(average)
            average.copy_(weight)
        self._reshard()
