"""ImageNet-ReaL and ObjectNet as their authors define them, against a loop over timm's logits; no file of theirs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_vit.evaluate import metrics
from ssl_vit.evaluate.label_sets import read_class_map, read_label_sets
from ssl_vit.evaluate.metrics import Predictions
from ssl_vit.exits import DATA, Refusal
from tests import frozen

NAMES = [f"n{number:08d}" for number in range(8)]
NUMBERED = [f"{NAMES[(5 * i + 3) % 8]}/ILSVRC2012_val_{i:08d}.png" for i in range(1, 49)]
"""Entry i of the list is the image of number i + 1; class folders bring them in another order."""
PLAIN = [f"{name.split('/')[0]}/{'abc'[i % 3]}{i:02d}.png" for i, name in enumerate(NUMBERED)]


def label_sets(count: int, classes: int, empty: int, seed: int = 0) -> list[list[int]]:
    """A list of the shape of the real one: so many empty, most of one label, some of several, one of nine."""
    random = np.random.default_rng(seed)
    sizes = np.minimum(random.choice([1, 2, 3, 4], count, p=[0.84, 0.11, 0.03, 0.02]), classes)
    sizes[random.permutation(count)[:empty]] = 0
    sizes[np.flatnonzero(sizes)[0]] = min(9, classes)
    return [random.permutation(classes)[:size].tolist() for size in sizes]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """The images, numbered/ and plain/, and a classifier of their eight classes."""
    folder = tmp_path_factory.mktemp("real")
    frozen.draw(folder / "numbered", NUMBERED)
    frozen.draw(folder / "plain", PLAIN)
    model = frozen.classifier(folder / "classifier", NAMES)
    top = frozen.logits(model, [folder / "numbered" / name for name in NUMBERED]).argmax(1)
    assert len(set(top.tolist())) >= 4, "an oracle that always says the same is none"
    return folder, model


def words(folder: Path, run: Path, val: str, *more: str) -> list[str]:
    first = ["methods=classifier", f"encoder={folder}/classifier", f"data.val={folder}/{val}", f"run={run}"]
    return [*first, "data.workers=0", "metrics.bootstrap=50", *more]


def expected(scores: np.ndarray, accepted: list[Any]) -> dict[str, float]:
    """The share of images whose best, or one of the five best, is accepted; without those that accept nothing."""
    used = [i for i, one in enumerate(accepted) if len(one)]
    best = np.argsort(-scores, axis=1)[:, :5]
    right = [[bool(set(best[i, :k].tolist()) & set(accepted[i])) for i in used] for k in (1, 5)]
    return {"top1": float(np.mean(right[0])), "top5": float(np.mean(right[1])), "samples": len(used)}


@pytest.mark.parametrize("form", ["numbers", "file names", "plain names"])
def test_real_is_measured_by_file_name_whatever_the_folders(form: str, given, tmp_path: Path):
    folder, model = given
    val = "plain" if form == "plain names" else "numbered"
    files = sorted((folder / val).rglob("*.png"), key=lambda path: path.name)
    sets = label_sets(48, 8, empty=5)
    content = {path.name: one for path, one in zip(files, sets, strict=True)} if form == "file names" else sets
    (tmp_path / "real.json").write_text(json.dumps(content))
    run = tmp_path / "run"
    frozen.run_tool("evaluate", words(folder, run, val, f"metrics.label_sets={tmp_path}/real.json"), tmp_path)
    found, scores = frozen.results(run), frozen.logits(model, files)
    want = expected(scores, sets)
    assert want["samples"] == 43
    assert 0 < want["top1"] < want["top5"]
    assert frozen.find(found, "label_sets") == pytest.approx(want)
    labels = [[NAMES.index(path.parent.name)] for path in files]
    plain = expected(scores, labels)
    assert {name: frozen.find(found, name) for name in ("top1", "top5")} == pytest.approx(
        {name: plain[name] for name in ("top1", "top5")}
    )


ROW = label_sets(48, 8, 3)
BAD = {
    "too short": (NUMBERED, ROW[:-1]),
    "too short without numbers": (PLAIN, ROW[:-1]),
    "too long without numbers": (PLAIN, [*ROW, [1]]),
    "a list for names that are there twice": ([f"{'ab'[i % 2]}/{i // 2}.png" for i in range(48)], ROW),
    "an image of number 0": ([*NUMBERED[:-1], "n/ILSVRC2012_val_00000000.png"], ROW),
    "a class that is none": (NUMBERED, [*ROW[:-1], [8]]),
    "a negative class": (NUMBERED, [*ROW[:-1], [-1]]),
    "a name": (NUMBERED, [*ROW[:-1], "n00000001"]),
    "a number as text": (NUMBERED, [*ROW[:-1], ["1"]]),
    "truth": (NUMBERED, [*ROW[:-1], [True]]),
    "no lists": (NUMBERED, list(range(48))),
    "fractions": (NUMBERED, [*ROW[:-1], [1.5]]),
    "none of the files": (NUMBERED, {"other.png": [1]}),
    "a number alone": (NUMBERED, 7),
    "nothing": (NUMBERED, None),
    "names that are there twice": (["a/0.png", "b/0.png"], {"0.png": [1]}),
}


@pytest.mark.parametrize("what", [*BAD, "no JSON", "deep", "no file", "a folder"])
def test_label_sets_that_do_not_fit_are_refused(what: str, tmp_path: Path):
    path, keys = tmp_path / "real.json", NUMBERED
    if what in BAD:
        keys, content = BAD[what]
        path.write_text(json.dumps(content))
    elif what == "no JSON":
        path.write_bytes(b"[[1], [2]\xff")
    elif what == "deep":
        path.write_text("[" * 100_000)
    elif what == "a folder":
        path.mkdir()
    with pytest.raises(Refusal) as said:
        read_label_sets(str(path), keys, 8)
    assert said.value.code == DATA
    assert "real.json" in said.value.message
    assert "\n" not in said.value.message
    assert len(said.value.message) < 400


def test_a_part_of_imagenet_takes_its_numbers_of_the_whole_list(tmp_path: Path):
    """Ten images of fifty thousand, with and without a suffix, as shards of others name them."""
    sets = label_sets(50_000, 1000, empty=3163)
    (tmp_path / "real.json").write_text(json.dumps(sets))
    numbers = [1, 2, 293, 3163, 9999, 12345, 43210, 49999, 50_000, 7]
    keys = [f"val-{i % 3}/ILSVRC2012_val_{number:08d}{('', '.JPEG')[i % 2]}" for i, number in enumerate(numbers)]
    assert read_label_sets(str(tmp_path / "real.json"), keys, 1000) == [sets[number - 1] for number in numbers]
    with pytest.raises(Refusal, match="50001"):
        read_label_sets(str(tmp_path / "real.json"), [*keys, "ILSVRC2012_val_00050001.JPEG"], 1000)


OBJECTS = [f"ball/{i}.png" for i in range(12)] + [f"cup & saucer/{i}.png" for i in range(9)]
OBJECTS += [f"junk/{i}.png" for i in range(6)]
MAP = {"ball": [0, 3], "cup & saucer": [NAMES[5]]}


def test_objectnet_by_a_class_map(given, tmp_path: Path):
    """C5.5: any of a folder's classes is right, folders without one are left out, over all classes and over mapped."""
    folder, model = given
    frozen.draw(tmp_path / "objects", OBJECTS, seed=3)
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    run = tmp_path / "run"
    given_words = words(folder, run, "numbered", f"metrics.class_map={tmp_path}/map.json")
    given_words[2] = f"data.val={tmp_path}/objects"
    frozen.run_tool("evaluate", given_words, tmp_path)
    scores = frozen.logits(model, [tmp_path / "objects" / name for name in OBJECTS])
    accepted = [[0, 3]] * 12 + [[5]] * 9 + [[]] * 6
    found = frozen.results(run)
    every, mapped = frozen.find(found, "mapped"), frozen.find(found, "mapped_only")
    want = expected(scores, accepted)
    assert {name: every[name] for name in ("top1", "top5")} == pytest.approx(
        {name: want[name] for name in ("top1", "top5")}
    )
    only = np.full_like(scores, -np.inf)
    only[:, [0, 3, 5]] = scores[:, [0, 3, 5]]
    best = expected(only, accepted)
    assert mapped["top1"] == pytest.approx(best["top1"])
    assert mapped["top5"] == 1.0, "of three mapped classes each is among the five best"
    assert frozen.find(found, "samples") == 21
    assert mapped["top1"] >= every["top1"]
    assert every["top5"] >= every["top1"]
    assert every["top1"] != best["top1"], "the two have to differ for this to show anything"


