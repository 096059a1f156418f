"""Checkpoints: written to be whole or not there, found, judged, pruned; and a run resumed from one."""

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_vit import fault_injection
from ssl_vit.distributed import from_main, together
from ssl_vit.errors import DISK, INTEGRITY, MISMATCH, Refusal
from ssl_vit.files import sha256, sweep, sync_folder, write_bytes
from ssl_vit.model import Model
from ssl_vit.train.anomalies import NOTHING, LeftOut
from ssl_vit.train.logger import best_row, rewind, row_of
from ssl_vit.train.metrics import Window
from ssl_vit.train.run_folder import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "MANIFEST.json"
VERSION = 2
MOST = 1 << 20  # bytes of a manifest, and of state.json
LIBRARIES = ("torch", "accelerate", "safetensors")
SLOW, SLOW_RATE = 2.0, 50e6  # seconds, and bytes a second: a slower save than both is worth a word
BUDGET = 25.0  # seconds that a save may take after a signal: launchers kill after 30
AVERAGE = "average."  # begins the names of Polyak averages in a checkpoint's state
Tensors = dict[str, Tensor]
"""By name: `encoder.norm.weight` of a model, `encoder.norm.weight/exp_avg` of an optimizer."""


def publish(target: Path, write: Callable[[Path], object], **facts: Any) -> None:
    """Let `write` fill a hidden folder and make it `target` by one rename; nothing is left of a failed attempt.

    `facts` go into its manifest. Raises Refusal(DISK) where the disk does not take it.
    """
    draft = target.with_name(f".{target.name}.tmp")
    step = facts.get("step", 0)
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write(draft)
        readers = draft.stat().st_mode & 0o666  # safetensors gives its files to their owner alone
        for path in draft.iterdir():
            path.chmod(readers)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _flushed(path)} for path in sorted(draft.iterdir())
        }
        libraries = {name: version(name) for name in LIBRARIES}
        content = {"version": VERSION, **facts, "libraries": libraries, "files": files}
        write_bytes(draft / MANIFEST, _sealed(content).encode())
        fault_injection.point("save.written", step)
        if target.exists():
            shutil.rmtree(target)
        os.rename(draft, target)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        why = f"{error.strerror}: {error.filename or draft}" if isinstance(error, OSError) else str(error)
        cure = "mend the disk or free some of it, and start again"
        raise Refusal(DISK, f"{target}: could not be written ({why}); {cure}") from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _flushed(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def _sealed(content: dict[str, Any]) -> str:
    """A manifest's text: what it says, and the digest of that."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1)


def manifest(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says; ValueError where it is not as it was written, Refusal where it is another version.

    Any version seals its manifest in the same way: so damage is told from what is newer than this code.
    """
    with (folder / MANIFEST).open("rb") as file:
        text = file.read(MOST + 1)
    content = json.loads(text)
    if _sealed({name: value for name, value in content.items() if name != "digest"}).encode() != text:
        raise ValueError(f"{MANIFEST} differs from its digest")
    if content["version"] != VERSION:
        found = f"{folder}: {MANIFEST} has version {content['version']}, this code reads version {VERSION}"
        raise Refusal(INTEGRITY, f"{found}: go on with the code that wrote it, or name another run")
    return content


def flaw(folder: Path) -> str | None:
    """What is wrong with a published folder, or None: every file of its manifest is there, unchanged, and no other.

    Nothing but plain files is opened. Raises Refusal(INTEGRITY) for a manifest of another version.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder of its own"
    there = {path.name: path.lstat() for path in folder.iterdir()}
    odd = sorted(name for name, state in there.items() if not stat.S_ISREG(state.st_mode))
    if odd:
        return f"not a plain file: {', '.join(odd)}"
    try:
        files = manifest(folder)["files"]
        for name, entry in files.items():
            if name not in there:
                return f"{name} is missing"
            if there[name].st_size != entry["bytes"] or sha256(folder / name) != entry["sha256"]:
                return f"{name} differs from its digest"
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"  # another OSError may pass: it ends this start and condemns nothing
    extra = there.keys() - {MANIFEST, *files}
    return f"unexpected {', '.join(sorted(extra))}" if extra else None


def steps(parent: Path) -> list[Path]:
    """The published checkpoints, oldest first."""
    return sorted(parent.glob("step-" + "[0-9]" * 8))


def step_of(folder: Path) -> int:
    """The step of a checkpoint, or of what was put aside, by its name."""
    return int(folder.name[5:13])


def newest(parent: Path) -> Path | None:
    """The newest checkpoint that verifies; bad ones are renamed to `.corrupt-TIME`, and None means there never was one.

    Raises Refusal(INTEGRITY) where there are some and none verifies: a run never starts again in silence.
    """
    bad = [f"{folder.name} (put aside before)" for folder in sorted(parent.glob("step-*.corrupt-*"))]
    for folder in reversed(steps(parent)):
        why = flaw(folder)
        if why is None:
            return folder
        aside = folder.with_name(f"{folder.name}.corrupt-{datetime.now():%Y%m%dT%H%M%S%f}")
        folder.rename(aside)
        bad.append(f"{aside.name} ({why})")
        print(f"checkpoint {folder} is damaged, put aside as {aside.name}: {why}", flush=True)
    if bad:
        cure = "bring one back, or begin anew with fresh=true"
        raise Refusal(INTEGRITY, f"{parent}: no checkpoint verifies: {', '.join(bad)}; {cure}")
    return None


def tidy(parent: Path, keep: int, spare: int | None = None) -> None:
    """Remove what a killed process left: drafts, what it was deleting, one checkpoint too many; mend the hint."""
    sweep(parent)
    for draft in parent.glob(".step-*.tmp"):
        draft.unlink() if draft.is_symlink() else shutil.rmtree(draft, ignore_errors=True)
    prune(parent, keep, spare)
    for last in steps(parent)[-1:]:
        _hint(last)


def _hint(folder: Path) -> None:
    """Say in `latest`, for people and scripts, which checkpoint is the newest; nothing of ours believes it."""
    try:
        write_bytes(folder.parent / "latest", f"{folder.name}\n".encode())
    except OSError as error:
        print(f"{folder.parent / 'latest'} could not be written: {error.strerror}", flush=True)


def prune(parent: Path, keep: int, spare: int | None = None) -> None:
    """Delete the oldest checkpoints but `keep`, after a newer one is published; what resists stays for next time.

    That of the step `spare`, the best one, is not among those that count.
    """
    old = [folder for folder in steps(parent)[:-keep] if step_of(folder) != spare]
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
        raise Refusal(DISK, f"{text}; free some and start again; {_kept(parent)}")


def _kept(parent: Path) -> str:
    last = steps(parent)[-1:]
    return f"the last checkpoint is {last[0].name}" if last else "there is no checkpoint yet"


def save(
    parent: Path,
    step: int,
    keep: int,
    model: Tensors,
    optimizer: Tensors,
    state: dict[str, Any],
    world: int = 1,
    spare: int | None = None,
) -> Path:
    """Publish `step-NNNNNNNN` with the weights, the optimizer's state, tensors and values of `state`; then prune.

    The checkpoint of the step `spare` is left.

    Raises Refusal(DISK) where the disk does not take it; what was there before stays.
    """
    began = time.monotonic()
    target = parent / f"step-{step:08d}"
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in state.items() if name not in tensors}
    size = sum(value.nbytes for content in (model, optimizer, tensors) for value in content.values())

    def write(folder: Path) -> None:
        for name, content in (("model", model), ("optimizer", optimizer), ("state", tensors)):
            save_file({key: value.contiguous() for key, value in content.items()}, folder / f"{name}.safetensors")
            fault_injection.point("save.mid", step) if name == "model" else None
        (folder / "state.json").write_text(json.dumps(values, indent=1))

    try:
        parent.mkdir(parents=True, exist_ok=True)
        check_space(parent, size)
        publish(target, write, step=step, world=world)
        fault_injection.point("save.published", step)
    except (OSError, Refusal) as error:
        why = str(error) if isinstance(error, Refusal) else f"{target}: {error.strerror}: {error.filename}"
        there = _kept(parent)
        raise Refusal(DISK, why if why.endswith(there) else f"{why}; {there}") from error
    _hint(target)
    prune(parent, keep, spare)
    fault_injection.point("save.pruned", step)
    _judge_speed(target, size, time.monotonic() - began)
    return target


def _judge_speed(target: Path, size: int, seconds: float) -> None:
    if seconds > SLOW and size / seconds < SLOW_RATE:
        late = " A signal 30 s before a kill would come too late." if seconds > BUDGET else ""
        print(f"slow disk: {target} took {seconds:.1f} s, {size / seconds / 1e6:.2f} MB/s.{late}", flush=True)


def load(folder: Path) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """A checkpoint's weights, optimizer state, and `state`; tensors on the CPU. Raises Refusal(INTEGRITY)."""
    optimizer, tensors = (_tensors(folder / f"{name}.safetensors") for name in ("optimizer", "state"))
    return weights(folder), optimizer, _values(folder / "state.json") | tensors


def weights(folder: Path) -> Tensors:
    """A checkpoint's weights alone, on the CPU."""
    return _tensors(folder / "model.safetensors")


def trained(folder: Path) -> Tensors:
    """What a checkpoint's training gave: the average of the weights where it kept one, else the weights."""
    state = _tensors(folder / "state.safetensors")
    means = {name.removeprefix(AVERAGE): value for name, value in state.items() if name.startswith(AVERAGE)}
    return means or weights(folder)


def _values(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(MOST + 1))
        return {**values}
    except (ValueError, TypeError, RecursionError) as error:
        raise Refusal(INTEGRITY, f"{path}: not a file of values: {type(error).__name__}: {error}") from error


def _tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise Refusal(INTEGRITY, f"{path}: not a file of tensors: {error}") from error


def on_main(accelerator: "Accelerator", tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
    """The tensors, on the main process's CPU; the others take part and keep none."""
    kept = accelerator.is_main_process
    return {name: value.cpu() for name, value in tensors if kept}


@dataclass
class State:
    """What a checkpoint says beside weights and moments, or what a run begins with."""

    window: Window
    owed: bool = False
    bad_samples: Sequence[int] = (0, 0)  # of the epoch, of the run
    left_out: LeftOut = NOTHING
    losses: Sequence[float] = ()
    skipped: Sequence[int] = ()
    average: Tensors = field(default_factory=dict)


def resume(
    run: Run, accelerator: "Accelerator", keep: int, model: Model, data: str, best: str | None = None
) -> tuple[Tensors, State]:
    """Put the newest checkpoint's weights in place, and its step into the run; returns moments, and all else it says.

    Where there is none they are empty, and the step is 0. Where one process cannot read it, all raise the same Refusal.
    """

    def choose() -> tuple[Path | None, bool]:
        folder = newest(run.checkpoints)
        step = step_of(folder) if folder else 0
        rewind(run.folder, step)
        row = best_row(run.folder, best)
        tidy(run.checkpoints, keep, row["step"] if row else None)
        return folder, row_of(run.folder, step) is not None

    folder, told = from_main(accelerator, choose)
    fault_injection.point("resume.chosen")
    if folder is None:
        run.step = 0
        return {}, State(Window())
    weights, moments, state = together(accelerator, lambda: load(folder))
    if state["data"] != data:
        text = f"run={run.folder}: was started on other data than data.train holds now"
        raise Refusal(MISMATCH, text, shared=True)
    model.load_state_dict(weights)
    run.step = state["step"]
    fault_injection.point("resume.loaded", run.step)
    owed = state["owed"] and not told
    sums = {name.removeprefix("window."): value for name, value in state.items() if name.startswith("window.")}
    paid = state["owed"] and not owed
    main = accelerator.is_main_process  # of sums over all, one process keeps them
    mine = {} if paid else {name: value if main else torch.zeros_like(value) for name, value in sums.items()}
    window = Window({name: value.to(accelerator.device) for name, value in mine.items()})
    left_out = LeftOut(tuple(state["left_out"]), state["rollbacks"])
    average = {name: value for name, value in state.items() if name.startswith(AVERAGE)}
    return moments, State(window, owed, state["bad_samples"], left_out, state["losses"], state["skipped"], average)
