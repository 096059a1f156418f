"""Every benchmark's recipe on synthetic data of its layout, by the real tools; what docs/benchmarks.md shows."""

import html
import json
import re
import socket
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ssl_vit import config
from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.data import augment, manifest
from ssl_vit.data.dataset import Data, SampleDataset
from ssl_vit.data.decode import decode_image
from ssl_vit.evaluate import metrics, protocol
from ssl_vit.recipes import Finetune
from tests import evaluate_cases, machines, synthetic
from tests.conftest import TINY, build_once
from tests.test_recipes import header_comment, read_recipe

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
GROUPS = {  # paper.md 5.3: class counts and test images
    "Natural": "caltech101 102 6084, cifar100 100 10000, dtd 47 1880, flowers102 102 6149, pets 37 3669, "
    "sun397 397 21750, svhn 10 26032",
    "Specialized": "patch_camelyon 2 32768, eurosat 10 5400, resisc45 45 6300, retinopathy 5 42670",
    "Structured": "clevr_count 8 15000, clevr_distance 6 15000, dmlab 6 22735, dsprites_location 16 73728, "
    "dsprites_orientation 16 73728, kitti_distance 4 711, smallnorb_azimuth 18 12150, smallnorb_elevation 9 12150",
}
TASKS = {
    name: (group, int(classes), int(test))
    for group, tasks in GROUPS.items()
    for name, classes, test in map(str.split, tasks.split(","))
}


def run_snippet(title: str) -> dict[str, Any]:
    """Run the program of docs/benchmarks.md that opens with a title, and return its names."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if block.startswith(f'"""{title}'))
    namespace: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(code, title, "exec"), namespace)
    return namespace


class PictureDataset:
    """A data set as torchvision's are: items of (image, class number), and the classes."""

    classes = ("rose", "daisy", "a/b c")  # not in the order of their names; one lies in a folder
    labels = (2, 0, 0, 2, 0)  # nothing of the second class

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        label = self.labels[index]  # IndexError ends the iteration, as in torchvision's
        rng = np.random.default_rng(index)
        shape = (5, 4, 3) if index else (5, 4)  # the first is gray
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        return (image.convert("RGBA") if index == 3 else image), label


def test_the_snippet_writes_torchvisions_sets_as_they_are(tmp_path: Path):
    """Whose images, decoded, are in the shards under their class numbers."""
    to_folder = run_snippet("Write a labeled data set")["to_folder"]
    for split in ("train", "test"):
        to_folder(PictureDataset(), PictureDataset.classes, tmp_path / "set" / split)
    source, output, class_map = (str(tmp_path / name) for name in ("set", "out", "set/classes.txt"))
    convert_images(MakeShards(input=source, output=output, class_map=class_map, workers=1, quiet=True))
    expected = [
        (np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes(), label) for image, label in PictureDataset()
    ]
    for split in ("train", "test"):
        split_manifest = manifest.load(tmp_path / "out" / split)
        assert split_manifest.classes == ["rose", "daisy", "a/b c"]
        samples = SampleDataset(split_manifest, Data(image_size=(5, 4), eval_crop=1.0), seed=0, training=False)
        batch, faults = samples.batch([(0, number) for number in range(split_manifest.samples)])
        assert not faults
        pixels = [image.contiguous().numpy().tobytes() for image in batch["image"]]
        assert sorted(zip(pixels, batch["label"].tolist(), strict=True)) == sorted(expected)


def test_the_snippet_writes_arrays_and_no_name_leads_out_of_the_folder(tmp_path: Path):
    to_folder = run_snippet("Write a labeled data set")["to_folder"]
    rows = [(np.full((3, 4, 1), 7, np.uint8), np.int64(1)), (np.full((3, 4, 3), 9, np.uint8), np.int64(0))]
    to_folder(iter(rows), ["/a/abbey", "/z/zoo"], tmp_path / "set" / "train800")  # names as those of SUN397
    assert (tmp_path / "set" / "classes.txt").read_text() == "a/abbey\nz/zoo\n"
    for name, pixels in (("z/zoo/000000", rows[0][0][..., 0]), ("a/abbey/000001", rows[1][0])):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"set/train800/{name}.png")), pixels)
    assert len(list(tmp_path.rglob("*.png"))) == 2