MAPS: dict[str, Any] = {
    "a class that is none": {"ball": [8]},
    "a name that no class has": {"ball": ["n99999999"]},
    "a negative class": {"ball": [-1]},
    "folders that are none of the data's": {"nothing": [0]},
    "no folder": {},
    "a list": [],
    "a list in a list": {"ball": [[1]]},
    "an object in it": {"ball": {"n00000001": 1}},
    "a fraction": {"ball": [1.0]},
    "truth": {"ball": True},
    "nothing": {"ball": None},
    "a number": 5,
}


@pytest.mark.parametrize("what", list(MAPS))
def test_a_class_map_that_does_not_fit_is_refused(what: str, tmp_path: Path):
    (tmp_path / "map.json").write_text(json.dumps(MAPS[what]))
    with pytest.raises(Refusal) as said:
        read_class_map(str(tmp_path / "map.json"), ["ball", "cup & saucer", "junk"], NAMES)
    assert said.value.code == DATA
    assert "map.json" in said.value.message


def test_a_class_map_is_by_number_or_name(tmp_path: Path):
    """Also of classes whose names are numbers: a text is a name."""
    (tmp_path / "map.json").write_text(json.dumps({"ball": [0, "1"], "cup": "2", "hat": 2}))
    found = read_class_map(str(tmp_path / "map.json"), ["cup", "junk", "ball", "hat"], ["2", "1", "0"])
    assert found == [[0], [], [0, 1], [2]]


