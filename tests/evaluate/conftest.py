"""One tiny set and encoder for the tests of tools/evaluate.py's refusals and faults."""

from pathlib import Path

import pytest

from tests import frozen


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/train and shards/val of three classes, and run/encoder."""
    folder = tmp_path_factory.mktemp("hard")
    frozen.shards(folder, frozen.files({"a": 5, "b": 4, "c": 6}, {"a": 3, "b": 3, "c": 2}), shard_samples=4)
    frozen.encoder(folder / "run")
    return folder
