"""Polyak averaging: a copy of the weights that follows the trained one, and is evaluated and exported in its place.

The factor grows towards its value, as min(factor, (1 + n) / (10 + n)) after n updates, so that a short run is not
judged by the weights it began with; the paper (Table 2) says 0.9999 and not how it begins.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ssl_vit.model import Tensors
from ssl_vit.train.engine import Engine, full_tensor, local_shard


class Ema:
    """The average of an engine's parameters, cut over the processes as they are."""

    def __init__(self, engine: Engine, decay: float):
        self.decay, self._engine = decay, engine
        self._weights = {name: p.detach() for name, p in engine.parameters.items()}
        self._averages = {name: p.clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after the run's update number `num_updates`, from 1."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        for name, average in self._averages.items():
            average.lerp_(self._weights[name], 1 - decay)

    def state_dict(self) -> Tensors:
        """Every average, whole, on the main process's CPU; called by all processes together."""
        return self._engine.collect_on_main((name, full_tensor(average)) for name, average in self._averages.items())

    def load_state_dict(self, state: Tensors) -> None:
        """Go on from the averages of a checkpoint."""
        for name, average in self._averages.items():
            average.copy_(local_shard(state[name], average))

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
        self._engine.reshard()
