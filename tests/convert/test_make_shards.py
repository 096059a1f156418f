"""What is in the shards: every image with its bytes and class, readable by offset and by webdataset itself."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_vit import errors
from ssl_vit.convert.resolve import sets
from ssl_vit.data import manifest
from ssl_vit.data.cache import Store
from tests.data.damage import within
from tests.data.pictures import CLASSES, NAMES, contents, make, members, one, picture, samples, write_pictures
from tests.data.servers import refused

pytestmark = pytest.mark.usefixtures("in_process")


def test_every_image_is_there_with_its_bytes_and_class_and_the_manifest_tells_the_truth(source: Path, tmp_path: Path):
    (source / "plants" / "notes.txt").write_text("no image")
    made = one(source, tmp_path / "out", shard_samples=5)
    found = {name: (image, CLASSES[label]) for name, (_, image, label) in samples(made).items()}
    assert found == {name: ((source / name).read_bytes(), name.rpartition("/")[0]) for name in NAMES}
    assert made.classes == CLASSES
    keys = {key for key, _, _ in samples(made).values()}
    assert all(key.isdigit() for key in keys)
    assert len(keys) == len(NAMES)

    assert manifest.load(tmp_path / "out") == made
    assert [(s.name, s.samples) for s in made.shards] == [("000000.tar", 5), ("000001.tar", 5), ("000002.tar", 2)]
    assert made.samples == json.loads((tmp_path / "out" / "manifest.json").read_text())["samples"] == 12
    for shard in made.shards:
        data = (made.folder / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    made.check()
    allowed = {f"{n:06d}.{kind}" for n in range(3) for kind in ("tar", "npy")}
    assert set(contents(tmp_path / "out")) == allowed | {"manifest.json", "sizes.json", "_info.json"}


def test_the_shuffle_is_seeded_and_global(source: Path, tmp_path: Path):
    orders = [list(samples(one(source, tmp_path / f"out{seed}", seed=seed))) for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(NAMES)
    assert all(len({name.rpartition("/")[0] for name in order[:6]}) > 1 for order in orders)


def test_a_flat_folder_has_no_classes(tmp_path: Path):
    made = one(write_pictures(tmp_path / "flat", ["a.jpg", "b.png", ".hidden.jpg"]), tmp_path / "out")
    assert (made.samples, made.classes, made.labels.tolist()) == (2, [], [-1, -1])
    assert not any(name.endswith(".cls") for name in members(tmp_path / "out" / "000000.tar"))


def test_split_folders_are_kept_apart_and_share_their_classes(tmp_path: Path):
    names = ["train/x/0.png", "train/y/z/0.png", "val/y/z/0.png", "val/x/1.png", "test/0.png"]
    made = make(write_pictures(tmp_path / "in", names), tmp_path / "out")
    assert {name: split for split, m in made.items() for name in samples(m)} == {n: n.split("/")[0] for n in names}
    assert {tuple(m.classes) for m in made.values()} == {("x", "y/z")}
    labels = {name: label for m in made.values() for name, (_, _, label) in samples(m).items()}
    assert labels == dict(zip(names, [0, 1, 1, 0, -1], strict=True))
    assert manifest.load(tmp_path / "out" / "val").samples == 2
    with pytest.raises(errors.Refusal, match=r"its splits do: .*train") as caught:
        manifest.load(tmp_path / "out")
    assert caught.value.code == errors.DATA


def test_an_image_keeps_its_split_when_others_come(tmp_path: Path):
    few, many = [f"c/{i}.png" for i in range(40)], [f"{c}/{i}.png" for c in "cd" for i in range(60)]
    parts = []
    for names in (few, many):
        source = write_pictures(tmp_path / str(len(names)), names, height=2, width=2)
        made = make(source, tmp_path / f"{len(names)}-out", val_fraction=0.3, seed=len(names))
        parts.append({split: set(samples(m)) for split, m in made.items()})
    before, after = parts
    assert before["train"] | before["val"] == set(few)
    assert all(before[split] <= after[split] for split in ("train", "val"))
    assert 20 < len(after["val"]) < 55  # 36 expected, 5 the deviation


def test_resize_shrinks_the_short_side_and_never_enlarges(tmp_path: Path):
    sizes = {"wide": (40, 100), "high": (90, 30), "fits": (20, 25), "small": (8, 50)}
    for name, (height, width) in sizes.items():
        write_pictures(tmp_path / "in", [f"{name}.png"], height=height, width=width)
    made = one(tmp_path / "in", tmp_path / "out", resize=20, quality=95)
    assert (made.job["resize"], made.job["quality"]) == (20, 95)
    found = {name: image for name, (_, image, _) in samples(made).items()}
    images = {name: Image.open(io.BytesIO(data)) for name, data in found.items()}
    made_sizes = {"wide.png": (50, 20), "high.png": (20, 60), "fits.png": (25, 20), "small.png": (50, 8)}
    assert {name: image.size for name, image in images.items()} == made_sizes
    assert all(found[name] == (tmp_path / "in" / name).read_bytes() for name in ("fits.png", "small.png"))
    small = np.asarray(picture(0, 40, 100).resize((50, 20), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(images["wide.png"]) - small).mean() < 4


def test_what_is_named_like_an_image_and_is_none_is_no_obstacle(source: Path, tmp_path: Path):
    """A dead link, a folder, and a pipe, whose reader would wait for ever."""
    os.symlink("nowhere", source / "plants" / "dead.jpg")
    (source / "plants" / "folder.jpg").mkdir()
    os.mkfifo(source / "plants" / "pipe.jpg")
    with within(60):
        made = one(source, tmp_path / "out")
    assert made.samples == len(NAMES)
    os.rename(source / NAMES[0], os.fsencode(source / "plants") + b"/caf\xe9.jpg")  # no Unicode
    made = make(source, tmp_path / "split", val_fraction=0.5)
    assert sum(m.samples + m.job["rejects"] for m in made.values()) == len(NAMES) + 2  # link and pipe


def test_a_folder_of_images_may_stand_for_its_shards(source: Path, tmp_path: Path):
    resolve = lambda path: sets((str(path),), "train", tmp_path / "cache", Store())  # noqa: E731
    made = resolve(source)
    assert made.samples == len(NAMES)
    assert made.folder.is_relative_to(tmp_path / "cache")
    assert resolve(source) == made
    assert resolve(made.folder) == made
    with pytest.raises(errors.Refusal, match="no such folder"):
        resolve(tmp_path / "nowhere")
    (made.folder / "manifest.json").unlink()
    with pytest.raises(errors.Refusal, match=r"tars but no manifest\.json"):
        resolve(made.folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', '{"version": 99}', "\xff"])
def test_a_broken_manifest_is_refused(source: Path, tmp_path: Path, text: str):
    made = one(source, tmp_path / "out")
    file = made.folder / "manifest.json"
    changed = json.dumps({**json.loads(file.read_text()), **json.loads(text)}) if text.startswith('{"') else text
    file.write_bytes(changed.encode("latin-1"))
    assert "manifest.json" in refused(lambda: manifest.load(made.folder), errors.DATA)
