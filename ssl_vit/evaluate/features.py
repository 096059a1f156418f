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
from ssl_vit.data.loader import EvaluationStream, ProcessShard
from ssl_vit.distributed import Distributed
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.files import sha256, sync_folder, write_bytes
from ssl_vit.model import pool_tokens

ReadOut = Literal["mean", "class"]
FeatureName = tuple[int, ReadOut]
"""Of a set of features: the block's number, from 1, and how its tokens became one vector."""


class Features(Config):
    """Which features of an encoder are judged."""

    readouts: tuple[ReadOut, ...] = Field(
        default=("mean", "class"), min_length=1, description="mean of the patch tokens, class token"
    )
    layers: tuple[int, ...] = Field(default=(), description="blocks after which tokens are taken, from 1 (none: last)")
    cache: str | None = Field(default=None, description="folder where features are kept (none: RUN/features)")

    def names(self, encoder: Any) -> list[FeatureName]:
        """What to compute of an encoder; raises ExitError(USAGE) for a block that it has not."""
        depth = encoder.depth
        invalid = [layer for layer in self.layers if not 1 <= layer <= depth]
        if invalid:
            raise ExitError(ExitCode.USAGE, f"features.layers={invalid[0]}: the encoder's blocks are 1 to {depth}")
        readouts: list[ReadOut] = [readout for readout in self.readouts if readout == "mean" or encoder.prefix]
        if not readouts:
            raise ExitError(ExitCode.USAGE, "features.readouts=class: the encoder has no class token; take mean")
        return [(layer, readout) for layer in self.layers or (depth,) for readout in readouts]


@dataclass(frozen=True)
class Split:
    """The features of a split: float32 [N, D] by name, memory-mapped, and class numbers int64 [N], -1 = none."""

    features: dict[FeatureName, np.ndarray]
    labels: np.ndarray
    bad_samples: int = 0


def extract_features(
    encoder: Any,
    names: list[FeatureName],
    stream: EvaluationStream,
    shard: ProcessShard,
    processes: Distributed,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Step by step, where in the split a part begins and its rows: features by name, label, valid; on every process."""
    world, size = shard.world, shard.micro_batch
    for step, (_, batch) in enumerate(stream.enumerate_batches(shard, processes.device)):
        local_rows = {
            f"{layer}-{readout}": value
            for (layer, readout), value in pooled_features(encoder, names, batch["image"]).items()
        }
        local_rows |= {"label": batch["label"].clone(), "valid": batch["valid"].long()}
        slots = {name: value.new_zeros(world, *value.shape) for name, value in local_rows.items()}
        for name, value in local_rows.items():
            slots[name][shard.rank] = value
        gathered = processes.all_reduce(slots)
        start = step * world * size
        yield start, {name: v.flatten(0, 1)[: stream.count - start].cpu().numpy() for name, v in gathered.items()}


@torch.no_grad()
def pooled_features(encoder: Any, names: list[FeatureName], image: Tensor) -> dict[FeatureName, Tensor]:
    """One vector an image, float32 [B, D], for every name."""
    tokens = encoder.layers(image, {layer for layer, _ in names})
    return {(layer, readout): pool_tokens(tokens[layer], readout, encoder.prefix).float() for layer, readout in names}


@torch.no_grad()
def dense(encoder: Any, image: Tensor, layers: tuple[int, ...] = ()) -> list[Tensor]:
    """Maps [B, D, h, w] of the patch tokens of an image uint8 [B, C, H, W], for detection and segmentation.

    One for each of `layers`, numbers of blocks from 1; without any, of the last.
    """
    blocks = layers or (encoder.depth,)
    tokens = encoder.layers(image, set(blocks))
    patches = (tokens[layer][:, encoder.prefix :].transpose(1, 2) for layer in blocks)
    return [feature_map.unflatten(2, encoder.grid) for feature_map in patches]


def features_digest(encoder: nn.Module, names: list[FeatureName], stream: EvaluationStream) -> str:
    """Equal where the features are: of weights, architecture, samples and preparation."""
    hasher = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        hasher.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    data = stream.samples.config
    ids = "all" if stream.ids is None else hashlib.sha256(stream.ids.tobytes()).hexdigest()
    fields = [str(encoder.config), sorted(names), stream.samples.manifest.identity, ids]  # type: ignore[union-attr]
    fields += [data.image_hw, data.eval_crop, data.crop]
    labels = hashlib.sha256(stream.samples.manifest.labels.tobytes()).hexdigest()
    hasher.update(json.dumps([*fields, labels]).encode())
    return hasher.hexdigest()[:32]


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One start at a time makes the features of a folder; another waits, and then finds them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, be it by a kill
        yield


def load_features(folder: Path, names: list[FeatureName]) -> Split | None:
    """The features in a folder; None where they are not there, or not as they were written."""
    try:
        metadata = json.loads((folder / "features.json").read_text())
        expected = {"label.npy", "valid.npy", *(f"{layer}-{readout}.npy" for layer, readout in names)}
        if not expected <= set(metadata["files"]) or any(sha256(folder / n) != d for n, d in metadata["files"].items()):
            print(f"{folder}: altered since it was written; computed anew", flush=True)
            return None
        arrays = {name: np.load(folder / f"{name[0]}-{name[1]}.npy", mmap_mode="r") for name in names}
        return _valid_only(arrays, np.load(folder / "label.npy"), np.load(folder / "valid.npy"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _valid_only(arrays: dict[FeatureName, np.ndarray], labels: np.ndarray, valid: np.ndarray) -> Split:
    """Without the samples that could not be read; they are copied then."""
    num_bad = int((valid == 0).sum())
    if num_bad:
        arrays = {name: array[valid > 0] for name, array in arrays.items()}
    return Split(arrays, labels[valid > 0], num_bad)


def write_features(
    folder: Path,
    parts: Iterator[tuple[int, dict[str, np.ndarray]]],
    count: int,
    on_complete: Callable[[], None] = lambda: None,
) -> None:
    """Write the features of a split into a folder, which is there whole or not at all.

    `on_complete` is called when all parts came, and raises where they are not the split's.
    """
    temp_folder = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temp_folder, ignore_errors=True)
    temp_folder.mkdir(parents=True)
    arrays: dict[str, Any] = {}
    for start, rows in parts:
        for name, row in rows.items():
            if name not in arrays:
                shape = (count, *row.shape[1:])
                path = temp_folder / f"{name}.npy"
                arrays[name] = np.lib.format.open_memmap(path, "w+", row.dtype, shape)
                with path.open("r+b") as file:  # a full disk is an error here, and a SIGBUS where a page is written
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            arrays[name][start : start + len(row)] = row
    on_complete()
    for array in arrays.values():
        array.flush()
    files = {path.name: sha256(path) for path in sorted(temp_folder.iterdir())}
    write_bytes(temp_folder / "features.json", json.dumps({"files": files}, indent=1).encode())
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temp_folder, folder)
    sync_folder(folder.parent)
