"""One tiny set and encoder, and what tools/evaluate.py says of them where nothing is odd."""

from pathlib import Path

import pytest

from tests import frozen
from tests.conftest import once


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/train and shards/val of three classes, and run/encoder; tests only read them."""

    def make(folder: Path) -> None:
        frozen.shards(folder, frozen.files({"a": 5, "b": 4, "c": 6}, {"a": 3, "b": 3, "c": 2}), shard_samples=4)
        frozen.encoder(folder / "run")

    return once(tmp_path_factory, "judged", make)


@pytest.fixture(scope="session")
def straight(given: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What an evaluation by one process measures that nothing happens to."""

    def make(folder: Path) -> None:
        frozen.run_tool("evaluate", frozen.words(given, folder / "run"), folder)

    return frozen.numbers(once(tmp_path_factory, "judged-straight", make) / "run")
