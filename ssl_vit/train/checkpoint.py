"""Checkpoints: written to be whole or not there, found, judged, pruned; and a run resumed from one."""

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_vit import fault_injection
from ssl_vit.distributed import Distributed
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.files import remove_temp_files, sha256, sync_folder, write_bytes
from ssl_vit.model import Tensors
from ssl_vit.train.logger import find_best_row, read_row, truncate_metrics
from ssl_vit.train.run_folder import Run

MANIFEST = "MANIFEST.json"
VERSION = 3
MAX_JSON_BYTES = 1 << 20  # bytes of a manifest, and of train.json
LIBRARIES = ("torch", "accelerate", "safetensors")
SLOW_SECONDS, SLOW_BYTES_PER_SECOND = 2.0, 50e6  # seconds, and bytes a second: a slower save than both is worth a word
MAX_SAVE_SECONDS = 25.0  # seconds that a save may take after a signal: launchers kill after 30


def publish(target: Path, write: Callable[[Path], object], **metadata: Any) -> None:
    """Let `write` fill a hidden folder and make it `target` by one rename; nothing is left of a failed attempt.

    `metadata` go into its manifest. Raises ExitError(DISK) where the disk does not take it.
    """
    draft = target.with_name(f".{target.name}.tmp")
    step = metadata.get("step", 0)
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write(draft)
        mode = draft.stat().st_mode & 0o666  # safetensors gives its files to their owner alone
        for path in draft.iterdir():
            path.chmod(mode)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sync_and_hash(path)}
            for path in sorted(draft.iterdir())
        }
        libraries = {name: version(name) for name in LIBRARIES}
        content = {"version": VERSION, **metadata, "libraries": libraries, "files": files}
        write_bytes(draft / MANIFEST, _encode_manifest(content).encode())
        fault_injection.fault_point("save.written", step)
        if target.exists():
            shutil.rmtree(target)
        os.rename(draft, target)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        reason = f"{error.strerror}: {error.filename or draft}" if isinstance(error, OSError) else str(error)
        hint = "mend the disk or free some of it, and start again"
        raise ExitError(ExitCode.DISK, f"{target}: could not be written ({reason}); {hint}") from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def _encode_manifest(content: dict[str, Any]) -> str:
    """A manifest's text: what it says, and the digest of that."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says; ValueError if it is not as it was written, ExitError if it is another version.

    Any version seals its manifest in the same way: so damage is told from what is newer than this code.
    """
    with (folder / MANIFEST).open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    content = json.loads(data)
    if _encode_manifest({name: value for name, value in content.items() if name != "digest"}).encode() != data:
        raise ValueError(f"{MANIFEST} differs from its digest")
    if content["version"] != VERSION:
        message = f"{folder}: {MANIFEST} has version {content['version']}, this code reads version {VERSION}"
        raise ExitError(ExitCode.INTEGRITY, f"{message}: go on with the code that wrote it, or name another run")
    return content


