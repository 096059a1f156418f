"""What the tests of training share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.scenarios import Stage


@pytest.fixture
def stage(shards: Path, tmp_path: Path, tiny_run: Callable[[int], Path]) -> Stage:
    """Where scenarios are played; see tests/train/scenarios.py."""
    return Stage(shards, tmp_path, tiny_run)
