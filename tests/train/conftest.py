"""Runs that nothing happens to, which others are compared with."""

from pathlib import Path

import pytest

from tests import runs


@pytest.fixture(scope="session")
def peaceful(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run of tests/runs.py on 1 and on 2 ranks."""
    folder = tmp_path_factory.mktemp("straight")
    return {world: runs.straight(shards, folder, world) for world in (1, 2)}
