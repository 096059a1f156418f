"""Frozen features: computed once for a split, in one pass for all layers and read-outs, and kept on disk by digest."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.data.loader import EvaluationStream, Share
from ssl_vit.errors import USAGE, Refusal
from ssl_vit.files import sha256, sync_folder, write_bytes
from ssl_vit.model import read_out

ReadOut = Literal["mean", "class"]
Name = tuple[int, ReadOut]
"""Of a set of features: the block's number, from 1, and how its tokens became one vector."""
Total = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Features(Config):
    """Which features of an encoder are judged."""

    readouts: tuple[ReadOut, ...] = Field(
        default=("mean", "class"), min_length=1, description="mean of the patch tokens, class token"
    )
    layers: tuple[int, ...] = Field(default=(), description="blocks after which tokens are taken, from 1 (none: last)")
    cache: str | None = Field(default=None, description="folder where features are kept (none: RUN/features)")

    def names(self, encoder: Any) -> list[Name]:
        """What to compute of an encoder; raises Refusal(USAGE) for a block that it has not."""
        depth = encoder.depth
        strange = [layer for layer in self.layers if not 1 <= layer <= depth]
        if strange:
            raise Refusal(USAGE, f"features.layers={strange[0]}: the encoder's blocks are 1 to {depth}")
        readouts: list[ReadOut] = [one for one in self.readouts if one == "mean" or encoder.prefix]
        if not readouts:
            raise Refusal(USAGE, "features.readouts=class: the encoder has no class token; take mean")
        return [(layer, readout) for layer in self.layers or (depth,) for readout in readouts]


@dataclass(frozen=True)
class Split:
    """The features of a split: float32 [N, D] by name, memory-mapped, and class numbers int64 [N], -1 = none."""

    features: dict[Name, np.ndarray]
    labels: np.ndarray
    bad_samples: int = 0


def extract(
    encoder: Any, names: list[Name], stream: EvaluationStream, share: Share, device: torch.device, total: Total
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Step by step, where in the split a part begins and its rows: features by name, label, valid; on every process."""
    world, size = share.world, share.micro_batch
    for step, (_, batch) in enumerate(stream.placed(share, device)):
        mine = {f"{layer}-{way}": value for (layer, way), value in vectors(encoder, names, batch["image"]).items()}
        mine |= {"label": batch["label"].clone(), "valid": batch["valid"].long()}
        whole = {name: value.new_zeros(world, *value.shape) for name, value in mine.items()}
        for name, value in mine.items():
            whole[name][share.rank] = value
        parts = total(whole) if world > 1 else whole
        start = step * world * size
        yield start, {name: v.flatten(0, 1)[: stream.count - start].cpu().numpy() for name, v in parts.items()}


@torch.no_grad()
def vectors(encoder: Any, names: list[Name], image: Tensor) -> dict[Name, Tensor]:
    """One vector an image, float32 [B, D], for every name."""
    tokens = encoder.layers(image, {layer for layer, _ in names})
    return {(layer, way): read_out(tokens[layer], way, encoder.prefix).float() for layer, way in names}


@torch.no_grad()
def dense(encoder: Any, image: Tensor, layers: tuple[int, ...] = ()) -> list[Tensor]:
    """Maps [B, D, h, w] of the patch tokens of an image uint8 [B, C, H, W], for detection and segmentation.

    One for each of `layers`, numbers of blocks from 1; without any, of the last.
    """
    wanted = layers or (encoder.depth,)
    tokens = encoder.layers(image, set(wanted))
    patches = (tokens[layer][:, encoder.prefix :].transpose(1, 2) for layer in wanted)
    return [one.unflatten(2, encoder.grid) for one in patches]


def digest(encoder: nn.Module, names: list[Name], stream: EvaluationStream) -> str:
    """Equal where the features are: of weights, architecture, samples and preparation."""
    found = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    data = stream.samples.config
    ids = "all" if stream.ids is None else hashlib.sha256(stream.ids.tobytes()).hexdigest()
    said = [str(encoder.config), sorted(names), stream.samples.manifest.identity, ids]  # type: ignore[union-attr]
    said += [data.image_hw, data.eval_crop, data.whole]
    labels = hashlib.sha256(stream.samples.manifest.labels.tobytes()).hexdigest()
    found.update(json.dumps([*said, labels]).encode())
    return found.hexdigest()[:32]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One start at a time makes the features of a folder; another waits, and then finds them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, be it by a kill
        yield


def load(folder: Path, names: list[Name]) -> Split | None:
    """The features in a folder; None where they are not there, or not as they were written."""
    try:
        said = json.loads((folder / "features.json").read_text())
        wanted = {"label.npy", "valid.npy", *(f"{layer}-{way}.npy" for layer, way in names)}
        if not wanted <= set(said["files"]) or any(sha256(folder / n) != d for n, d in said["files"].items()):
            print(f"{folder}: altered since it was written; computed anew", flush=True)
            return None
        arrays = {name: np.load(folder / f"{name[0]}-{name[1]}.npy", mmap_mode="r") for name in names}
        return _usable(arrays, np.load(folder / "label.npy"), np.load(folder / "valid.npy"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _usable(arrays: dict[Name, np.ndarray], labels: np.ndarray, valid: np.ndarray) -> Split:
    """Without the samples that could not be read; they are copied then."""
    bad = int((valid == 0).sum())
    if bad:
        arrays = {name: array[valid > 0] for name, array in arrays.items()}
    return Split(arrays, labels[valid > 0], bad)


def write(
    folder: Path,
    parts: Iterator[tuple[int, dict[str, np.ndarray]]],
    count: int,
    sound: Callable[[], None] = lambda: None,
) -> None:
    """Write the features of a split into a folder, which is there whole or not at all.

    `sound` is called when all parts came, and raises where they are not the split's.
    """
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    arrays: dict[str, Any] = {}
    for start, rows in parts:
        for name, row in rows.items():
            if name not in arrays:
                shape = (count, *row.shape[1:])
                path = draft / f"{name}.npy"
                arrays[name] = np.lib.format.open_memmap(path, "w+", row.dtype, shape)
                with path.open("r+b") as file:  # a full disk is an error here, and a SIGBUS where a page is written
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            arrays[name][start : start + len(row)] = row
    sound()
    for array in arrays.values():
        array.flush()
    files = {path.name: sha256(path) for path in sorted(draft.iterdir())}
    write_bytes(draft / "features.json", json.dumps({"files": files}, indent=1).encode())
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(draft, folder)
    sync_folder(folder.parent)
