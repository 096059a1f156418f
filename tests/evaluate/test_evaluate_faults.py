"""tools/evaluate.py where something is wrong, extreme, damaged, killed or shared: a line and a code, or the numbers."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_vit import config, evaluation
from ssl_vit.data import manifest
from ssl_vit.data.samples import Samples
from ssl_vit.evaluate import features
from ssl_vit.exits import Refusal
from ssl_vit.recipe import FOLDER
from tests import frozen
from tests.starts import Start

RANKS = [pytest.mark.process, pytest.mark.ranks]


def evaluate(given: Path, folder: Path, world: int = 1, **changed: str) -> str:
    """Evaluate into folder/run; what it says."""
    return frozen.run_tool("evaluate", frozen.words(given, folder / "run", **changed), folder, world)


def refused(given: Path, folder: Path, code: int | None = None, **changed: str) -> str:
    """The line with which that is refused; there are no results then."""
    said = frozen.refused("evaluate", frozen.words(given, folder / "run", **changed), folder, code)
    assert not (folder / "run" / "results.json").exists()
    return said


def on(made: Path) -> dict[str, Any]:
    return {"data__train": f"{made}/train", "data__val": f"{made}/val"}


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.ranks), pytest.param(3, marks=RANKS)])
def test_processes_give_the_same_numbers_as_one(given: Path, straight: dict, tmp_path: Path, world: int):
    evaluate(given, tmp_path, world)
    assert frozen.numbers(tmp_path / "run") == straight


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted((folder / "run" / "features").rglob("*.npy"))}


def test_the_same_command_again_uses_the_cache_and_a_damaged_one_is_made_anew(
    given: Path, straight: dict, tmp_path: Path
):
    evaluate(given, tmp_path)
    whole = stamps(tmp_path)
    assert whole
    evaluate(given, tmp_path)
    assert stamps(tmp_path) == whole
    assert frozen.numbers(tmp_path / "run") == straight
    for path in whole:
        np.save(path, np.load(path)[::-1].copy())
    evaluate(given, tmp_path)
    assert frozen.numbers(tmp_path / "run") == straight


def killed_in_its_features() -> None:
    """Have the process killed when the first draft of a cache is begun."""
    whole = features.extract

    def cut(*asked: Any) -> Iterator[Any]:
        yield next(whole(*asked))
        os.kill(os.getpid(), signal.SIGKILL)

    features.extract = cut


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=RANKS)])
def test_a_kill_while_features_are_made_costs_nothing_but_time(given: Path, straight: dict, tmp_path: Path, world: int):
    words = frozen.words(given, tmp_path / "run")
    start = Start(words, tmp_path / "logs", world, prepare=killed_in_its_features, tool="evaluate")
    assert start.wait() == [-9] * world, start.said()
    assert any((tmp_path / "run" / "features").glob(".*.tmp"))
    assert not (tmp_path / "run" / "results.json").exists()
    evaluate(given, tmp_path, world)
    assert frozen.numbers(tmp_path / "run") == straight


@pytest.mark.process
def test_two_at_a_time_may_share_a_cache(given: Path, straight: dict, tmp_path: Path):
    asked = [frozen.words(given, tmp_path / f"run{i}", features__cache=f"{tmp_path}/cache") for i in (0, 1)]
    both = [Start(words, tmp_path / "logs", tool="evaluate") for words in asked]
    for i, start in enumerate(both):
        assert start.wait(120) == [0], start.said()
        assert frozen.numbers(tmp_path / f"run{i}") == straight


def test_an_image_that_cannot_be_read_is_told_and_counts_again_when_it_is_mended(
    given: Path, straight: dict, tmp_path: Path
):
    shutil.copytree(given / "shards", tmp_path / "shards")
    damaged = tmp_path / "shards" / "val" / "000000.tar"
    entry = manifest.load(tmp_path / "shards" / "val").index(0)[1]
    with damaged.open("r+b") as file:
        file.seek(int(entry["offset"]) + 30)
        file.write(b"\0damaged\0")
    assert "leaves out sample 1" in evaluate(given, tmp_path, **on(tmp_path / "shards"))
    found = frozen.results(tmp_path / "run")
    assert frozen.find(found["rows"], "samples") == 7
    assert found["samples"] == 7
    assert frozen.find(found, "bad_samples") in (1, {"train": 0, "val": 1})
    shutil.copy(given / "shards" / "val" / "000000.tar", damaged)
    evaluate(given, tmp_path, **on(tmp_path / "shards"))
    assert frozen.numbers(tmp_path / "run") == straight


def test_after_an_outage_nothing_half_is_kept(given: Path, straight: dict, tmp_path: Path, monkeypatch):
    """A source that stays away ends the evaluation; what was read until then is no split."""
    recipe = config.parse(evaluation.Evaluate, frozen.words(given, tmp_path / "run"), FOLDER)
    whole = Samples.read
    with monkeypatch.context() as patched:
        patched.setattr(Samples, "read", lambda own, sample: (_away if sample == 5 else whole)(own, sample))
        with pytest.raises(Refusal, match="stays away"):
            evaluation.run(recipe)
    evaluate(given, tmp_path)
    assert frozen.numbers(tmp_path / "run") == straight


def away_for_one() -> None:
    """Rank 1's source stays away."""
    if os.environ["RANK"] == "1":
        Samples.read = _away  # type: ignore[method-assign]


