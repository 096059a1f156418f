"""tools/predict.py: a folder of images in, a CSV out, with timm's own predictions of the same classifier in it."""

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import frozen

NAMES = ["a|b", "<script>alert(1)</script>", "two\nlines", "a,b", 'say "x"', "Blüte 花", "plain"]
FILES = ["0.png", "a/b c/1.png", "a/2,3.png", 'a/"q".png', "ä/花.png", "z/two\nlines.png", "A.PNG"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A finetuned run's classifier/ and images/."""
    folder = tmp_path_factory.mktemp("predict")
    frozen.draw(folder / "images", FILES)
    return folder, frozen.classifier(folder / "run" / "classifier", NAMES)


def read(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    with path.open(newline="", encoding="utf-8") as text:
        columns, *rows = list(csv.reader(text))
    assert all(len(row) == len(columns) for row in rows)
    found = {row[0]: row[1:] for row in rows}
    assert len(found) == len(rows), "a file has one row"
    return columns, found


def words(encoder: Path, images: Path, output: Path) -> list[str]:
    return [f"encoder={encoder}", f"input={images}", f"output={output}"]


def predict(encoder: Path, images: Path, output: Path) -> str:
    return frozen.run_tool("predict", words(encoder, images, output), output.parent)


@pytest.mark.parametrize("part", ["run", "run/classifier"])
def test_the_predictions_are_timms(part: str, given, tmp_path: Path):
    folder, model = given
    output = tmp_path / "predictions.csv"
    predict(folder / part, folder / "images", output)
    columns, rows = read(output)
    assert columns == ["file"] + [f"{what}{i}" for i in range(1, 6) for what in ("top", "score")]
    assert sorted(rows) == sorted(FILES), "named by their path in the folder"
    scores = frozen.logits(model, [folder / "images" / name for name in FILES])
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    for name, share in zip(FILES, shares, strict=True):
        best = np.argsort(-share)[:5]
        assert rows[name][0::2] == [NAMES[i] for i in best]
        assert [float(score) for score in rows[name][1::2]] == pytest.approx(share[best].tolist(), abs=1e-4)


def test_fewer_classes_than_five_make_fewer_columns(given, tmp_path: Path):
    frozen.classifier(tmp_path / "two", ["no", "yes"])
    predict(tmp_path / "two", given[0] / "images", tmp_path / "out.csv")
    columns, rows = read(tmp_path / "out.csv")
    assert columns == ["file", "top1", "score1", "top2", "score2"]
    for first, score, _, rest in rows.values():
        assert first in ("no", "yes")
        assert float(score) + float(rest) == pytest.approx(1, abs=1e-4)


HOSTILE = "two\nlines\x1b[31m.png"


def spoil(folder: Path) -> list[str]:
    """Files that look like images and are none."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    half = whole.getvalue()[: len(whole.getvalue()) // 2]
    bad = {"empty.png": b"", "text.jpg": b"no image\n", "half.png": half, HOSTILE: b""}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    return list(bad)


def test_unreadable_images_have_an_empty_row_and_a_line(given, tmp_path: Path):
    """Also one whose name would make two lines, or move a terminal's cursor."""
    bad = spoil(tmp_path / "images")
    frozen.draw(tmp_path / "images", ["good.png"])
    said = predict(given[0] / "run", tmp_path / "images", tmp_path / "out.csv")
    columns, rows = read(tmp_path / "out.csv")
    assert sorted(rows) == sorted([*bad, "good.png"])
    for name in bad:
        assert rows[name] == [""] * (len(columns) - 1)
        told = ("two", "lines") if name == HOSTILE else (name,)
        assert len([line for line in said.splitlines() if all(word in line for word in told)]) == 1
    assert "\x1b" not in said
    assert rows["good.png"][0] in NAMES


def test_images_of_any_kind_are_read(given, tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8))
    for mode, name in {"L": "grey.png", "RGBA": "alpha.png", "P": "palette.png", "1": "bits.png"}.items():
        picture.convert(mode).save(images / name)
    picture.convert("CMYK").save(images / "print.jpg")
    Image.fromarray(np.zeros((5, 400), np.uint16)).save(images / "deep-and-flat.png")
    picture.resize((1, 1)).save(images / "one.webp")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(images / "turned.jpg", exif=turned)
    predict(given[0] / "run", images, tmp_path / "out.csv")
    _, rows = read(tmp_path / "out.csv")
    assert len(rows) == 8
    assert all(row[0] in NAMES for row in rows.values())


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_name_that_is_not_unicode_is_no_obstacle(suffix: str, given, tmp_path: Path):
    frozen.draw(tmp_path / "images", ["good.png"])
    os.rename(tmp_path / "images" / "good.png", os.fsencode(tmp_path / "images") + b"/caf\xe9.png")
    output = tmp_path / f"out.{suffix}"
    predict(given[0] / "run", tmp_path / "images", output)
    if suffix == "csv":
        ((name, row),) = read(output)[1].items()
        assert name.startswith("caf")
        assert row[0] in NAMES


def test_what_cannot_be_done_is_refused_in_a_line(given, tmp_path: Path):
    """Nothing readable, nothing there, no classifier, nothing given; and no output that looks like one."""
    folder, _ = given
    output, run, images = tmp_path / "out.csv", folder / "run", folder / "images"
    spoil(tmp_path / "bad")
    (tmp_path / "empty").mkdir()
    bare = frozen.encoder(tmp_path / "bare")
    for given_words, word in [
        (words(run, tmp_path / "bad", output), "bad"),
        (words(run, tmp_path / "empty", output), "empty"),
        (words(run, tmp_path / "nowhere", output), "nowhere"),
        (words(tmp_path / "none", images, output), "none"),
        (words(bare, images, output), "classifier"),
        (words(run, images, output)[1:], "encoder"),
        (words(run, images, output)[:1], "input"),
        ([*words(run, images, output), "imput=x"], "input"),
    ]:
        assert word in frozen.refused("predict", given_words, tmp_path)
        assert not output.exists()
