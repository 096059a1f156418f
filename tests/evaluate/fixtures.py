"""One tiny set and encoder, and what tools/evaluate.py says of them where nothing is odd."""

from pathlib import Path

import pytest

from tests import evaluate_cases
from tests.conftest import build_once


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/train and shards/val of three classes, and run/encoder; tests only read them."""

    def make(folder: Path) -> None:
        evaluate_cases.write_shards(
            folder, evaluate_cases.image_names({"a": 5, "b": 4, "c": 6}, {"a": 3, "b": 3, "c": 2}), shard_samples=4
        )
        evaluate_cases.export_tiny_encoder(folder / "run")

    return build_once(tmp_path_factory, "judged", make)


@pytest.fixture(scope="session")
def straight(given: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What an evaluation by one process measures that nothing happens to."""

    def make(folder: Path) -> None:
        evaluate_cases.run_tool("evaluate", evaluate_cases.evaluate_args(given, folder / "run"), folder)

    return evaluate_cases.measured_results(build_once(tmp_path_factory, "judged-straight", make) / "run")
