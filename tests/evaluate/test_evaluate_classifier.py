"""tools/evaluate.py methods=classifier: a classifier that timm wrote, its tables, and what it cannot be."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn import metrics as theirs

from tests import frozen
from tests.starts import Start

NAMES = sorted(["a|b", "<script>alert(1)", "two\nlines", "a,b", 'say "x"', "Blüte 花", "=1+1"])
COUNTS = {name: 3 + i for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """shards/ of classes with names of all kinds, and classifier/ of the same."""
    folder = tmp_path_factory.mktemp("classifier")
    frozen.shards(folder, frozen.files(dict.fromkeys(NAMES, 1), COUNTS))
    return folder, frozen.classifier(folder / "classifier", NAMES)


def words(folder: Path, run: Path, encoder: str = "classifier") -> list[str]:
    first = [f"encoder={folder}/{encoder}", f"data.val={folder}/shards/val", "methods=classifier", f"run={run}"]
    return [*first, "data.workers=0", "metrics.bootstrap=20", "batch=5"]


@pytest.fixture(scope="module")
def run(given: tuple[Path, torch.nn.Module]) -> Path:
    folder, _ = given
    frozen.run_tool("evaluate", words(folder, folder / "done"), folder)
    return folder / "done"


def answers(given: tuple[Path, torch.nn.Module]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """timm's scores, the labels and the names of all images of val."""
    folder, model = given
    files = [folder / "images" / "val" / name / f"{i}.png" for name in NAMES for i in range(COUNTS[name])]
    labels = np.array([NAMES.index(path.parent.name) for path in files])
    return frozen.logits(model, files), labels, [str(path.relative_to(folder / "images")) for path in files]


def test_the_numbers_are_scikit_learns_of_timms_scores(given, run: Path):
    scores, labels, _ = answers(given)
    found, first = frozen.results(run), scores.argmax(1)
    assert found["top1"] == pytest.approx(theirs.accuracy_score(labels, first))
    assert found["top5"] == pytest.approx(theirs.top_k_accuracy_score(labels, scores, k=5))
    assert found["mean_per_class"] == pytest.approx(theirs.balanced_accuracy_score(labels, first))
    assert found["samples"] == len(labels)
    assert found["loss"] == pytest.approx(theirs.log_loss(labels, torch.tensor(scores).softmax(1).numpy()), rel=1e-4)
    assert 0 < found["top1"] < found["top5"] < 1


def table(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as text:
        rows = list(csv.reader(text))
    assert {len(row) for row in rows} == {len(rows[0])}
    return rows


def test_the_tables_hold_every_image_and_class(given, run: Path):
    scores, labels, keys = answers(given)
    head, *rows = table(run / "predictions.csv")
    assert head[:5] == ["sample", "key", "label", "top1", "score1"]
    assert sorted(row[1] for row in rows) == sorted(keys)
    best = {key: [NAMES[i] for i in np.argsort(-one)[:5]] for key, one in zip(keys, scores, strict=True)}
    assert {row[1]: row[3::2] for row in rows} == best
    assert all(row[2] == row[1].split("/")[1] for row in rows)
    head, *rows = table(run / "confusion.csv")
    assert head[1:] == [row[0] for row in rows] == NAMES
    want = theirs.confusion_matrix(labels, scores.argmax(1), labels=range(len(NAMES)))
    assert [[int(cell) for cell in row[1:]] for row in rows] == want.tolist()
    head, *rows = table(run / "per_class.csv")
    assert [(row[0], int(row[1])) for row in rows] == list(COUNTS.items())


def test_the_page_shows_no_markup_of_a_name(run: Path):
    for name in ("report.html", "report.md"):
        assert "<script" not in (run / name).read_text()


def test_processes_give_the_same_numbers_as_one(given, run: Path, tmp_path: Path):
    frozen.run_tool("evaluate", words(given[0], tmp_path / "run"), tmp_path, world=2)
    mine, theirs = frozen.numbers(tmp_path / "run"), frozen.numbers(run)
    assert mine.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-6)
    assert mine == theirs
    for name in ("predictions.csv", "confusion.csv", "per_class.csv"):
        assert (tmp_path / "run" / name).read_text() == (run / name).read_text()


def test_what_has_no_classifier_is_refused(given, tmp_path: Path):
    frozen.encoder(tmp_path / "bare")
    folder = given[0]
    encoder = [*words(folder, tmp_path / "run"), f"encoder={tmp_path}/bare"]
    assert "classifier" in frozen.refused("evaluate", encoder, tmp_path)
    assert "alone" in frozen.refused("evaluate", [*words(folder, tmp_path / "run"), "methods=classifier,knn"], tmp_path)
    frozen.classifier(tmp_path / "other", [*NAMES[:-1], "zebra"])
    other = [*words(folder, tmp_path / "run"), f"encoder={tmp_path}/other"]
    assert "class_map" in frozen.refused("evaluate", other, tmp_path)


@pytest.mark.parametrize("tool", ["evaluate", "predict"])
def test_a_classifier_of_nan_is_refused(tool: str, given, tmp_path: Path):
    folder = given[0]
    frozen.classifier(tmp_path / "sick", NAMES)
    tensors = load_file(tmp_path / "sick" / "model.safetensors")
    tensors["head.bias"][1] = float("nan")
    save_file(tensors, tmp_path / "sick" / "model.safetensors", metadata={"format": "pt"})
    asked = [*words(folder, tmp_path / "run"), f"encoder={tmp_path}/sick"]
    if tool == "predict":
        asked = [f"encoder={tmp_path}/sick", f"input={folder}/images", f"output={tmp_path}/out.csv"]
    frozen.refused(tool, asked, tmp_path)


ARCHITECTURES: dict[str, tuple[dict[str, Any], bool]] = {
    "mean of the patches": ({"global_pool": "avg", "fc_norm": False}, True),
    "other heads": ({"num_heads": 4}, True),
    "a norm after pooling": ({"global_pool": "avg"}, False),
    "registers": ({"reg_tokens": 2}, False),
    "no class token": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, True),
    "layer scale": ({"init_values": 1e-3}, False),
    "no bias": ({"qkv_bias": False}, False),
    "maximum of the patches": ({"global_pool": "max", "fc_norm": False}, False),
    "another activation": ({"act_layer": "relu"}, False),
}


@pytest.mark.parametrize(
    "what",
    list(ARCHITECTURES),
)
def test_another_architecture_is_timms_or_is_refused(what: str, given, tmp_path: Path):
    """Never silently something else."""
    arguments, known = ARCHITECTURES[what]
    folder = given[0]
    model = frozen.classifier(tmp_path / "made", NAMES, **arguments)
    start = Start([*words(folder, tmp_path / "run"), f"encoder={tmp_path}/made"], tmp_path / "logs", tool="evaluate")
    codes = start.wait()
    if not known:
        assert codes in ([64], [65]), start.said()
        return
    assert codes == [0], start.said()
    scores, labels, _ = answers((folder, model))
    assert frozen.results(tmp_path / "run")["top1"] == pytest.approx(np.mean(scores.argmax(1) == labels))