def _away(samples: Samples, sample: int) -> tuple[bytes, int]:
    raise Refusal(74, "the source stays away")


@pytest.mark.process
@pytest.mark.ranks
def test_an_outage_of_one_process_ends_both(given: Path, tmp_path: Path):
    """Started by hand or by Slurm, no launcher ends the other."""
    start = Start(frozen.words(given, tmp_path / "run"), tmp_path / "logs", 2, prepare=away_for_one, tool="evaluate")
    assert start.wait(60) == [74, 74], start.said()
    assert not list((tmp_path / "run" / "features").glob("[0-9a-f]*"))


def test_what_is_missing_or_unlike_is_named(given: Path, tmp_path: Path):
    other = frozen.shards(tmp_path / "other", frozen.files({"a": 2, "x": 2}, {"a": 2, "x": 2}))
    lacking = frozen.shards(tmp_path / "lacking", frozen.files({"a": 3, "c": 3}, {"a": 2, "bee": 2, "c": 2}))
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    for code, changed, word in [
        (64, {"encoder": ""}, "encoder"),
        (65, {"encoder": f"{tmp_path}/nowhere"}, "nowhere"),
        (65, {"encoder": f"{tmp_path}/junk"}, "junk"),
        (64, {"data__train": ""}, "data.train"),
        (64, {"data__val": ""}, "data.val"),
        (65, {"data__train": f"{tmp_path}/nowhere"}, "nowhere"),
        (65, {"data__val": f"{tmp_path}/nowhere"}, "nowhere"),
        (65, {"data__val": f"{other}/val"}, "class"),
        (65, on(lacking), "bee"),
        (64, {"data__image_size": "18"}, "patches"),
        (64, {"features__layers": "3"}, "blocks are 1 to 2"),
        (64, {"features__readouts": "max"}, "features.readouts"),
        (64, {"methods": "knn,lineer"}, "linear"),
        (64, {"knn__k": "0"}, "knn.k"),
        (64, {"knm__k": "3"}, "knm"),
        (65, {"few_shot__shots": "25,50", "methods": "few_shot"}, "few_shot"),
        *((64, {"few_shot__shots": shots}, "few_shot.shots") for shots in ("0", "-1", "1,0")),
    ]:
        said = refused(given, tmp_path, code, **changed)
        assert word in said, (changed, said)


def test_labels_outside_the_classes_are_counted(given: Path, tmp_path: Path):
    for split in ("train", "val"):
        shutil.copytree(given / "shards" / split, tmp_path / split)
        content = json.loads((tmp_path / split / "manifest.json").read_text())
        content["classes"] = ["a", "b"]
        (tmp_path / split / "manifest.json").write_text(json.dumps(content))
    said = refused(given, tmp_path, **on(tmp_path))
    assert "6 " in said
    assert "train" in said


def test_an_encoder_of_other_channels_or_of_nan_is_refused(given: Path, tmp_path: Path):
    grey = frozen.encoder(tmp_path / "grey", channels=1)
    assert "channels" in refused(given, tmp_path, encoder=str(grey))
    for value in (float("nan"), float("inf")):
        sick = frozen.encoder(
            tmp_path / "sick", lambda made, v=value: torch.nn.init.constant_(made.blocks[1].mlp.fc2.bias, v)
        )
        said = refused(given, tmp_path, encoder=str(sick))
        assert "sick" in said or "NaN" in said or "finite" in said


def test_features_that_never_change_are_no_error(given: Path, tmp_path: Path):
    """A dead encoder: every image has the same features, and any class is as good as another."""
    dead = frozen.encoder(tmp_path / "dead", lambda made: [torch.nn.init.zeros_(p) for p in made.parameters()])
    evaluate(given, tmp_path, encoder=str(dead))
    assert frozen.results(tmp_path / "run")


def test_one_image_a_class_is_enough_for_what_can_be_done_with_it(given: Path, tmp_path: Path):
    made = frozen.shards(tmp_path, frozen.files({"a": 1, "b": 1}, {"a": 1, "b": 1}))
    said = evaluate(given, tmp_path, knn__k="20", **on(made))
    left_out = [line for line in said.splitlines() if line.startswith("few_shot.shots")]
    assert len(left_out) == 2 * 1, "a line for each read-out: 2 shots are left out"
    assert frozen.find(frozen.results(tmp_path / "run"), "samples") == 2
