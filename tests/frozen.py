"""A classifier that timm wrote, images that need no resizing, and starts of the tools that judge it.

And what the protocols are, in numpy and float64: slow, short, and nothing of ours in it.
"""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from ssl_vit.convert.make_shards import MakeShards, convert
from ssl_vit.data import manifest
from ssl_vit.encoders import export
from ssl_vit.encoders.vit import Vit
from tests.starts import Start, call

SIDE = 16
QUICK = ["few_shot.shots=1,2", "linear.l2=0.01", "metrics.bootstrap=20", "random=false", "batch=3", "data.workers=0"]
LOUD = 0.3  # standard deviation of weights at which predictions differ between images


def run_tool(tool: str, words: list[str], logs: Path, world: int = 1, codes: tuple[int, ...] = (0,)) -> str:
    """What a tool said, in this process or, of several ranks, in its own; it ended with one of `codes`.

    A refusal is one line.
    """
    if world == 1:
        code, said = call(tool, words)
        ended = [code]
    else:
        start = Start(words, logs / "logs", world, tool=tool)
        ended, said = start.wait(120), start.said()
        assert not start.orphans
    assert set(ended) <= set(codes), f"{ended}: {said}"
    if codes != (0,):
        assert "Traceback" not in said, said
        assert len(closing(tool, said)) == 1, said
    return said


def closing(tool: str, said: str) -> list[str]:
    """The lines that a tool ends with."""
    return [line for line in said.splitlines() if line.startswith(f"{tool}.py: ")]


def refused(tool: str, words: list[str], logs: Path, code: int | None = None) -> str:
    """The one line with which a tool refuses what it was given, as usage (64) or data (65)."""
    said = run_tool(tool, words, logs, codes=(64, 65) if code is None else (code,))
    return closing(tool, said)[0]


def results(run: Path, name: str = "results.json") -> dict[str, Any]:
    """A run's results; strict JSON, so that no NaN is in it."""

    def strange(word: str) -> None:
        raise ValueError(f"{word} in {name}")

    return json.loads((run / name).read_text(), parse_constant=strange)


def read(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The columns of predictions, and their rows by file."""
    with path.open(newline="", encoding="utf-8") as text:
        columns, *rows = list(csv.reader(text))
    assert all(len(row) == len(columns) for row in rows)
    found = {row[0]: row[1:] for row in rows}
    assert len(found) == len(rows), "a file has one row"
    return columns, found


def stamps(folder: Path, pattern: str = "*") -> dict[Path, int]:
    """When what lies in a folder was written."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob(pattern))}


def find(tree: Any, name: str) -> Any:
    """The first value of this name anywhere in results."""
    if isinstance(tree, dict):
        if name in tree:
            return tree[name]
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            if (found := find(branch, name)) is not None:
                return found
    return None


def draw(folder: Path, files: list[str], seed: int = 0) -> None:
    """Images of random large blocks of colour, exactly SIDE pixels, so that no two programs resize them unlike."""
    random = np.random.default_rng(seed)
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = random.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
        Image.fromarray(blocks).save(path, format="PNG")


def classifier(folder: Path, names: list[str], seed: int = 0, **more: Any) -> torch.nn.Module:
    """A tiny ViT with a loud random head, written as timm writes one for others; returns timm's own of it."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"img_size": SIDE, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=len(names), **(arguments | more))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=LOUD)
    with torch.no_grad():  # every class is the best of some images
        model.head.weight *= 3
        blocks = (torch.rand(200, 3, 4, 4) * 2 - 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        model.head.bias -= model.eval()(blocks).mean(0)
    preparation = {"input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    written = {"label_names": names, "pretrained_cfg": preparation}
    timm.models.save_for_hf(model, str(folder), written, arguments | more, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, files: list[Path]) -> np.ndarray:
    """What timm's model says of the images, [N, classes]."""
    pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in files]
    return model((torch.stack(pixels) / 255 - 0.5) / 0.5).numpy()


def encoder(folder: Path, change: Callable[[Any], object] = lambda made: None, **numbers: Any) -> Path:
    """A tiny encoder as a run exports it, RUN/encoder, with loud random weights and then changed; returns the run."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"size": "Ti", "width": 16, "depth": 2, "heads": 2, "patch": 4, "image": SIDE}
    made = Vit(**(given | numbers)).build()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=LOUD)
    change(made)
    export.export(made, folder / "encoder")
    return folder


def shards(folder: Path, names: list[str], seed: int = 0, **more: Any) -> Path:
    """Images of these names, converted."""
    draw(folder / "images", names, seed)
    convert(MakeShards(input=str(folder / "images"), output=str(folder / "shards"), workers=1, quiet=True, **more))
    return folder / "shards"


def damaged(given: Path, folder: Path) -> Path:
    """A copy of given shards in which sample 1 of val cannot be read; returns the tar that it is in."""
    shutil.copytree(given, folder)
    entry, tar = manifest.load(folder / "val").index(0)[1], folder / "val" / "000000.tar"
    with tar.open("r+b") as file:
        file.seek(int(entry["offset"]) + 30)
        file.write(b"\0damaged\0")
    return tar


def files(train: dict[str, int], val: dict[str, int]) -> list[str]:
    """File names, by how many images each class has in a split."""
    both = (("train", train), ("val", val))
    return [f"{split}/{name}/{i}.png" for split, counts in both for name, n in counts.items() for i in range(n)]


def words(given: Path, run: Path, **changed: str) -> list[str]:
    """An evaluation of given/run on given/shards, with keys changed (a dot as __) or, if empty, left out."""
    keys = {"encoder": f"{given}/run", "data__train": f"{given}/shards/train", "data__val": f"{given}/shards/val"}
    keys |= {"run": str(run)} | changed
    return QUICK + [f"{name.replace('__', '.')}={value}" for name, value in keys.items() if value]


def numbers(run: Path) -> dict[str, Any]:
    """What an evaluation measured, without its command."""
    return {name: value for name, value in results(run).items() if name != "command"}


# --- the protocols


def plain_few_shot(
    x: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, l2: float, dual: bool
) -> np.ndarray:
    """Scores of the test features: regularised least squares as paper 5.1 words it, by np.linalg.solve."""
    x, test = x.astype(np.float64), test.astype(np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, test = ((part - mean) / std for part in (x, test))
    x, test = (np.hstack([part, np.full((len(part), 1), 100.0)]) for part in (x, test))
    y = 2.0 * (labels[:, None] == np.arange(classes)) - 1
    if dual:
        return test @ x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(len(x)), y)
    return test @ np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ y)


def plain_knn(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, k: int, temperature: float
) -> np.ndarray:
    """Votes of the k nearest by cosine, exp(similarity / temperature) each, one test image and neighbour at a time."""
    votes = np.zeros((len(test), classes))
    for i, x in enumerate(test.astype(np.float64)):
        similar = [float(x @ y) / (np.linalg.norm(x) * np.linalg.norm(y)) for y in train.astype(np.float64)]
        for j in sorted(range(len(similar)), key=lambda j: -similar[j])[:k]:
            votes[i, labels[j]] += np.exp(similar[j] / temperature)
    return votes
