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

from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.data import manifest
from ssl_vit.encoders import export
from ssl_vit.encoders.vit import Vit
from tests.processes import Start, call_tool

SIDE = 16
QUICK_ARGS = [
    "few_shot.shots=1,2",
    "linear.l2=0.01",
    "metrics.bootstrap=20",
    "random=false",
    "batch=3",
    "data.workers=0",
]
WEIGHT_STD = 0.3  # standard deviation of weights at which predictions differ between images


def run_tool(tool: str, args: list[str], log_dir: Path, world: int = 1, codes: tuple[int, ...] = (0,)) -> str:
    """What a tool said, in this process or, of several ranks, in its own; it ended with one of `codes`.

    A refusal is one line.
    """
    if world == 1:
        code, output = call_tool(tool, args)
        exit_codes = [code]
    else:
        start = Start(args, log_dir / "logs", world, tool=tool)
        exit_codes, output = start.wait(120), start.output()
        assert not start.orphans
    assert set(exit_codes) <= set(codes), f"{exit_codes}: {output}"
    if codes != (0,):
        assert "Traceback" not in output, output
        assert len(closing_lines(tool, output)) == 1, output
    return output


def closing_lines(tool: str, output: str) -> list[str]:
    """The lines that a tool ends with."""
    return [line for line in output.splitlines() if line.startswith(f"{tool}.py: ")]


def refusal_line(tool: str, args: list[str], log_dir: Path, code: int | None = None) -> str:
    """The one line with which a tool refuses what it was given, as usage (64) or data (65)."""
    output = run_tool(tool, args, log_dir, codes=(64, 65) if code is None else (code,))
    return closing_lines(tool, output)[0]


def read_results(run: Path, name: str = "results.json") -> dict[str, Any]:
    """A run's results; strict JSON, so that no NaN is in it."""

    def reject_constant(constant: str) -> None:
        raise ValueError(f"{constant} in {name}")

    return json.loads((run / name).read_text(), parse_constant=reject_constant)


def read_predictions(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The columns of predictions, and their rows by file."""
    with path.open(newline="", encoding="utf-8") as file:
        columns, *rows = list(csv.reader(file))
    assert all(len(row) == len(columns) for row in rows)
    rows_by_file = {row[0]: row[1:] for row in rows}
    assert len(rows_by_file) == len(rows), "a file has one row"
    return columns, rows_by_file


def modified_times(folder: Path, pattern: str = "*") -> dict[Path, int]:
    """When what lies in a folder was written."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob(pattern))}


def find_value(tree: Any, name: str) -> Any:
    """The first value of this name anywhere in results."""
    if isinstance(tree, dict):
        if name in tree:
            return tree[name]
        tree = list(tree.values())
    if isinstance(tree, list):
        for child in tree:
            if (value := find_value(child, name)) is not None:
                return value
    return None


def draw_blocks(folder: Path, names: list[str], seed: int = 0) -> None:
    """Images of random large blocks of color, exactly SIDE pixels, so that no two programs resize them unlike."""
    rng = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
        Image.fromarray(blocks).save(path, format="PNG")


def write_classifier(folder: Path, names: list[str], seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A tiny ViT with a loud random head, written as timm writes one for others; returns timm's own of it."""
    torch.manual_seed(seed)
    model_args: dict[str, Any] = {"img_size": SIDE, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=len(names), **(model_args | overrides))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=WEIGHT_STD)
    with torch.no_grad():  # every class is the best of some images
        model.head.weight *= 3
        blocks = (torch.rand(200, 3, 4, 4) * 2 - 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        model.head.bias -= model.eval()(blocks).mean(0)
    pretrained_cfg = {"input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    config = {"label_names": names, "pretrained_cfg": pretrained_cfg}
    timm.models.save_for_hf(model, str(folder), config, model_args | overrides, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@torch.no_grad()
def timm_logits(model: torch.nn.Module, files: list[Path]) -> np.ndarray:
    """What timm's model says of the images, [N, classes]."""
    pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in files]
    return model((torch.stack(pixels) / 255 - 0.5) / 0.5).numpy()


def export_tiny_encoder(folder: Path, modify: Callable[[Any], object] = lambda encoder: None, **overrides: Any) -> Path:
    """A tiny encoder as a run exports it, RUN/encoder, with loud random weights and then changed; returns the run."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"size": "Ti", "width": 16, "depth": 2, "heads": 2, "patch": 4, "image": SIDE}
    encoder = Vit(**(options | overrides)).build()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=WEIGHT_STD)
    modify(encoder)
    export.export_encoder(encoder, folder / "encoder")
    return folder


def write_shards(folder: Path, names: list[str], seed: int = 0, **options: Any) -> Path:
    """Images of these names, converted."""
    draw_blocks(folder / "images", names, seed)
    convert_images(
        MakeShards(input=str(folder / "images"), output=str(folder / "shards"), workers=1, quiet=True, **options)
    )
    return folder / "shards"


def damage_shards(source: Path, folder: Path) -> Path:
    """A copy of given shards in which sample 1 of val cannot be read; returns the tar that it is in."""
    shutil.copytree(source, folder)
    entry, tar = manifest.load(folder / "val").index(0)[1], folder / "val" / "000000.tar"
    with tar.open("r+b") as file:
        file.seek(int(entry["offset"]) + 30)
        file.write(b"\0damaged\0")
    return tar


def image_names(train: dict[str, int], val: dict[str, int]) -> list[str]:
    """File names, by how many images each class has in a split."""
    splits = (("train", train), ("val", val))
    return [f"{split}/{name}/{i}.png" for split, counts in splits for name, n in counts.items() for i in range(n)]


def evaluate_args(folder: Path, run: Path, **changes: str) -> list[str]:
    """An evaluation of given/run on given/shards, with keys changed (a dot as __) or, if empty, left out."""
    keys = {"encoder": f"{folder}/run", "data__train": f"{folder}/shards/train", "data__val": f"{folder}/shards/val"}
    keys |= {"run": str(run)} | changes
    return QUICK_ARGS + [f"{name.replace('__', '.')}={value}" for name, value in keys.items() if value]


def measured_results(run: Path) -> dict[str, Any]:
    """What an evaluation measured, without its command."""
    return {name: value for name, value in read_results(run).items() if name != "command"}


# --- the protocols


def reference_few_shot(
    x: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, l2: float, dual: bool
) -> np.ndarray:
    """Scores of the test features: regularized least squares as paper 5.1 words it, by np.linalg.solve."""
    x, test = x.astype(np.float64), test.astype(np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, test = ((features - mean) / std for features in (x, test))
    x, test = (np.hstack([features, np.full((len(features), 1), 100.0)]) for features in (x, test))
    y = 2.0 * (labels[:, None] == np.arange(classes)) - 1
    if dual:
        return test @ x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(len(x)), y)
    return test @ np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ y)


def reference_knn(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, k: int, temperature: float
) -> np.ndarray:
    """Votes of the k nearest by cosine, exp(similarity / temperature) each, one test image and neighbor at a time."""
    votes = np.zeros((len(test), classes))
    for i, x in enumerate(test.astype(np.float64)):
        similarities = [float(x @ y) / (np.linalg.norm(x) * np.linalg.norm(y)) for y in train.astype(np.float64)]
        for j in sorted(range(len(similarities)), key=lambda j: -similarities[j])[:k]:
            votes[i, labels[j]] += np.exp(similarities[j] / temperature)
    return votes