class DatasetStore:
    """What the VTAB program takes of TensorFlow Datasets: endless rows, and a note of what was asked for."""

    def __init__(self, rows: int, classes: dict[str, int]):
        self.rows, self.classes, self.requests = rows, classes, []

    def load(self, name: str, split: str, shuffle_files: bool, with_info: bool) -> tuple[Any, Any]:
        assert with_info
        assert not shuffle_files
        self.requests.append((name, split))
        names = {label: [f"/n/{number}" for number in range(count)] for label, count in self.classes.items()}
        features = {label: types.SimpleNamespace(names=classes) for label, classes in names.items()}
        return (self.row(name, number) for number in range(self.rows)), types.SimpleNamespace(features=features)

    def row(self, name: str, number: int) -> dict[str, Any]:
        truck, car = [(300.0, 5.0), (300.0, 8.0), (300.0, 12.0), (300.0, 25.0), (15.0, 30.0)][number % 5]
        objects = {
            "size": np.zeros(3 + number % 8),
            "pixel_coords": np.array([[0.0, 0.0, 7.9 + 0.45 * (number % 6)], [0.0, 0.0, 50.0]]),
            "type": np.array([3, 2, 0]),  # a pedestrian, a truck, a car
            "location": np.array([[0.0, 0.0, 1.0], [0.0, 0.0, truck], [0.0, 0.0, car]]),
        }
        if number % 6 == 5:
            objects["type"] = np.array([3, 4, 5])  # no vehicle
        image = np.ones((1, 1, 1), np.uint8) if name.startswith("dsprites") else np.full((1, 1, 3), 3, np.uint8)
        labels = {"label": number % 2, "label_azimuth": number % 18, "label_elevation": number % 9}
        labels |= {"label_x_position": number % 32, "label_orientation": number % 40}
        return {"image": image, "objects": objects, **{k: np.int64(v) for k, v in labels.items()}}


