"""One tiny data set for all: squares whose colour is their class, as a folder of PNGs and as shards."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit import exits
from ssl_vit.data.shards import MakeShards, convert

COLORS = {"blue": (20, 40, 220), "green": (30, 200, 60), "red": (220, 30, 40)}
TINY = [
    *("encoder.size=Ti", "encoder.width=16", "encoder.depth=2", "encoder.heads=2", "encoder.patch=4"),
    *("data.image_size=16", "data.workers=0", "batch=8", "quiet=true"),
]
"""Overrides of a model and a batch that train in milliseconds."""

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """The suite is the CPU's, in fp32, wherever it runs; `pytest -m gpu` is the GPU's."""
    if config.option.markexpr != "gpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"


def draw_squares(folder: Path, count: int = 12, side: int = 20) -> None:
    """Write `count` noisy squares a class, folder/COLOUR/NN.png."""
    random = np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise = random.integers(-20, 20, (side, side, 3))
            pixels = (np.array(color) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes minutes runs where it is asked for: `make test-long`."""
    if "long" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(autouse=True)
def own_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that runs in this process leaves its signals alone: they are answered for a whole process."""
    monkeypatch.setattr(exits, "_answer_signals", lambda: None)


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class folder of coloured squares."""
    folder = tmp_path_factory.mktemp("squares")
    draw_squares(folder)
    return folder


@pytest.fixture(scope="session")
def shards(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The squares as shards, train/ and val/."""
    folder = tmp_path_factory.mktemp("shards")
    convert(
        MakeShards(input=str(squares), output=str(folder), val_fraction=0.3, shard_samples=7, workers=1, quiet=True)
    )
    return folder
