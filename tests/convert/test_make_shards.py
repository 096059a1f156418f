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
from ssl_vit.convert.resolve import resolve_manifest
from ssl_vit.data import manifest
from ssl_vit.data.cache import CacheDir
from tests.data.damage import time_limit
from tests.data.pictures import (
    CLASSES,
    NAMES,
    build_shards,
    build_splits,
    contents,
    picture,
    read_samples,
    tar_members,
    write_pictures,
)
from tests.data.servers import assert_refused

pytestmark = pytest.mark.usefixtures("in_process")


def test_every_image_is_there_with_its_bytes_and_class_and_the_manifest_tells_the_truth(source: Path, tmp_path: Path):
    (source / "plants" / "notes.txt").write_text("no image")
    dataset = build_shards(source, tmp_path / "out", shard_samples=5)
    images = {name: (image, CLASSES[label]) for name, (_, image, label) in read_samples(dataset).items()}
    assert images == {name: ((source / name).read_bytes(), name.rpartition("/")[0]) for name in NAMES}
    assert dataset.classes == CLASSES
    keys = {key for key, _, _ in read_samples(dataset).values()}
    assert all(key.isdigit() for key in keys)
    assert len(keys) == len(NAMES)

    assert manifest.load(tmp_path / "out") == dataset
    assert [(s.name, s.samples) for s in dataset.shards] == [("000000.tar", 5), ("000001.tar", 5), ("000002.tar", 2)]
    assert dataset.samples == json.loads((tmp_path / "out" / "manifest.json").read_text())["samples"] == 12
    for shard in dataset.shards:
        data = (dataset.folder / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    dataset.check_shards()
    allowed = {f"{n:06d}.{kind}" for n in range(3) for kind in ("tar", "npy")}
    assert set(contents(tmp_path / "out")) == allowed | {"manifest.json", "sizes.json", "_info.json"}


def test_the_shuffle_is_seeded_and_global(source: Path, tmp_path: Path):
    orders = [list(read_samples(build_shards(source, tmp_path / f"out{seed}", seed=seed))) for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(NAMES)
    assert all(len({name.rpartition("/")[0] for name in order[:6]}) > 1 for order in orders)


def test_a_flat_folder_has_no_classes(tmp_path: Path):
    dataset = build_shards(write_pictures(tmp_path / "flat", ["a.jpg", "b.png", ".hidden.jpg"]), tmp_path / "out")
    assert (dataset.samples, dataset.classes, dataset.labels.tolist()) == (2, [], [-1, -1])
    assert not any(name.endswith(".cls") for name in tar_members(tmp_path / "out" / "000000.tar"))


def test_split_folders_are_kept_apart_and_share_their_classes(tmp_path: Path):
    names = ["train/x/0.png", "train/y/z/0.png", "val/y/z/0.png", "val/x/1.png", "test/0.png"]
    manifests = build_splits(write_pictures(tmp_path / "in", names), tmp_path / "out")
    assert {name: split for split, m in manifests.items() for name in read_samples(m)} == {
        n: n.split("/")[0] for n in names
    }
    assert {tuple(m.classes) for m in manifests.values()} == {("x", "y/z")}
    labels = {name: label for m in manifests.values() for name, (_, _, label) in read_samples(m).items()}
    assert labels == dict(zip(names, [0, 1, 1, 0, -1], strict=True))
    assert manifest.load(tmp_path / "out" / "val").samples == 2
    with pytest.raises(errors.ExitError, match=r"its splits do: .*train") as caught:
        manifest.load(tmp_path / "out")
    assert caught.value.code == errors.ExitCode.DATA


def test_an_image_keeps_its_split_when_others_come(tmp_path: Path):
    few, many = [f"c/{i}.png" for i in range(40)], [f"{c}/{i}.png" for c in "cd" for i in range(60)]
    parts = []
    for names in (few, many):
        source = write_pictures(tmp_path / str(len(names)), names, height=2, width=2)
        manifests = build_splits(source, tmp_path / f"{len(names)}-out", val_fraction=0.3, seed=len(names))
        parts.append({split: set(read_samples(m)) for split, m in manifests.items()})
    before, after = parts
    assert before["train"] | before["val"] == set(few)
    assert all(before[split] <= after[split] for split in ("train", "val"))
    assert 20 < len(after["val"]) < 55  # 36 expected, 5 the deviation


def test_resize_shrinks_the_short_side_and_never_enlarges(tmp_path: Path):
    sizes = {"wide": (40, 100), "high": (90, 30), "fits": (20, 25), "small": (8, 50)}
    for name, (height, width) in sizes.items():
        write_pictures(tmp_path / "in", [f"{name}.png"], height=height, width=width)
    dataset = build_shards(tmp_path / "in", tmp_path / "out", resize=20, quality=95)
    assert (dataset.job["resize"], dataset.job["quality"]) == (20, 95)
    image_data = {name: image for name, (_, image, _) in read_samples(dataset).items()}
    images = {name: Image.open(io.BytesIO(data)) for name, data in image_data.items()}
    expected_sizes = {"wide.png": (50, 20), "high.png": (20, 60), "fits.png": (25, 20), "small.png": (50, 8)}
    assert {name: image.size for name, image in images.items()} == expected_sizes
    assert all(image_data[name] == (tmp_path / "in" / name).read_bytes() for name in ("fits.png", "small.png"))
    small = np.asarray(picture(0, 40, 100).resize((50, 20), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(images["wide.png"]) - small).mean() < 4


def test_what_is_named_like_an_image_and_is_none_is_no_obstacle(source: Path, tmp_path: Path):
    """A dead link, a folder, and a pipe, whose reader would wait for ever."""
    os.symlink("nowhere", source / "plants" / "dead.jpg")
    (source / "plants" / "folder.jpg").mkdir()
    os.mkfifo(source / "plants" / "pipe.jpg")
    with time_limit(60):
        result = build_shards(source, tmp_path / "out")
    assert result.samples == len(NAMES)
    os.rename(source / NAMES[0], os.fsencode(source / "plants") + b"/caf\xe9.jpg")  # no Unicode
    result = build_splits(source, tmp_path / "split", val_fraction=0.5)
    assert sum(m.samples + m.job["rejects"] for m in result.values()) == len(NAMES) + 2  # link and pipe


def test_a_folder_of_images_may_stand_for_its_shards(source: Path, tmp_path: Path):
    resolve = lambda path: resolve_manifest((str(path),), "train", tmp_path / "cache", CacheDir())  # noqa: E731
    dataset = resolve(source)
    assert dataset.samples == len(NAMES)
    assert dataset.folder.is_relative_to(tmp_path / "cache")
    assert resolve(source) == dataset
    assert resolve(dataset.folder) == dataset
    with pytest.raises(errors.ExitError, match="no such folder"):
        resolve(tmp_path / "nowhere")
    (dataset.folder / "manifest.json").unlink()
    with pytest.raises(errors.ExitError, match=r"tars but no manifest\.json"):
        resolve(dataset.folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', '{"version": 99}', "\xff"])
def test_a_broken_manifest_is_refused(source: Path, tmp_path: Path, text: str):
    dataset = build_shards(source, tmp_path / "out")
    file = dataset.folder / "manifest.json"
    changed = json.dumps({**json.loads(file.read_text()), **json.loads(text)}) if text.startswith('{"') else text
    file.write_bytes(changed.encode("latin-1"))
    assert "manifest.json" in assert_refused(lambda: manifest.load(dataset.folder), errors.ExitCode.DATA)
