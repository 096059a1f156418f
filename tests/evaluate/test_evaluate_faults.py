"""tools/evaluate.py where images cannot be read, sources stay away, processes are killed, or share a cache."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ssl_vit import config, evaluation
from ssl_vit.data import manifest
from ssl_vit.data.samples import Samples
from ssl_vit.exits import Refusal
from ssl_vit.recipe import FOLDER
from tests import frozen
from tests.starts import Start


@pytest.fixture(scope="module")
def straight(given: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("straight")
    frozen.run_tool("evaluate", frozen.words(given, folder / "run"), folder)
    return frozen.numbers(folder / "run")


def cache(run: Path) -> list[Path]:
    return sorted(path for path in (run / "features").rglob("*.npy"))


def test_the_same_command_again_uses_the_cache_and_a_damaged_one_is_made_anew(
    given: Path, straight: dict, tmp_path: Path
):
    frozen.run_tool("evaluate", frozen.words(given, tmp_path / "run"), tmp_path)
    whole = {path: path.stat().st_mtime_ns for path in cache(tmp_path / "run")}
    assert whole
    frozen.run_tool("evaluate", frozen.words(given, tmp_path / "run"), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in cache(tmp_path / "run")} == whole
    assert frozen.numbers(tmp_path / "run") == straight
    for path in whole:
        content = np.load(path)
        np.save(path, content[::-1].copy())
    frozen.run_tool("evaluate", frozen.words(given, tmp_path / "run"), tmp_path)
    assert frozen.numbers(tmp_path / "run") == straight


@pytest.mark.parametrize("world", [1, 2])
def test_a_kill_while_features_are_made_costs_nothing_but_time(given: Path, straight: dict, tmp_path: Path, world: int):
    """At the moment the first draft of a cache is there."""
    start = Start(frozen.words(given, tmp_path / "run"), tmp_path / "logs", world, tool="evaluate")
    start.until(lambda: any((tmp_path / "run" / "features").glob(".*.tmp")) or not start.running)
    start.kill()
    start.wait()
    assert not (tmp_path / "run" / "results.json").exists(), "it was through before it was killed"
    frozen.run_tool("evaluate", frozen.words(given, tmp_path / "run"), tmp_path, world)
    assert frozen.numbers(tmp_path / "run") == straight


def test_two_at_a_time_may_share_a_cache(given: Path, straight: dict, tmp_path: Path):
    both = [
        Start(
            frozen.words(given, tmp_path / f"run{i}", features__cache=f"{tmp_path}/cache"),
            tmp_path / "logs",
            tool="evaluate",
        )
        for i in (0, 1)
    ]
    for i, start in enumerate(both):
        assert start.wait(120) == [0], start.said()
        assert frozen.numbers(tmp_path / f"run{i}") == straight


@pytest.fixture
def damaged(given: Path, tmp_path: Path) -> Path:
    """The shards once more, with one image of val damaged."""
    shutil.copytree(given / "shards", tmp_path / "shards")
    entry = manifest.load(tmp_path / "shards" / "val").index(0)[1]
    with (tmp_path / "shards" / "val" / "000000.tar").open("r+b") as file:
        file.seek(int(entry["offset"]) + 30)
        file.write(b"\0damaged\0")
    return tmp_path / "shards"


def elsewhere(made: Path) -> dict[str, str]:
    return {"data__train": f"{made}/train", "data__val": f"{made}/val"}


def test_an_image_that_cannot_be_read_is_told_and_not_counted(given: Path, damaged: Path, tmp_path: Path):
    said = frozen.run_tool("evaluate", frozen.words(given, tmp_path / "run", **elsewhere(damaged)), tmp_path)
    assert "leaves out sample 1" in said
    found = frozen.results(tmp_path / "run")
    assert frozen.find(found["rows"], "samples") == 7
    assert found["samples"] == 7
    assert frozen.find(found, "bad_samples") in (1, {"train": 0, "val": 1})


def test_an_image_that_is_mended_counts_again(given: Path, straight: dict, damaged: Path, tmp_path: Path):
    frozen.run_tool("evaluate", frozen.words(given, tmp_path / "run", **elsewhere(damaged)), tmp_path)
    shutil.copy(given / "shards" / "val" / "000000.tar", damaged / "val" / "000000.tar")
    frozen.run_tool("evaluate", frozen.words(given, tmp_path / "run", **elsewhere(damaged)), tmp_path)
    assert frozen.numbers(tmp_path / "run") == straight


def test_after_an_outage_nothing_half_is_kept(given: Path, straight: dict, tmp_path: Path, monkeypatch):
    """A source that stays away ends the evaluation; what was read until then is no split."""
    recipe = config.parse(evaluation.Evaluate, frozen.words(given, tmp_path / "run"), FOLDER)
    whole = Samples.read

    def away(samples: Samples, sample: int) -> tuple[bytes, int]:
        if sample == 5:
            raise Refusal(74, "the source stays away")
        return whole(samples, sample)

    monkeypatch.setattr(Samples, "read", away)
    with pytest.raises(Refusal, match="stays away"):
        evaluation.run(recipe)
    monkeypatch.setattr(Samples, "read", whole)
    frozen.run_tool("evaluate", frozen.words(given, tmp_path / "run"), tmp_path)
    assert frozen.numbers(tmp_path / "run") == straight


def away_for_one() -> None:
    """Rank 1's source stays away."""
    if os.environ["RANK"] == "1":
        Samples.read = _away  # type: ignore[method-assign]


def _away(samples: Samples, sample: int) -> tuple[bytes, int]:
    raise Refusal(74, "the source stays away")


def test_an_outage_of_one_process_ends_both(given: Path, tmp_path: Path):
    """Started by hand or by Slurm, no launcher ends the other."""
    start = Start(frozen.words(given, tmp_path / "run"), tmp_path / "logs", 2, prepare=away_for_one, tool="evaluate")
    assert start.wait(15) == [74, 74], start.said()
    assert not list((tmp_path / "run" / "features").glob("[0-9a-f]*"))