def find_corruption(folder: Path) -> str | None:
    """What is wrong with a published folder, or None: every file of its manifest is there, unchanged, and no other.

    Nothing but plain files is opened. Raises ExitError(INTEGRITY) for a manifest of another version.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder of its own"
    stats = {path.name: path.lstat() for path in folder.iterdir()}
    special_files = sorted(name for name, status in stats.items() if not stat.S_ISREG(status.st_mode))
    if special_files:
        return f"not a plain file: {', '.join(special_files)}"
    try:
        files = read_manifest(folder)["files"]
        for name, entry in files.items():
            if name not in stats:
                return f"{name} is missing"
            if stats[name].st_size != entry["bytes"] or sha256(folder / name) != entry["sha256"]:
                return f"{name} differs from its digest"
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"  # another OSError may pass: it ends this start and condemns nothing
    extra = stats.keys() - {MANIFEST, *files}
    return f"unexpected {', '.join(sorted(extra))}" if extra else None


def list_checkpoints(parent: Path) -> list[Path]:
    """The published checkpoints, oldest first."""
    return sorted(parent.glob("step-" + "[0-9]" * 8))


def step_of(folder: Path) -> int:
    """The step of a checkpoint, or of what was put aside, by its name."""
    return int(folder.name[5:13])


def newest_valid(parent: Path) -> Path | None:
    """The newest checkpoint that verifies; bad ones are renamed to `.corrupt-TIME`, and None means there never was one.

    Raises ExitError(INTEGRITY) where there are some and none verifies: a run never starts again in silence.
    """
    corrupt = [f"{folder.name} (put aside before)" for folder in sorted(parent.glob("step-*.corrupt-*"))]
    for folder in reversed(list_checkpoints(parent)):
        reason = find_corruption(folder)
        if reason is None:
            return folder
        quarantine = folder.with_name(f"{folder.name}.corrupt-{datetime.now():%Y%m%dT%H%M%S%f}")
        folder.rename(quarantine)
        corrupt.append(f"{quarantine.name} ({reason})")
        print(f"checkpoint {folder} is damaged, put aside as {quarantine.name}: {reason}", flush=True)
    if corrupt:
        hint = "bring one back, or begin anew with restart=true"
        raise ExitError(ExitCode.INTEGRITY, f"{parent}: no checkpoint verifies: {', '.join(corrupt)}; {hint}")
    return None


def clean_up(parent: Path, keep: int, protected_step: int | None = None) -> None:
    """Remove what a killed process left: drafts, what it was deleting, one checkpoint too many; mend the hint."""
    remove_temp_files(parent)
    for draft in parent.glob(".step-*.tmp"):
        draft.unlink() if draft.is_symlink() else shutil.rmtree(draft, ignore_errors=True)
    prune(parent, keep, protected_step)
    for last in list_checkpoints(parent)[-1:]:
        _write_latest(last)


def _write_latest(folder: Path) -> None:
    """Say in `latest`, for people and scripts, which checkpoint is the newest; nothing of ours believes it."""
    try:
        write_bytes(folder.parent / "latest", f"{folder.name}\n".encode())
    except OSError as error:
        print(f"{folder.parent / 'latest'} could not be written: {error.strerror}", flush=True)


def prune(parent: Path, keep: int, protected_step: int | None = None) -> None:
    """Delete the oldest checkpoints but `keep`, after a newer one is published; what resists stays for next time.

    That of the step `protected_step`, the best one, is not among those that count.
    """
    old = [folder for folder in list_checkpoints(parent)[:-keep] if step_of(folder) != protected_step]
    for folder in [*parent.glob(".step-*.trash"), *old]:
        trash = folder if folder.suffix == ".trash" else folder.with_name(f".{folder.name}.trash")
        try:
            folder.rename(trash)
            trash.unlink() if trash.is_symlink() else shutil.rmtree(trash)
        except OSError as error:
            print(f"old checkpoint {folder} could not be deleted, tried again later: {error}", flush=True)


def check_space(parent: Path, size: int) -> None:
    """Refuse with 74 where the disk has not 1.2 times the checkpoint's size left, before anything is written."""
    need, free = size * 6 // 5, shutil.disk_usage(parent).free
    if free < need:
        text = f"{parent}: a checkpoint needs {need} bytes, {free} are free"
        raise ExitError(ExitCode.DISK, f"{text}; free some and start again; {_describe_last(parent)}")


def _describe_last(parent: Path) -> str:
    last = list_checkpoints(parent)[-1:]
    return f"the last checkpoint is {last[0].name}" if last else "there is no checkpoint yet"


