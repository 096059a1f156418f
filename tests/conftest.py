"""What all tests share: the tiers, the two workers, one tiny data set and one tiny run. See docs/testing.md."""

import gc
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from PIL import Image

from ssl_vit.convert.make_shards import MakeShards, convert_images
from tests.count_starts import StartCounter

COLORS = {"blue": (20, 40, 220), "green": (30, 200, 60), "red": (220, 30, 40)}
pytest_plugins = ("tests.data.fixtures", "tests.evaluate.fixtures")

TINY = [
    *("encoder.size=Ti", "encoder.width=16", "encoder.depth=2", "encoder.heads=2", "encoder.patch=4"),
    *("data.image_size=16", "data.workers=0", "batch=8", "quiet=true"),
]
"""Overrides of a model and a batch that train in milliseconds."""

_last_path: Path | None = None  # that of the last test

torch.set_num_threads(1)


settings.register_profile("default", deadline=None, derandomize=True, database=None, max_examples=20)
settings.register_profile("all", settings.get_profile("default"), max_examples=100)
settings.load_profile("default")  # make test-all: --hypothesis-profile=all


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run files, and the tests of each, in a random order")
    parser.addoption("--starts", action="store_true", help="print how many processes each file starts")


def pytest_configure(config: pytest.Config) -> None:
    """The suite is the CPU's, in fp32, wherever it runs; `pytest -m gpu` is the GPU's."""
    if config.option.markexpr != "gpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"
        os.environ["DS_ACCELERATOR"] = "cpu"  # else whatever imports DeepSpeed first prints a warning
    config.pluginmanager.register(StartCounter())


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep together what shares a module fixture, and on one worker all that starts several ranks (`ranks`)."""
    rank_paths = {item.path for item in items if item.get_closest_marker("ranks")}
    for item in items:
        shares_fixture = any(fixture.scope in ("module", "class") for fixture in _fixture_defs(item))
        if item.get_closest_marker("ranks") or (shares_fixture and item.path in rank_paths):
            item.add_marker(pytest.mark.xdist_group("ranks"))
        elif shares_fixture:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
    if (seed := config.option.shuffle) is not None:
        rng = random.Random(seed)
        file_order = {item.nodeid.partition("::")[0]: rng.random() for item in items}
        items.sort(key=lambda item: (file_order[item.nodeid.partition("::")[0]], rng.random()))
    items.sort(key=lambda item: item.get_closest_marker("ranks") is None)  # the longest group begins first


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed what is random, so that it does not depend on the order, and keep garbage collection short.

    Accelerate collects after each training, of which there are hundreds: what earlier files left is no garbage of it.
    """
    torch.manual_seed(0)
    np.random.seed(0)
    global _last_path
    if item.path != _last_path:
        _last_path = item.path
        gc.collect()
        gc.freeze()


def _fixture_defs(item: pytest.Item) -> list[pytest.FixtureDef]:
    info = getattr(item, "_fixtureinfo", None)
    return [definitions[-1] for definitions in info.name2fixturedefs.values()] if info else []


def build_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of this name that `make` has filled, once for all workers of this session."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not (root / f"{name}.done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (root / f"{name}.done").touch()
    return folder


def draw_squares(folder: Path, count: int = 12, side: int = 20) -> None:
    """Write `count` noisy squares a class, folder/COLOR/NN.png."""
    rng = np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise = rng.integers(-20, 20, (side, side, 3))
            pixels = (np.array(color) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in the process; a training that a test runs in this one is a start of its own."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class folder of colored squares; tests only read it."""
    return build_once(tmp_path_factory, "squares", draw_squares)


@pytest.fixture(scope="session")
def shards(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The squares as shards, train/ and val/: 25 and 11 samples; tests only read them."""

    def make(folder: Path) -> None:
        options = {"val_fraction": 0.3, "shard_samples": 7, "workers": 1, "quiet": True}
        convert_images(MakeShards(input=str(squares), output=str(folder), **options))

    return build_once(tmp_path_factory, "shards", make)


@pytest.fixture(scope="session")
def tiny_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The finished run of tests/runs.py on so many ranks, which others are compared with; tests only read it."""
    from tests import tiny_runs

    def get(world: int) -> Path:
        make = partial(tiny_runs.run_straight, shards, world)
        return build_once(tmp_path_factory, f"tiny-run-{world}", make) / "run"

    return get