def load_vtab_program(store: DatasetStore, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tfds = {"load": store.load, "as_numpy": lambda rows: rows}
    for name, namespace in (("to_folder", run_snippet("Write a labeled data set")), ("tensorflow_datasets", tfds)):
        module = types.ModuleType(name)
        module.__dict__.update(namespace)
        monkeypatch.setitem(sys.modules, name, module)
    return run_snippet("Write VTAB-1k")


def class_folders(root: Path) -> dict[int, str]:
    """Image number -> class folder."""
    return {int(path.stem): path.parent.relative_to(root).as_posix() for path in root.rglob("*.png")}


def test_the_vtab_program_writes_the_splits_and_the_computed_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The splits of the page's table; of many images, the first 800 and 200."""
    store = DatasetStore(45, {"label": 2, "label_azimuth": 18, "label_elevation": 9})
    program = load_vtab_program(store, monkeypatch)
    assert list(program["TASKS"]) == list(TASKS)
    for task, (_, classes, _) in TASKS.items():
        program["write"](task, tmp_path)
        assert {path.name for path in (tmp_path / task).iterdir()} == {"train800", "val200", "test", "classes.txt"}
        if "smallnorb" not in task and not isinstance(program["TASKS"][task][2], str):
            assert len((tmp_path / task / "classes.txt").read_text().split()) == classes
    numbers = range(45)
    expected = {
        "clevr_count": [n % 8 for n in numbers],
        "clevr_distance": [(0, 1, 2, 3, 4, 5)[n % 6] for n in numbers],  # 7.9, 8.35, 8.8, 9.25, 9.7, 10.15
        "dsprites_location": [n % 32 // 2 for n in numbers],
        "dsprites_orientation": [(n % 40) * 2 // 5 for n in numbers],
        "kitti_distance": [3 if n % 6 == 5 else (0, 0, 1, 2, 1)[n % 5] for n in numbers],
        "smallnorb_azimuth": [f"n/{n % 18}" for n in numbers],
    }
    for task, labels in expected.items():
        assert class_folders(tmp_path / task / "test") == {n: str(label) for n, label in enumerate(labels)}, task
    white_image = Image.open(next((tmp_path / "dsprites_location").rglob("*.png")))
    assert (white_image.mode, white_image.getpixel((0, 0))) == ("L", 255)
    task = r"^\| (?:Natural|Specialized|Structured) \| `(\w+)` \| `([^`]+)`"
    table = re.findall(task + r".*? \| `(.+?)` \| `(.+?)` \| `(.+?)` \|", PAGE, re.M)
    assert [row[0] for row in table] == list(TASKS)
    assert store.requests == [(row[1], split) for row in table for split in row[2:]]

    load_vtab_program(DatasetStore(810, {"label": 2}), monkeypatch)["write"]("dtd", tmp_path / "many")
    counts = {path.name: len(class_folders(path)) for path in (tmp_path / "many" / "dtd").iterdir() if path.is_dir()}
    assert counts == {"train800": 800, "val200": 200, "test": 810}
    assert set(class_folders(tmp_path / "many" / "dtd" / "val200")) == set(range(200))


def test_the_objectnet_program_maps_folders_to_class_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "objectnet-1.0" / "mappings"
    folder.mkdir(parents=True)
    for name, content in {
        "folder_to_objectnet_label": {"chair": "Chair", "alarm_clock": "Alarm clock", "air_freshener": "Air freshener"},
        "objectnet_to_imagenet_1k": {"Alarm clock": "analog clock; digital clock", "Chair": "rocking chair, rocker"},
        "pytorch_to_imagenet_2012_id": {"0": 2, "1": 0, "2": 1},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "imagenet_to_label_2012_v2").write_text("analog clock\nrocking chair, rocker\ndigital clock\n")
    run_snippet("Write objectnet_to_imagenet.json")
    assert json.loads((tmp_path / "objectnet_to_imagenet.json").read_text()) == {"chair": [2], "alarm_clock": [1, 0]}


PROTOCOL = {  # paper Table 4 and B.1.1: steps, rates, share held out; warm-up of the authors' later code
    "finetune_imagenet": (20_000, (0.003, 0.01, 0.03, 0.06), 0.01, 500),
    "finetune_cifar10": (10_000, (0.001, 0.003, 0.01, 0.03), 0.02, 500),
    "finetune_cifar100": (10_000, (0.001, 0.003, 0.01, 0.03), 0.02, 500),
    "finetune_pets": (500, (0.001, 0.003, 0.01, 0.03), 0.1, 100),
    "finetune_flowers102": (500, (0.001, 0.003, 0.01, 0.03), 0.1, 100),
}
SOME_TASKS = {name: TASKS[name] for name in ("sun397", "svhn", "eurosat", "kitti_distance")}
COUNTS = {  # classes, training images, test images
    "finetune_imagenet": (1000, 1_281_167, 50_000),
    "finetune_imagenet_adamw": (1000, 1_281_167, 50_000),
    "finetune_cifar10": (10, 50_000, 10_000),
    "finetune_cifar100": (100, 50_000, 10_000),
    "finetune_pets": (37, 3_680, 3_669),
    "finetune_flowers102": (102, 1_020, 6_149),
}
ALL = [*COUNTS, "vtab", "evaluate_real", "evaluate_objectnet"]


@pytest.mark.parametrize("name", PROTOCOL)
def test_a_recipe_is_the_papers(name: str):
    steps, rates, fraction, warmup = PROTOCOL[name]
    recipe, optim = read_recipe(name), read_recipe(name).optim
    assert (recipe.steps, recipe.batch, recipe.data.image_size, recipe.seeds) == (steps, 512, 384, 3)
    assert (recipe.sweep.lr, recipe.sweep.fraction) == (rates, fraction)
    assert (optim.kind, optim.momentum, optim.weight_decay, optim.clip) == ("sgd", 0.9, 0.0, 1.0)
    assert (optim.schedule, optim.warmup_steps) == ("cosine", warmup)
    assert (recipe.encoder.size, recipe.encoder.patch, recipe.head.kind) == ("B", 16, "transfer")
    assert recipe.eval_every is None  # C5.2b: the test set is read once


@pytest.mark.parametrize("name", ALL)
def test_a_benchmark_says_what_it_is(name: str):
    assert "not run here" in header_comment(name)
    row = next(line for line in PAGE.splitlines() if f"`{name}`" in line)
    if name in COUNTS:
        benchmark = read_recipe(name).benchmark
        assert (benchmark.classes, benchmark.train, benchmark.test) == COUNTS[name]
        assert f"{benchmark.classes:,}" in row
        assert name == "finetune_imagenet_adamw" or f"{benchmark.train:,} / {benchmark.test:,}" in row
        assert benchmark.name
        assert re.search(r"\d", benchmark.paper)
        assert re.search(r"^.*make_shards.*\Z", benchmark.get)  # in one line


def test_the_recipe_of_todays_practice_is_maes():
    recipe = read_recipe("finetune_imagenet_adamw")
    optim, num_images = recipe.optim, recipe.benchmark.train
    assert (optim.kind, optim.lr, optim.weight_decay, optim.layer_decay) == ("adamw", 5e-4 * 1024 / 256, 0.05, 0.65)
    assert recipe.steps * recipe.batch / num_images == pytest.approx(100, rel=1e-3)
    assert optim.warmup_steps * recipe.batch / num_images == pytest.approx(5, rel=1e-3)
    assert (recipe.head.mixup, recipe.head.cutmix, recipe.head.smoothing, recipe.encoder.drop_path) == (
        0.8,
        1.0,
        0.1,
        0.1,
    )
    assert (recipe.data.auto_augment, recipe.data.image_size) == ("rand-m9-mstd0.5-inc1", 224)


def test_vtab_is_the_papers():
    """C5.3a: 19 tasks, 7 / 4 / 8, class counts; one setting for all."""
    recipe = read_recipe("vtab")
    assert {task.name: (task.group, task.classes, task.test) for task in recipe.tasks} == TASKS
    groups = [group for group, _, _ in TASKS.values()]
    assert [groups.count(name) for name in GROUPS] == [7, 4, 8]
    assert [task.augment for task in recipe.tasks] == [group != "Structured" for group in groups]
    assert (recipe.steps, recipe.batch, recipe.optim.kind, recipe.optim.lr) == (2500, 512, "sgd", 0.01)
    assert (recipe.data.image_size, recipe.benchmark.train) == (384, 1000)
    assert not recipe.sweep.lr
    assert not read_recipe("vtab", "tasks=none").tasks, "one data set can take the suite's setting"


def test_the_papers_rows_give_the_papers_means():
    """C5.3c, on the numbers in the recipe, by the function that a run uses; the page's table has them too."""
    tasks = read_recipe("vtab").tasks
    scores = np.array([[float(text) for text in task.paper.split("/")] for task in tasks])
    assert scores.shape == (19, 3)
    suites = [
        protocol.suite_results(tasks, {t.name: {"top1": x} for t, x in zip(tasks, row, strict=True)})
        for row in scores.T
    ]
    expected = [[77.63, 86.69, 87.00, 65.03], [76.29, 85.56, 86.73, 62.96], [72.71, 83.27, 84.65, 57.50]]
    assert [round(suite["mean"], 2) for suite in suites] == [row[0] for row in expected]  # of the tasks, not the groups
    groups = [dict(zip(GROUPS, row[1:], strict=True)) for row in expected]
    assert [suite["groups"] for suite in suites] == [pytest.approx(row, abs=0.005 + 1e-9) for row in groups]
    table = re.findall(r"^\| [HL]/1[46], \S+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.M)
    assert [[float(text) for text in row] for row in table] == expected


SMALL_ARGS = [*TINY, "steps=2", "log_every=1", "save_every=1", "optim.warmup_steps=1", "compile=false", "tracker=none"]
"""A recipe made so small that each training takes a tenth of a second."""


def run_tool(args: list[str], tool: str = "finetune", code: int = 0) -> str:
    """What a tool says, run to its end in this process without a network; it asks for none."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
            patch.setattr(owner, name, getattr(owner, name))  # to be put back
        machines.offline()
        output = evaluate_cases.run_tool(tool, args, Path(), codes=(code,))
    assert "asked for the network" not in output
    return output


FEWER_RUNS = ["sweep.lr=0.003,0.01", "seeds=2"]
LONG, PROCESS = pytest.mark.long, pytest.mark.process
RUNS: list[Any] = [("finetune_pets", []), ("finetune_cifar10", FEWER_RUNS)]  # the first as it is
RUNS += [pytest.param("finetune_imagenet", FEWER_RUNS, marks=PROCESS)]
RUNS += [pytest.param("finetune_imagenet_adamw", [], marks=PROCESS)]
RUNS += [pytest.param(name, [], marks=LONG) for name in PROTOCOL if name != "finetune_pets"]


def make_layout(factory: pytest.TempPathFactory, classes: int, split: str) -> Path:
    """Shards of so many classes, train/ and a split to judge by, made once for all recipes that have as many."""
    splits = {"train": max(classes, 50), split: classes + 7}
    make = partial(synthetic.make_noise_shards, classes=classes, splits=splits)
    return build_once(factory, f"layout-{classes}-{split}", make) / "shards"


@pytest.mark.parametrize(("name", "more"), RUNS)
def test_a_recipe_runs(name: str, more: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    recipe, run = read_recipe(name, *more), tmp_path / "run"
    classes, split = recipe.benchmark.classes, Path(recipe.data.val[0]).name
    train, test = max(classes, 50), classes + 7
    assert Path(recipe.data.train[0]).parts[-1] == "train"
    shards = make_layout(tmp_path_factory, classes, split)
    data = [f"data.train={shards}/train", f"data.val={shards}/{split}", f"run={run}"]
    run_tool([f"recipe={name}", *SMALL_ARGS, *data, *more])
    results = evaluate_cases.read_results(run)
    assert results["samples"] == test  # every test image, once
    assert {"top1", "top5", "mean_per_class", "protocol"} <= results.keys()
    assert 0 <= results["top1"] <= results["top5"] <= 1
    members = sorted(path.parent.name for path in run.glob("sweep/*/results.json"))
    assert members == sorted(f"lr-{rate:g}" for rate in recipe.sweep.lr)
    seeds = sorted(path.parent.name for path in run.glob("seed-*/results.json"))
    assert seeds == ([f"seed-{i}" for i in range(recipe.seeds)] if recipe.seeds > 1 else [])
    for member in members:
        assert evaluate_cases.read_results(run / "sweep" / member)["samples"] == max(
            1, round(recipe.sweep.fraction * train)
        )
    assert results["not_the_benchmark"] == [
        f"{count} {kind} images, not {expected}"
        for count, kind, expected in (
            (train, "training", recipe.benchmark.train),
            (test, "test", recipe.benchmark.test),
        )
    ]
    assert recipe.benchmark.paper in html.unescape((run / "report.md").read_text())
    assert (run / "report.html").exists()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of twenty classes under ImageNet's file names, shards/, and a classifier of it, run/."""
    folder, names = tmp_path_factory.mktemp("imagenet"), synthetic.class_names(20)
    synthetic.draw_noise(folder / "images" / "train", range(20), names)
    labels = [number * 37 % 20 for number in range(1, 61)]
    synthetic.draw_noise(folder / "images" / "val", labels, names, name_format="ILSVRC2012_val_{:08d}.JPEG", first=1)
    synthetic.convert_shards(folder / "images", folder / "shards", names)
    data = [f"data.train={folder}/shards/train", f"data.val={folder}/shards/val"]
    run_tool([*SMALL_ARGS, "optim.lr=1.0", *data, f"run={folder / 'run'}"])
    return folder


@pytest.mark.parametrize("name", ALL)
def test_data_that_is_not_there_is_named_with_the_way_to_get_it(name: str, imagenet: Path, tmp_path: Path):
    tool = "evaluate" if name.startswith("evaluate") else "finetune"
    source = [f"encoder={imagenet / 'run'}"] if tool == "evaluate" else SMALL_ARGS
    output = run_tool([f"recipe={name}", *source, f"run={tmp_path}/run"], tool, code=65)
    (line,) = evaluate_cases.closing_lines(tool, output)
    assert re.match(rf"{tool}\.py: (\d+ folders are not there \()?shards/", line)
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    assert recipe["benchmark"]["get"] in line


@pytest.fixture(scope="module", params=[SOME_TASKS, pytest.param(TASKS, marks=LONG)], ids=["some", "all"])
def vtab(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run of a task of each group and a second of the first, or of all, on wide images.

    Of most classes there are none, as of some in SUN397.
    """
    folder, tasks = tmp_path_factory.mktemp("vtab"), request.param
    for number, (task, (_, classes, _)) in enumerate(tasks.items()):
        for split, count in {"train800": 8, "val200": 4, "test": 9 + number}.items():
            images, labels = folder / "images" / task / split, [i * 3 % classes for i in range(count)]
            synthetic.draw_noise(images, labels, synthetic.class_names(classes), seed=number, aspect=2)
            synthetic.convert_shards(images, folder / "shards" / task / split, synthetic.class_names(classes))
    recipe = yaml.load((ROOT / "recipes" / "vtab.yaml").read_text(), config.TextLoader)
    recipe["tasks"] = [task for task in recipe["tasks"] if task["name"] in tasks]
    (folder / "vtab.yaml").write_text(yaml.safe_dump(recipe))
    run_tool([f"recipe={folder}/vtab.yaml", *SMALL_ARGS, f"tasks_root={folder}/shards", f"run={folder}/run"])
    return folder


def read_resolved(run: Path) -> Any:
    return config.validate(Finetune, yaml.load((run / "recipe.yaml").read_text(), config.TextLoader))


def test_vtab_runs_on_its_layout(vtab: Path):
    """A training a task, on train800 and val200 together, judged on its whole test set; means of what they scored."""
    results = evaluate_cases.read_results(vtab / "run")
    tasks = SOME_TASKS if len(results["tasks"]) == len(SOME_TASKS) else TASKS
    assert list(results["tasks"]) == list(tasks)
    scores = {name: task["top1"] for name, task in results["tasks"].items()}
    assert [task["samples"] for task in results["tasks"].values()] == [9 + number for number in range(len(tasks))]
    assert results["mean"] == pytest.approx(np.mean(list(scores.values())))  # of the tasks, not of the groups
    for group in GROUPS:
        group_scores = [scores[name] for name, (task_group, _, _) in tasks.items() if task_group == group]
        assert results["groups"][group] == pytest.approx(np.mean(group_scores))
    for task in tasks:
        task_results, recipe = evaluate_cases.read_results(vtab / "run" / task), read_resolved(vtab / "run" / task)
        assert recipe.data.train == (f"{vtab}/shards/{task}/train800", f"{vtab}/shards/{task}/val200")
        assert recipe.data.val == (f"{vtab}/shards/{task}/test",)
        assert (recipe.optim.lr, task_results["top1"]) == (0.01, scores[task])
        assert task_results["not_the_benchmark"][0] == "12 training images, not 1000"  # C5.3b


def test_the_whole_image_is_seen_where_a_crop_or_a_flip_would_change_the_label(vtab: Path):
    """C5.3d: location, distance and azimuth are lost with the sides of a wide picture, or turned around."""
    for task in evaluate_cases.read_results(vtab / "run")["tasks"]:
        data = read_resolved(vtab / "run" / task).data
        split_manifest = manifest.load(vtab / "shards" / task / "test")
        train_samples, eval_samples = (
            SampleDataset(split_manifest, data, seed=0, training=training) for training in (True, False)
        )
        all_equal = True
        for number in range(split_manifest.samples):
            pixels = decode_image(train_samples.read_sample(number)[0])
            assert pixels.shape[1] == 2 * pixels.shape[0]
            resized = augment.crop_and_resize(pixels, augment.Box(0, 0, *pixels.shape[:2]), data.image_hw, flip=False)
            loaded = (
                train_samples.load_sample(number, 1)[0],
                train_samples.load_sample(number, 2)[0],
                eval_samples.load_sample(number, 0)[0],
            )
            all_equal &= all(torch.equal(image, resized) for image in loaded)
        assert all_equal == (TASKS[task][0] == "Structured"), task


def test_the_splits_of_vtab_do_not_overlap():
    """C5.3b, of the table in the page: no part of a split of the source is in two of ours."""
    rows = re.findall(r"^\| (?:Natural|Specialized|Structured) \| .*$", PAGE, re.M)
    assert len(rows) == 19
    for row in rows:
        used: set[tuple[str, int]] = set()
        for cell in row.split(" | ")[4:7]:
            match = re.fullmatch(r"`(\w+)(?:\[(\d*)%?:(\d*)%?\])?`", cell)
            assert match is not None, cell
            share = {(match[1], percent) for percent in range(int(match[2] or 0), int(match[3] or 100))}
            assert used.isdisjoint(share), row
            used |= share


@pytest.mark.parametrize(("more", "code"), [([], 65), (["data.empty_classes=true"], 0)])
def test_frozen_features_of_a_task_in_which_classes_are_empty(more: list[str], code: int, vtab: Path):
    data = [f"data.train={vtab}/shards/sun397/train800", f"data.val={vtab}/shards/sun397/test", "data.workers=0"]
    args = [f"encoder={vtab}/run/sun397", "methods=knn", "random=false", f"run={vtab}/knn", *data, *more]
    output = run_tool(args, "evaluate", code)
    assert ("classes have no image" in output) == (code == 65)


def test_real_in_the_files_own_shape():
    """C5.4a: the denominator, by the code that a run uses, on the file itself where it is at hand."""
    file = ROOT.parent / "shared" / "data" / "imagenet_real.json"
    if not file.exists():
        pytest.skip("no real.json beside the project")
    label_sets = json.loads(file.read_text())
    assert (len(label_sets), sum(not labels for labels in label_sets)) == (50_000, 3_163)
    top1 = np.array([[labels[0] if labels else 0] for labels in label_sets])
    predictions = metrics.Predictions(np.arange(50_000), np.full(50_000, -1), top1, np.ones((50_000, 1), np.float32))
    assert metrics.accuracy(predictions, 1000, label_sets) == {"top1": 1.0, "top5": 1.0, "samples": 46_837}  # C5.4b
    wrong_predictions = metrics.Predictions(
        predictions.samples, predictions.labels, np.full_like(top1, 1000), predictions.scores
    )
    assert metrics.accuracy(wrong_predictions, 1000, label_sets)["top1"] == 0


@pytest.mark.parametrize("name", ["evaluate_real", "evaluate_objectnet"])
def test_a_recipe_judges_its_layout(name: str, imagenet: Path, tmp_path: Path):
    """C5.4 and C5.5 on few images; tests/evaluate/test_classifiers.py has what counts, image by image."""
    args = [f"recipe={name}", f"encoder={imagenet}/run", "data.image_size=16", "data.workers=0", "quiet=true"]
    label_map: Any = [[] if i % 3 == 0 else [(i + 1) * 37 % 20, i % 20] for i in range(60)]
    data, key = (
        imagenet / "shards" / "val",
        "label_sets",
    )  # every third image has no label, the others theirs and another
    if name == "evaluate_objectnet":  # a folder without classes is left out
        label_map = {"alarm_clock": [1, 3], "chair": ["class_0002", 4, 5]}
        data, key, folders = tmp_path / "shards", "class_map", ["air_freshener", *label_map]
        synthetic.draw_noise(tmp_path / "images", [i % 3 for i in range(60)], folders)
        synthetic.convert_shards(tmp_path / "images", data, folders)
    (tmp_path / "given.json").write_text(json.dumps(label_map))
    args += [f"run={tmp_path}/run", f"data.val={data}", f"metrics.{key}={tmp_path}/given.json"]
    run_tool(args, "evaluate")
    results = evaluate_cases.read_results(tmp_path / "run")
    if name == "evaluate_real":
        assert (results["samples"], results["label_sets"]["samples"]) == (60, 40)
        assert 0 <= results["label_sets"]["top1"] <= results["label_sets"]["top5"] <= 1
    else:
        assert results["mapped"]["samples"] == results["mapped_only"]["samples"] == 40
        assert results["mapped_only"]["top1"] >= results["mapped"]["top1"]
        assert results["mapped_only"]["top5"] == 1, "there are five mapped classes"
