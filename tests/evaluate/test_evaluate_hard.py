"""tools/evaluate.py where something is wrong, or extreme: a line and an exit code; and on several processes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.encoders import export
from ssl_vit.encoders.vit import Vit
from tests import frozen
from tests.starts import Start


def test_what_is_missing_or_unlike_is_named(given: Path, tmp_path: Path):
    other = frozen.shards(tmp_path / "other", frozen.files({"a": 2, "x": 2}, {"a": 2, "x": 2}))
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
        (64, {"data__image_size": "18"}, "patches"),
        (64, {"features__layers": "3"}, "blocks are 1 to 2"),
        (64, {"features__readouts": "max"}, "features.readouts"),
        (64, {"methods": "knn,lineer"}, "linear"),
        (64, {"knn__k": "0"}, "knn.k"),
        (64, {"knm__k": "3"}, "knm"),
        (65, {"few_shot__shots": "25,50", "methods": "few_shot"}, "few_shot"),
    ]:
        said = frozen.refused("evaluate", frozen.words(given, tmp_path / "run", **changed), tmp_path / str(code))
        assert word in said, (changed, said)
        start = Start(frozen.words(given, tmp_path / "run", **changed), tmp_path / "logs", tool="evaluate")
        assert start.wait() == [code], said
        assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("shots", ["0", "-1", "1,0"])
def test_shots_are_at_least_one(given: Path, tmp_path: Path, shots: str):
    said = frozen.refused("evaluate", frozen.words(given, tmp_path / "run", few_shot__shots=shots), tmp_path)
    assert "few_shot.shots" in said


def test_an_empty_class_is_named(given: Path, tmp_path: Path):
    made = frozen.shards(tmp_path, frozen.files({"a": 3, "c": 3}, {"a": 2, "bee": 2, "c": 2}))
    said = frozen.refused(
        "evaluate",
        frozen.words(given, tmp_path / "run", data__train=f"{made}/train", data__val=f"{made}/val"),
        tmp_path,
    )
    assert "bee" in said


def test_labels_outside_the_classes_are_counted(given: Path, tmp_path: Path):
    for split in ("train", "val"):
        shutil.copytree(given / "shards" / split, tmp_path / split)
        content = json.loads((tmp_path / split / "manifest.json").read_text())
        content["classes"] = ["a", "b"]
        (tmp_path / split / "manifest.json").write_text(json.dumps(content))
    changed = {"data__train": f"{tmp_path}/train", "data__val": f"{tmp_path}/val"}
    said = frozen.refused("evaluate", frozen.words(given, tmp_path / "run", **changed), tmp_path)
    assert "6 " in said
    assert "train" in said


def save_encoder(folder: Path, change: Callable[[Any], object], **numbers: Any) -> Path:
    made = Vit(size="Ti", width=16, depth=2, heads=2, patch=4, image=16, **numbers).build()
    change(made)
    export.export(made, folder / "encoder")
    return folder


def test_an_encoder_of_other_channels_or_of_nan_is_refused(given: Path, tmp_path: Path):
    grey = save_encoder(tmp_path / "grey", lambda made: None, channels=1)
    assert "channels" in frozen.refused("evaluate", frozen.words(given, tmp_path / "run", encoder=str(grey)), tmp_path)
    for value in (float("nan"), float("inf")):
        sick = save_encoder(
            tmp_path / "sick", lambda made, v=value: torch.nn.init.constant_(made.blocks[1].mlp.fc2.bias, v)
        )
        said = frozen.refused("evaluate", frozen.words(given, tmp_path / "run", encoder=str(sick)), tmp_path)
        assert "sick" in said or "NaN" in said or "finite" in said
        assert not (tmp_path / "run" / "results.json").exists()


def test_features_that_never_change_are_no_error(given: Path, tmp_path: Path):
    """A dead encoder: every image has the same features, and any class is as good as another."""
    dead = save_encoder(tmp_path / "dead", lambda made: [torch.nn.init.zeros_(p) for p in made.parameters()])
    frozen.run_tool("evaluate", frozen.words(given, tmp_path / "run", encoder=str(dead)), tmp_path)
    assert frozen.results(tmp_path / "run")


def test_one_image_a_class_is_enough_for_what_can_be_done_with_it(given: Path, tmp_path: Path):
    made = frozen.shards(tmp_path, frozen.files({"a": 1, "b": 1}, {"a": 1, "b": 1}))
    changed = {"data__train": f"{made}/train", "data__val": f"{made}/val", "knn__k": "20"}
    said = frozen.run_tool("evaluate", frozen.words(given, tmp_path / "run", **changed), tmp_path)
    assert len([line for line in said.splitlines() if line.startswith("few_shot.shots")]) == 2 * 1, (
        "a line for each read-out: 2 shots are left out"
    )
    assert frozen.find(frozen.results(tmp_path / "run"), "samples") == 2


@pytest.fixture(scope="module")
def straight(given: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("straight")
    frozen.run_tool("evaluate", frozen.words(given, folder / "run"), folder)
    return frozen.numbers(folder / "run")


@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_the_same_numbers_as_one(given: Path, straight: dict, tmp_path: Path, world: int):
    frozen.run_tool("evaluate", frozen.words(given, tmp_path / "run"), tmp_path, world)
    assert frozen.numbers(tmp_path / "run") == straight