def test_class_sets_that_differ_are_refused_without_a_map(given, tmp_path: Path):
    frozen.draw(tmp_path / "objects", OBJECTS[::4])
    given_words = words(given[0], tmp_path / "run", "numbered")
    given_words[2] = f"data.val={tmp_path}/objects"
    assert "class" in frozen.refused("evaluate", given_words, tmp_path)


@pytest.fixture(scope="module")
def of_real_size() -> tuple[list[list[int]], Predictions]:
    """50,000 lists of which 3,163 are empty, and predictions that are the first label of each (0 where empty)."""
    sets = label_sets(50_000, 999, empty=3163)
    first = np.array([one[0] if one else 0 for one in sets])
    top = np.stack([first, *((first + k) % 1000 for k in range(1, 5))], 1)
    ids = np.arange(50_000)
    return sets, Predictions(ids, np.zeros(50_000, np.int64), top, np.full((50_000, 5), 0.2, np.float32))


def test_the_denominator_is_the_images_that_have_labels(of_real_size):
    """C5.4a and b."""
    sets, found = of_real_size
    assert metrics.accuracy(found, 1000, sets) == {"top1": 1.0, "top5": 1.0, "samples": 46_837}
    absent = Predictions(found.samples, found.labels, np.full((50_000, 1), 999), found.scores[:, :1])
    assert metrics.accuracy(absent, 1000, sets) == {"top1": 0.0, "top5": 0.0, "samples": 46_837}


def test_a_label_anywhere_in_the_set_is_right(of_real_size):
    sets, found = of_real_size
    last = np.array([[one[-1] if one else 0] for one in sets])
    turned = Predictions(found.samples, found.labels, last, found.scores[:, :1])
    assert metrics.accuracy(turned, 1000, sets)["top1"] == 1.0