def save(
    parent: Path,
    step: int,
    state: dict[str, dict[str, Any]],
    keep: int,
    world: int = 1,
    protected_step: int | None = None,
) -> Path:
    """Publish `step-NNNNNNNN`, then delete all but the newest `keep` checkpoints and that of `protected_step`.

    Each part of `state` is a file: NAME.safetensors if it holds tensors, NAME.json if it holds plain values. Raises
    ExitError(DISK) if the disk does not take it; what was there before stays.
    """
    start = time.monotonic()
    target = parent / f"step-{step:08d}"
    size = sum(v.nbytes for part in state.values() for v in part.values() if isinstance(v, Tensor))

    def write(folder: Path) -> None:
        for name, part in state.items():
            if all(isinstance(value, Tensor) for value in part.values()):
                save_file({key: value.contiguous() for key, value in part.items()}, folder / f"{name}.safetensors")
            else:
                (folder / f"{name}.json").write_text(json.dumps(part, indent=1))
            fault_injection.fault_point("save.mid", step) if name == "model" else None

    try:
        parent.mkdir(parents=True, exist_ok=True)
        check_space(parent, size)
        publish(target, write, step=step, world=world)
        fault_injection.fault_point("save.published", step)
    except (OSError, ExitError) as error:
        reason = str(error) if isinstance(error, ExitError) else f"{target}: {error.strerror}: {error.filename}"
        last_checkpoint = _describe_last(parent)
        raise ExitError(
            ExitCode.DISK, reason if reason.endswith(last_checkpoint) else f"{reason}; {last_checkpoint}"
        ) from error
    _write_latest(target)
    prune(parent, keep, protected_step)
    fault_injection.fault_point("save.pruned", step)
    _warn_if_slow(target, size, time.monotonic() - start)
    return target


def _warn_if_slow(target: Path, size: int, seconds: float) -> None:
    if seconds > SLOW_SECONDS and size / seconds < SLOW_BYTES_PER_SECOND:
        warning = " A signal 30 s before a kill would come too late." if seconds > MAX_SAVE_SECONDS else ""
        print(f"slow disk: {target} took {seconds:.1f} s, {size / seconds / 1e6:.2f} MB/s.{warning}", flush=True)


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The parts of a checkpoint by name, tensors on the CPU; raises ExitError(INTEGRITY) if one cannot be read."""
    readers = {".safetensors": read_tensors, ".json": _read_json}
    paths = (path for path in sorted(folder.iterdir()) if path.name != MANIFEST)
    return {path.stem: readers[path.suffix](path) for path in paths}


def trained_weights(folder: Path) -> Tensors:
    """The weights to evaluate and export: their moving average if the run kept one, else the weights."""
    average = folder / "ema.safetensors"
    return read_tensors(average if average.exists() else folder / "model.safetensors")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(MAX_JSON_BYTES + 1))
        return {**values}
    except (ValueError, TypeError, RecursionError) as error:
        raise ExitError(ExitCode.INTEGRITY, f"{path}: not a file of values: {type(error).__name__}: {error}") from error


def read_tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ExitError(ExitCode.INTEGRITY, f"{path}: not a file of tensors: {error}") from error


def resume(run: Run, processes: Distributed, keep: int, data: str, best_metric: str | None = None) -> dict[str, Any]:
    """Set the run's step to that of its newest checkpoint and return the checkpoint's parts, or {} if there is none.

    `train.pending_log` says whether the step's row of metrics is still to be written. If one process cannot read the
    checkpoint, all raise the same ExitError; MISMATCH if it was trained on data of another digest than `data`.
    """

    def select_checkpoint() -> tuple[Path | None, bool]:
        folder = newest_valid(run.checkpoints)
        step = step_of(folder) if folder else 0
        truncate_metrics(run.folder, step)
        row = find_best_row(run.folder, best_metric)
        clean_up(run.checkpoints, keep, row["step"] if row else None)
        return folder, read_row(run.folder, step) is not None

    folder, row_exists = processes.run_on_main(select_checkpoint)
    fault_injection.fault_point("resume.chosen")
    run.step = 0
    if folder is None:
        return {}
    saved = processes.run_on_all(lambda: load(folder))
    train = saved["train"]
    if train["data"] != data:
        text = f"run={run.folder}: was started on other data than data.train holds now"
        raise ExitError(ExitCode.MISMATCH, text, shared=True)
    run.step = train["step"]
    fault_injection.fault_point("resume.loaded", run.step)
    if train["pending_log"] and row_exists:
        train["pending_log"], saved["metrics"] = False, {}
    return saved
