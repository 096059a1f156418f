"""tools/evaluate.py methods=classifier and predict.py: a classifier that timm wrote, its tables, what it cannot be.

ImageNet-ReaL and ObjectNet as their authors define them, against a loop over timm's logits; no file of theirs.
"""

import csv
import io
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn import metrics as theirs

from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate import metrics
from ssl_vit.evaluate.label_sets import read_class_map, read_label_sets
from ssl_vit.evaluate.metrics import Predictions
from tests import evaluate_cases

NAMES = sorted(["a|b", "<script>alert(1)", "two\nlines", "a,b", 'say "x"', "Blüte 花", "=1+1"])
COUNTS = {name: 3 + i for i, name in enumerate(NAMES)}
FILES = ["0.png", "a/b c/1.png", "a/2,3.png", 'a/"q".png', "ä/花.png", "z/two\nlines.png", "A.PNG"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """shards/ of classes with names of all kinds, a finetuned run's classifier/ of the same, and pictures/."""
    folder = tmp_path_factory.mktemp("classifier")
    evaluate_cases.write_shards(folder, evaluate_cases.image_names(dict.fromkeys(NAMES, 1), COUNTS))
    evaluate_cases.draw_blocks(folder / "pictures", FILES)
    return folder, evaluate_cases.write_classifier(folder / "run" / "classifier", NAMES)


def evaluate_args(folder: Path, run: Path, val: Path | None = None, *extra_args: str) -> list[str]:
    base_args = [f"encoder={folder}/run/classifier", f"data.val={val or folder / 'shards' / 'val'}", f"run={run}"]
    return [*base_args, "methods=classifier", "data.workers=0", "metrics.bootstrap=20", "batch=5", *extra_args]


@pytest.fixture(scope="module")
def run(given: tuple[Path, torch.nn.Module]) -> Path:
    folder, _ = given
    evaluate_cases.run_tool("evaluate", evaluate_args(folder, folder / "done"), folder)
    return folder / "done"


def timm_predictions(folder_and_model: tuple[Path, torch.nn.Module]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """timm's scores, the labels and the names of all images of val."""
    folder, model = folder_and_model
    files = [folder / "images" / "val" / name / f"{i}.png" for name in NAMES for i in range(COUNTS[name])]
    labels = np.array([NAMES.index(path.parent.name) for path in files])
    return (
        evaluate_cases.timm_logits(model, files),
        labels,
        [str(path.relative_to(folder / "images")) for path in files],
    )


def test_the_numbers_are_scikit_learns_of_timms_scores(given, run: Path):
    scores, labels, _ = timm_predictions(given)
    results, predicted = evaluate_cases.read_results(run), scores.argmax(1)
    assert results["top1"] == pytest.approx(theirs.accuracy_score(labels, predicted))
    assert results["top5"] == pytest.approx(theirs.top_k_accuracy_score(labels, scores, k=5))
    assert results["mean_per_class"] == pytest.approx(theirs.balanced_accuracy_score(labels, predicted))
    assert results["samples"] == len(labels)
    assert results["loss"] == pytest.approx(theirs.log_loss(labels, torch.tensor(scores).softmax(1).numpy()), rel=1e-4)
    assert 0 < results["top1"] < results["top5"] < 1


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} == {len(rows[0])}
    return rows


def test_the_tables_hold_every_image_and_class(given, run: Path):
    scores, labels, keys = timm_predictions(given)
    header, *rows = read_csv(run / "predictions.csv")
    assert header[:5] == ["sample", "key", "label", "top1", "score1"]
    assert sorted(row[1] for row in rows) == sorted(keys)
    best = {
        key: [NAMES[i] for i in np.argsort(-image_scores)[:5]] for key, image_scores in zip(keys, scores, strict=True)
    }
    assert {row[1]: row[3::2] for row in rows} == best
    assert all(row[2] == row[1].split("/")[1] for row in rows)
    header, *rows = read_csv(run / "confusion.csv")
    assert header[1:] == [row[0] for row in rows] == NAMES
    expected = theirs.confusion_matrix(labels, scores.argmax(1), labels=range(len(NAMES)))
    assert [[int(cell) for cell in row[1:]] for row in rows] == expected.tolist()
    assert [(row[0], int(row[1])) for row in read_csv(run / "per_class.csv")[1:]] == list(COUNTS.items())
    assert not any("<script" in (run / name).read_text() for name in ("report.html", "report.md"))


@pytest.mark.process
@pytest.mark.ranks
def test_processes_give_the_same_numbers_as_one(given, run: Path, tmp_path: Path):
    evaluate_cases.run_tool("evaluate", evaluate_args(given[0], tmp_path / "run"), tmp_path, world=2)
    actual, expected = evaluate_cases.measured_results(tmp_path / "run"), evaluate_cases.measured_results(run)
    assert actual.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
    assert actual == expected
    for name in ("predictions.csv", "confusion.csv", "per_class.csv"):
        assert (tmp_path / "run" / name).read_text() == (run / name).read_text()


def test_what_has_no_classifier_is_refused(given, tmp_path: Path):
    evaluate_cases.export_tiny_encoder(tmp_path / "bare")
    evaluate_cases.write_classifier(tmp_path / "other", [*NAMES[:-1], "zebra"])
    for message, override in [
        ("classifier", f"encoder={tmp_path}/bare"),
        ("alone", "methods=classifier,knn"),
        ("class_map", f"encoder={tmp_path}/other"),
    ]:
        assert message in evaluate_cases.refusal_line(
            "evaluate", [*evaluate_args(given[0], tmp_path / "run"), override], tmp_path
        )


@pytest.mark.parametrize("tool", ["evaluate", "predict"])
def test_a_classifier_of_nan_is_refused(tool: str, given, tmp_path: Path):
    folder = given[0]
    evaluate_cases.write_classifier(tmp_path / "sick", NAMES)
    tensors = load_file(tmp_path / "sick" / "model.safetensors")
    tensors["head.bias"][1] = float("nan")
    save_file(tensors, tmp_path / "sick" / "model.safetensors", metadata={"format": "pt"})
    args = [*evaluate_args(folder, tmp_path / "run"), f"encoder={tmp_path}/sick"]
    if tool == "predict":
        args = predict_args(tmp_path / "sick", folder / "pictures", tmp_path / "out.csv")
    evaluate_cases.refusal_line(tool, args, tmp_path)


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


@pytest.mark.parametrize("what", list(ARCHITECTURES))
def test_another_architecture_is_timms_or_is_refused(what: str, given, tmp_path: Path):
    """Never silently something else."""
    arguments, known = ARCHITECTURES[what]
    folder = given[0]
    model = evaluate_cases.write_classifier(tmp_path / "made", NAMES, **arguments)
    args = [*evaluate_args(folder, tmp_path / "run"), f"encoder={tmp_path}/made"]
    if known:
        evaluate_cases.run_tool("evaluate", args, tmp_path)
        scores, labels, _ = timm_predictions((folder, model))
        assert evaluate_cases.read_results(tmp_path / "run")["top1"] == pytest.approx(
            np.mean(scores.argmax(1) == labels)
        )
    else:
        evaluate_cases.refusal_line("evaluate", args, tmp_path)


# --- several labels an image (ImageNet-ReaL), several classes a label (ObjectNet)

WNIDS = [f"n{number:08d}" for number in range(8)]
NUMBERED = [f"{WNIDS[(5 * i + 3) % 8]}/ILSVRC2012_val_{i:08d}.png" for i in range(1, 49)]
"""Entry i of the list is the image of number i + 1; class folders bring them in another order."""
UNNUMBERED = [f"{name.split('/')[0]}/{'abc'[i % 3]}{i:02d}.png" for i, name in enumerate(NUMBERED)]


def random_label_sets(count: int, classes: int, empty: int, seed: int = 0) -> list[list[int]]:
    """A list of the shape of the real one: so many empty, most of one label, some of several, one of nine."""
    random = np.random.default_rng(seed)
    sizes = np.minimum(random.choice([1, 2, 3, 4], count, p=[0.84, 0.11, 0.03, 0.02]), classes)
    sizes[random.permutation(count)[:empty]] = 0
    sizes[np.flatnonzero(sizes)[0]] = min(9, classes)
    first = random.integers(classes, size=count)
    return [[(label + 7 * k) % classes for k in range(size)] for label, size in zip(first.tolist(), sizes, strict=True)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """The images, numbered/ and plain/, and a classifier of their eight classes."""
    folder = tmp_path_factory.mktemp("real")
    evaluate_cases.draw_blocks(folder / "numbered", NUMBERED)
    evaluate_cases.draw_blocks(folder / "plain", UNNUMBERED)
    model = evaluate_cases.write_classifier(folder / "run" / "classifier", WNIDS)
    top = evaluate_cases.timm_logits(model, [folder / "numbered" / name for name in NUMBERED]).argmax(1)
    assert len(set(top.tolist())) >= 4, "an oracle that always says the same is none"
    return folder, model


def expected_accuracy(scores: np.ndarray, accepted: list[Any]) -> dict[str, float]:
    """The share of images whose best, or one of the five best, is accepted; without those that accept nothing."""
    used = [i for i, classes in enumerate(accepted) if len(classes)]
    best = np.argsort(-scores, axis=1)[:, :5]
    correct = [[bool(set(best[i, :k].tolist()) & set(accepted[i])) for i in used] for k in (1, 5)]
    return {"top1": float(np.mean(correct[0])), "top5": float(np.mean(correct[1])), "samples": len(used)}


def top_accuracies(results: dict[str, Any]) -> dict[str, float]:
    return {name: evaluate_cases.find_value(results, name) for name in ("top1", "top5")}


@pytest.mark.parametrize("form", ["numbers", "file names", "plain names"])
def test_real_is_measured_by_file_name_whatever_the_folders(form: str, real, tmp_path: Path):
    folder, model = real
    val = "plain" if form == "plain names" else "numbered"
    files = sorted((folder / val).rglob("*.png"), key=lambda path: path.name)
    sets = random_label_sets(48, 8, empty=5)
    content = {path.name: labels for path, labels in zip(files, sets, strict=True)} if form == "file names" else sets
    (tmp_path / "real.json").write_text(json.dumps(content))
    run = tmp_path / "run"
    option = f"metrics.label_sets={tmp_path}/real.json"
    evaluate_cases.run_tool("evaluate", evaluate_args(folder, run, folder / val, option), tmp_path)
    results, scores = evaluate_cases.read_results(run), evaluate_cases.timm_logits(model, files)
    expected = expected_accuracy(scores, sets)
    assert expected["samples"] == 43
    assert 0 < expected["top1"] < expected["top5"]
    assert evaluate_cases.find_value(results, "label_sets") == pytest.approx(expected)
    single_label = expected_accuracy(scores, [[WNIDS.index(path.parent.name)] for path in files])
    assert top_accuracies(results) == pytest.approx(top_accuracies(single_label))


LABEL_SETS = random_label_sets(48, 8, 3)
BAD: dict[str, tuple[list[str], Any]] = {
    "too short": (NUMBERED, LABEL_SETS[:-1]),
    "too long without numbers": (UNNUMBERED, [*LABEL_SETS, [1]]),
    "a list for names that are there twice": ([f"{'ab'[i % 2]}/{i // 2}.png" for i in range(48)], LABEL_SETS),
    "an image of number 0": ([*NUMBERED[:-1], "n/ILSVRC2012_val_00000000.png"], LABEL_SETS),
    "a class that is none": (NUMBERED, [*LABEL_SETS[:-1], [8]]),
    "a negative class": (NUMBERED, [*LABEL_SETS[:-1], [-1]]),
    "a number as text": (NUMBERED, [*LABEL_SETS[:-1], ["1"]]),
    "truth": (NUMBERED, [*LABEL_SETS[:-1], [True]]),
    "no lists": (NUMBERED, list(range(48))),
    "none of the files": (NUMBERED, {"other.png": [1]}),
    "nothing": (NUMBERED, None),
    "names that are there twice": (["a/0.png", "b/0.png"], {"0.png": [1]}),
    "no JSON": (NUMBERED, b"[[1], [2]\xff"),
    "deep": (NUMBERED, b"[" * 100_000),
}


MAPS: list[Any] = [  # a class, name or folder that is none; of a wrong form
    *({"ball": [8]}, {"ball": ["n99999999"]}, {"ball": [-1]}, {"nothing": [0]}, {}),
    *([], {"ball": {"n00000001": 1}}, {"ball": [1.0]}, {"ball": True}),
]


@pytest.mark.parametrize("what", [*BAD, "no file", "a folder", *range(len(MAPS))])
def test_label_sets_and_class_maps_that_do_not_fit_are_refused(what: Any, tmp_path: Path):
    path, (keys, content) = tmp_path / "real.json", BAD.get(what, (NUMBERED, None))
    if what == "a folder":
        path.mkdir()
    elif what != "no file":
        content = content if what in BAD else MAPS[what]
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    reader: Any = partial(read_label_sets, str(path), keys, 8)
    if isinstance(what, int):
        reader = partial(read_class_map, str(path), ["ball", "cup & saucer", "junk"], WNIDS)
    with pytest.raises(ExitError, match=r"real\.json") as error:
        reader()
    assert error.value.code == ExitCode.DATA
    assert "\n" not in error.value.message
    assert len(error.value.message) < 400


def test_a_part_of_imagenet_takes_its_numbers_of_the_whole_list(tmp_path: Path):
    """Ten images of fifty thousand, with and without a suffix, as shards of others name them."""
    sets = random_label_sets(50_000, 1000, empty=3163)
    (tmp_path / "real.json").write_text(json.dumps(sets))
    numbers = [1, 2, 293, 3163, 9999, 12345, 43210, 49999, 50_000, 7]
    keys = [f"val-{i % 3}/ILSVRC2012_val_{number:08d}{('', '.JPEG')[i % 2]}" for i, number in enumerate(numbers)]
    assert read_label_sets(str(tmp_path / "real.json"), keys, 1000) == [sets[number - 1] for number in numbers]
    with pytest.raises(ExitError, match="50001"):
        read_label_sets(str(tmp_path / "real.json"), [*keys, "ILSVRC2012_val_00050001.JPEG"], 1000)


OBJECTS = [f"ball/{i}.png" for i in range(12)] + [f"cup & saucer/{i}.png" for i in range(9)]
OBJECTS += [f"junk/{i}.png" for i in range(6)]
MAP = {"ball": [0, 3], "cup & saucer": [WNIDS[5]]}


def test_objectnet_by_a_class_map(real, tmp_path: Path):
    """C5.5: any of a folder's classes is right, folders without one are left out, over all classes and over mapped."""
    folder, model = real
    evaluate_cases.draw_blocks(tmp_path / "objects", OBJECTS, seed=3)
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    run = tmp_path / "run"
    option = f"metrics.class_map={tmp_path}/map.json"
    evaluate_cases.run_tool("evaluate", evaluate_args(folder, run, tmp_path / "objects", option), tmp_path)
    scores = evaluate_cases.timm_logits(model, [tmp_path / "objects" / name for name in OBJECTS])
    accepted = [[0, 3]] * 12 + [[5]] * 9 + [[]] * 6
    results = evaluate_cases.read_results(run)
    all_classes, mapped = (
        evaluate_cases.find_value(results, "mapped"),
        evaluate_cases.find_value(results, "mapped_only"),
    )
    assert top_accuracies(all_classes) == pytest.approx(top_accuracies(expected_accuracy(scores, accepted)))
    mapped_scores = np.full_like(scores, -np.inf)
    mapped_scores[:, [0, 3, 5]] = scores[:, [0, 3, 5]]
    best = expected_accuracy(mapped_scores, accepted)
    assert mapped["top1"] == pytest.approx(best["top1"])
    assert mapped["top5"] == 1.0, "of three mapped classes each is among the five best"
    assert evaluate_cases.find_value(results, "samples") == 21
    assert mapped["top1"] >= all_classes["top1"]
    assert all_classes["top5"] >= all_classes["top1"]
    assert all_classes["top1"] != best["top1"], "the two have to differ for this to show anything"


def test_a_class_map_is_by_number_or_name(tmp_path: Path):
    """Also of classes whose names are numbers: a text is a name."""
    (tmp_path / "map.json").write_text(json.dumps({"ball": [0, "1"], "cup": "2", "hat": 2}))
    class_map = read_class_map(str(tmp_path / "map.json"), ["cup", "junk", "ball", "hat"], ["2", "1", "0"])
    assert class_map == [[0], [], [0, 1], [2]]


def test_the_denominator_is_the_images_that_have_labels():
    """C5.4a and b: of 50,000 lists 3,163 are empty; and a label anywhere in the set is right."""
    sets = random_label_sets(50_000, 999, empty=3163)
    first = np.array([accepted[0] if accepted else 0 for accepted in sets])
    top = np.stack([first, *((first + k) % 1000 for k in range(1, 5))], 1)
    labels = np.zeros(50_000, np.int64)
    predictions = Predictions(np.arange(50_000), labels, top, np.full((50_000, 5), 0.2, np.float32))
    assert metrics.accuracy(predictions, 1000, sets) == {"top1": 1.0, "top5": 1.0, "samples": 46_837}
    last = np.array([[accepted[-1] if accepted else 0] for accepted in sets])
    for top, right in ((np.full((50_000, 1), 999), 0.0), (last, 1.0)):
        replaced = Predictions(predictions.samples, predictions.labels, top, predictions.scores[:, :1])
        assert metrics.accuracy(replaced, 1000, sets) == {"top1": right, "top5": right, "samples": 46_837}


# --- tools/predict.py: a folder of images in, a CSV out


def predict_args(encoder: Path, images: Path, output: Path) -> list[str]:
    return [f"encoder={encoder}", f"input={images}", f"output={output}"]


def predict(encoder: Path, images: Path, output: Path) -> tuple[str, list[str], dict[str, list[str]]]:
    """What is said, the columns of the table, and its rows by file."""
    log = evaluate_cases.run_tool("predict", predict_args(encoder, images, output), output.parent)
    return log, *evaluate_cases.read_predictions(output)


@pytest.mark.parametrize("part", ["run", "run/classifier"])
def test_the_predictions_are_timms(part: str, given, tmp_path: Path):
    folder, model = given
    _, columns, rows = predict(folder / part, folder / "pictures", tmp_path / "predictions.csv")
    assert columns == ["file"] + [f"{prefix}{i}" for i in range(1, 6) for prefix in ("top", "score")]
    assert sorted(rows) == sorted(FILES), "named by their path in the folder"
    scores = evaluate_cases.timm_logits(model, [folder / "pictures" / name for name in FILES])
    probabilities = np.exp(scores - scores.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    for name, probability in zip(FILES, probabilities, strict=True):
        best = np.argsort(-probability)[:5]
        assert rows[name][0::2] == [NAMES[i] for i in best]
        assert [float(score) for score in rows[name][1::2]] == pytest.approx(probability[best].tolist(), abs=1e-4)


def test_fewer_classes_than_five_make_fewer_columns(given, tmp_path: Path):
    evaluate_cases.write_classifier(tmp_path / "two", ["no", "yes"])
    _, columns, rows = predict(tmp_path / "two", given[0] / "pictures", tmp_path / "out.csv")
    assert columns == ["file", "top1", "score1", "top2", "score2"]
    for first, score, _, other_score in rows.values():
        assert first in ("no", "yes")
        assert float(score) + float(other_score) == pytest.approx(1, abs=1e-4)


HOSTILE = "two\nlines\x1b[31m.png"


def write_broken_images(folder: Path) -> list[str]:
    """Files that look like images and are none."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    half = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    contents = {"empty.png": b"", "text.jpg": b"no image\n", "half.png": half, HOSTILE: b""}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return list(contents)


def test_unreadable_images_have_an_empty_row_and_a_line(given, tmp_path: Path):
    """Also one whose name would make two lines, or move a terminal's cursor."""
    bad_names = write_broken_images(tmp_path / "images")
    evaluate_cases.draw_blocks(tmp_path / "images", ["good.png"])
    log, columns, rows = predict(given[0] / "run", tmp_path / "images", tmp_path / "out.csv")
    assert sorted(rows) == sorted([*bad_names, "good.png"])
    for name in bad_names:
        assert rows[name] == [""] * (len(columns) - 1)
        parts = ("two", "lines") if name == HOSTILE else (name,)
        assert len([line for line in log.splitlines() if all(word in line for word in parts)]) == 1
    assert "\x1b" not in log
    assert rows["good.png"][0] in NAMES


def test_images_of_any_kind_are_read(given, tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8))
    for mode, name in {"L": "gray.png", "RGBA": "alpha.png", "P": "palette.png", "1": "bits.png"}.items():
        picture.convert(mode).save(images / name)
    picture.convert("CMYK").save(images / "print.jpg")
    Image.fromarray(np.zeros((5, 400), np.uint16)).save(images / "deep-and-flat.png")
    picture.resize((1, 1)).save(images / "one.webp")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(images / "turned.jpg", exif=exif)
    _, _, rows = predict(given[0] / "run", images, tmp_path / "out.csv")
    assert len(rows) == 8
    assert all(row[0] in NAMES for row in rows.values())


def test_a_file_name_that_is_not_unicode_is_no_obstacle(given, tmp_path: Path):
    evaluate_cases.draw_blocks(tmp_path / "images", ["good.png"])
    os.rename(tmp_path / "images" / "good.png", os.fsencode(tmp_path / "images") + b"/caf\xe9.png")
    ((name, row),) = predict(given[0] / "run", tmp_path / "images", tmp_path / "out.csv")[2].items()
    assert name.startswith("caf")
    assert row[0] in NAMES
    evaluate_cases.run_tool(
        "predict", predict_args(given[0] / "run", tmp_path / "images", tmp_path / "o.parquet"), tmp_path
    )


def test_what_cannot_be_done_is_refused_in_a_line(given, tmp_path: Path):
    """Nothing readable, nothing there, no classifier, nothing given; and no output that looks like one."""
    folder, _ = given
    output, run, images = tmp_path / "out.csv", folder / "run", folder / "pictures"
    write_broken_images(tmp_path / "bad")
    (tmp_path / "empty").mkdir()
    bare = evaluate_cases.export_tiny_encoder(tmp_path / "bare")
    for args, message in [
        (predict_args(run, tmp_path / "bad", output), "bad"),
        (predict_args(run, tmp_path / "empty", output), "empty"),
        (predict_args(run, tmp_path / "nowhere", output), "nowhere"),
        (predict_args(tmp_path / "none", images, output), "none"),
        (predict_args(bare, images, output), "classifier"),
        (predict_args(run, images, output)[1:], "encoder"),
        (predict_args(run, images, output)[:1], "input"),
    ]:
        assert message in evaluate_cases.refusal_line("predict", args, tmp_path)
        assert not output.exists()
