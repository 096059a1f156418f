"""Checkpoints that are there whole or not at all, and that execute nothing when they are read.

A checkpoint is written to a hidden folder, every file flushed and digested, MANIFEST.json last, and published by one
rename. Reading starts from the newest that verifies; a bad one is put aside under a name that says so. Tensors are
safetensors, all else is JSON.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_vit.durable import sha256, sync_folder, write_bytes
from ssl_vit.exits import DISK, INTEGRITY, Refusal

MANIFEST = "MANIFEST.json"
VERSION = 1
Tensors = dict[str, Tensor]
"""By name: `encoder.norm.weight` of a model, `encoder.norm.weight/exp_avg` of an optimizer."""


def publish(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a hidden folder and make it `target` by one rename; nothing is left of a failed attempt."""
    draft = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        write(draft)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _flushed(path)} for path in sorted(draft.iterdir())
        }
        write_bytes(draft / MANIFEST, json.dumps({"version": VERSION, "files": files}, indent=1).encode())
        if target.exists():
            shutil.rmtree(target)
        os.rename(draft, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _flushed(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def flaw(folder: Path) -> str | None:
    """What is wrong with a published folder, or None: every file of its manifest is there, unchanged, and no other."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        files = content["files"]
        if content["version"] != VERSION:
            return f"{MANIFEST} has version {content['version']}, this reads {VERSION}"
        for name, entry in files.items():
            if Path(name).name != name or sha256(folder / name) != entry["sha256"]:
                return f"{name} differs from its digest"
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"  # another OSError may pass: it ends this start and condemns nothing
    extra = {path.name for path in folder.iterdir()} - {MANIFEST, *files}
    return f"unexpected {', '.join(sorted(extra))}" if extra else None


def steps(parent: Path) -> list[Path]:
    """The published checkpoints, oldest first."""
    return sorted(parent.glob("step-" + "[0-9]" * 8))


def newest(parent: Path) -> Path | None:
    """The newest checkpoint that verifies; bad ones are renamed to `.corrupt`, and None means there never was one.

    Raises Refusal(INTEGRITY) where there are some and none verifies: a run never starts again in silence.
    """
    bad = [f"{folder.name} (put aside before)" for folder in sorted(parent.glob("step-*.corrupt"))]
    for folder in reversed(steps(parent)):
        why = flaw(folder)
        if why is None:
            return folder
        aside = folder.with_name(f"{folder.name}.corrupt")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        bad.append(f"{aside.name} ({why})")
        print(f"checkpoint {folder} is damaged, put aside as {aside.name}: {why}", flush=True)
    if bad:
        raise Refusal(
            INTEGRITY, f"{parent}: no checkpoint verifies: {', '.join(bad)}; restore one, or name another run"
        )
    return None


def prune(parent: Path, keep: int) -> None:
    """Delete the oldest checkpoints but `keep`, after a newer one is published; what resists stays for next time."""
    for folder in steps(parent)[:-keep]:
        trash = folder.with_name(f".{folder.name}.trash")
        try:
            folder.rename(trash)
            shutil.rmtree(trash)
        except OSError as error:
            print(f"old checkpoint {folder} could not be deleted: {error}", flush=True)


def check_space(parent: Path) -> None:
    """Refuse with 74 where the disk has not 1.2 times the last checkpoint's size left, before anything is written."""
    last = steps(parent)[-1:]
    need = sum(path.stat().st_size for folder in last for path in folder.iterdir()) * 6 // 5
    free = shutil.disk_usage(parent).free
    if free < need:
        raise Refusal(DISK, f"{parent}: a checkpoint needs {need} bytes, {free} are free; free some and start again")


def save(parent: Path, step: int, keep: int, model: Tensors, optimizer: Tensors, state: dict[str, Any]) -> Path:
    """Publish `step-NNNNNNNN` with the weights, the optimizer's state, tensors and values of `state`; then prune."""
    parent.mkdir(parents=True, exist_ok=True)
    check_space(parent)
    target = parent / f"step-{step:08d}"
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in state.items() if name not in tensors}

    def write(folder: Path) -> None:
        for name, content in (("model", model), ("optimizer", optimizer), ("state", tensors)):
            save_file({key: value.contiguous() for key, value in content.items()}, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(json.dumps(values, indent=1))

    publish(target, write)
    prune(parent, keep)
    return target


def load(folder: Path) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """A checkpoint's weights, optimizer state, and `state`; tensors on the CPU."""
    optimizer, tensors = (load_file(folder / f"{name}.safetensors") for name in ("optimizer", "state"))
    return weights(folder), optimizer, json.loads((folder / "state.json").read_text()) | tensors


def weights(folder: Path) -> Tensors:
    """A checkpoint's weights alone, on the CPU."""
    return load_file(folder / "model.safetensors")
