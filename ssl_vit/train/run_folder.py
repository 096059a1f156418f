"""The run folder: who holds it, what was asked of it, and how the last start ended."""

import errno
import fcntl
import json
import math
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from ssl_vit import config
from ssl_vit.errors import ExitCode, ExitError, to_exit_error
from ssl_vit.files import remove_temp_files, write_bytes
from ssl_vit.runtime import is_restart

# keys that may change from start to start: what they steer leaves the weights as they are, or goes on from them
RESUME_MAY_CHANGE = {
    "log_every",
    "save_every",
    "eval_every",
    "visualize_every",
    "keep",
    "tracker",
    "quiet",
    "dry_run",
    "compile",
    "run",
    "world",
}
RESUME_MAY_CHANGE |= {
    "micro_batch",
    "activation_checkpointing",
    "attention",
    "profile",
    "timeout",
    "data.workers",
    "data.train",
    "data.val",
}
RESUME_MAY_CHANGE |= {"data.cache", "data.cache_gb", "data.verify", "data.max_bad_samples", "data.timeout"}
RESUME_MAY_CHANGE |= {"restart", "allow_recipe_change", "on_save_error", "replica_check_every", "verify_step"}
RESUME_MAY_CHANGE |= {"head.codebook"}  # where it lies: ssl_vit.commands.fit_clusters compares what is in it
RESUME_MAY_CHANGE_GROUPS = ("hardware.", "metrics.", "benchmark.", "online.")
# keys that change the training, not what was trained so far: they may change where allow_recipe_change names them
ALLOW_LISTED = {"steps", "precision", "on_loss_spike", "encoder.dropout", "data.crop_area", "data.flip"}
ALLOW_LISTED |= {
    f"optim.{name}" for name in ("lr", "warmup_steps", "schedule", "drops", "weight_decay", "clip", "betas")
}

HEARTBEAT_SECONDS = 5.0  # seconds between two signs of life of a run's holder
RUN_FILES = ("checkpoints", "metrics.jsonl", "numerics.jsonl", "tensorboard", "encoder", "results.json", "recipe.yaml")
RUN_FILES += (
    "profile",
    "mlruns",
    "mlflow_run",
    "wandb",
    "reconstruction.png",
    "exit.json",
    "bad_samples-*.jsonl",
    "sweep",
    "seed-*",
    "classifier",
    "report",
)
RUN_FILES += (
    "codebook.safetensors",
    "report.*",
    "predictions.*",
    ".predictions-*.npz",
    "per_class.csv",
    "confusion.csv",
)
NO_LOCK_ERRNOS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Run:
    """A run's folder. One process (the main one) holds it at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.step = 0  # done so far, for whoever reports the end
        self.acquired = False
        self._lock: TextIO | None = None
        self._released = threading.Event()

    def acquire(self, recipe: config.Config, restart: bool = False, allowed: tuple[str, ...] = ()) -> None:
        """Make and lock the folder, and check that the recipe is the one it was started with, or write it.

        `restart` puts what was made so far aside first; keys of `allowed` may differ. ExitError: CANNOT_CREATE where
        the folder cannot be made or is held, MISMATCH with the keys that differ.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a+")
            self._lock_file(self._lock)
            self.acquired = True
            self._start_heartbeat(self._lock)
            (self.folder / "exit.json").unlink(missing_ok=True)
            if restart and not is_restart():
                self._archive([task.name for task in getattr(recipe, "tasks", ())])
            self.checkpoints.mkdir(exist_ok=True)
            write_bytes(self.checkpoints / ".probe", b"can be written")
            (self.checkpoints / ".probe").unlink()
            remove_temp_files(self.folder)
            for token in self.folder.glob(".shared-*"):
                token.unlink()
            self._check_recipe(recipe, allowed)
        except OSError as error:
            code = ExitCode.DISK if to_exit_error(error).code == ExitCode.DISK else ExitCode.CANNOT_CREATE
            raise ExitError(code, f"run={self.folder}: {error.strerror}; name another folder") from error

    def _lock_file(self, lock: TextIO) -> None:
        """Have the lock, or refuse with who has it.

        The lock is the system's, which frees it when its holder dies, and tells nothing of other machines on some
        network file systems: there the holder's signs of life count.
        """
        lock.seek(0)
        holder = lock.read().strip()
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.2)  # it may be tools/runs.py, which looks for an instant
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            trusted = holder.endswith(f" on {socket.gethostname()}") or not holder
        except OSError as error:
            if error.errno not in NO_LOCK_ERRNOS:
                raise self._in_use_error(holder) from error
            trusted = not holder
        if not trusted and self._holder_is_alive():
            raise self._in_use_error(holder)

    def _in_use_error(self, holder: str) -> ExitError:
        text = f"run={self.folder}: in use by {holder or 'another process'}; wait for it, or name another"
        return ExitError(ExitCode.CANNOT_CREATE, text)

    def _holder_is_alive(self) -> bool:
        """Whether the lock file is touched while we look; opened anew, as network file systems look again only then."""

        def mtime() -> int:
            with (self.folder / ".lock").open() as lock:
                return os.fstat(lock.fileno()).st_mtime_ns

        initial, deadline = mtime(), time.monotonic() + 2.5 * HEARTBEAT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT_SECONDS / 5)
            if mtime() != initial:
                return True
        return False

    def _start_heartbeat(self, lock: TextIO) -> None:
        os.register_at_fork(after_in_child=lock.close)  # else loader workers would hold it after a kill
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} since {time.strftime('%F %T')} on {socket.gethostname()}\n")
        lock.flush()

        def heartbeat() -> None:
            while not self._released.wait(HEARTBEAT_SECONDS):
                with suppress(OSError, ValueError):  # a full disk, or closed between the two
                    os.utime(lock.fileno())

        threading.Thread(target=heartbeat, daemon=True).start()

    def _archive(self, tasks: list[str]) -> None:
        paths = [path for name in RUN_FILES for path in self.folder.glob(name)]
        paths += [self.folder / name for name in tasks if (self.folder / name).exists()]
        if paths:
            archive = self.folder / f"before-{datetime.now():%Y%m%dT%H%M%S%f}"
            archive.mkdir()
            for path in paths:
                path.rename(archive / path.name)
            print(
                f"restart=true: what {self.folder} held is in {archive} now; leave restart out to go on later",
                flush=True,
            )

    def _check_recipe(self, recipe: config.Config, allowed: tuple[str, ...]) -> None:
        path = self.folder / "recipe.yaml"
        text = config.dump(recipe)
        has_started = any(self.checkpoints.glob("step-*")) or (self.folder / "metrics.jsonl").exists()
        if has_started:
            try:
                old, new = (yaml.load(t, config.TextLoader) for t in (path.read_text(), text))
                old.items()
            except (FileNotFoundError, yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
                text = f"{path}: cannot be read, so nobody knows what the run was started with"
                raise ExitError(ExitCode.MISMATCH, f"{text}; bring it back, or name another run") from error
            names = {line: line.split(":")[0] for line in config.diff(old, new)}
            changed = {
                line: name
                for line, name in names.items()
                if name not in RESUME_MAY_CHANGE and not name.startswith(RESUME_MAY_CHANGE_GROUPS)
            }
            rejected = {line: name for line, name in changed.items() if name not in allowed}
            if rejected:
                allowable = ",".join(name for name in rejected.values() if name in ALLOW_LISTED)
                allow = f"allow_recipe_change={allowable}, " if allowable else ""
                hint = f"give the old values, {allow}or name another run"
                raise ExitError(
                    ExitCode.MISMATCH, f"run={self.folder}: was started with other keys ({'; '.join(rejected)}); {hint}"
                )
            for line in changed:
                print(f"allow_recipe_change: {line}", flush=True)
        write_bytes(path, (_recipe_header() + text).encode())

    def release(self) -> None:
        """Let another process have the folder."""
        self._released.set()
        if self._lock is not None:
            with suppress(OSError):  # of a full disk, where what it was to say is still waiting to be written
                if self.acquired:
                    self._lock.truncate(0)
            with suppress(OSError):
                self._lock.close()

    def write_exit(self, code: int, reason: str) -> None:
        """Say in exit.json how this start ended, because launchers turn every exit code into 1.

        Only a start that holds the folder writes, and of its processes the one that failed first: the others fail by
        what that did to them.
        """
        path = self.folder / "exit.json"
        if self.acquired and not path.exists():
            record: dict[str, Any] = {"code": code, "step": self.step, "reason": reason}
            record |= {"rank": int(os.environ.get("RANK", "0")), "time": time.strftime("%FT%T%z")}
            try:
                write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())
            except OSError as error:  # which must not take the place of what it was to tell
                print(f"{path} could not be written: {error.strerror}", flush=True)

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json."""
        write_bytes(self.folder / "results.json", (json.dumps(none_for_nan(results), indent=1) + "\n").encode())


def _recipe_header() -> str:
    """A first line for recipe.yaml: which recipe the command line names, for people and tools/runs.py."""
    name = next((arg.removeprefix("recipe=") for arg in sys.argv[1:] if arg.startswith("recipe=")), "")
    return f"# recipe: {' '.join(name.split())}\n" if name else ""


def lock_holder(folder: Path) -> str | None:
    """Who holds a run's folder on this machine, or says so from another one; None where nobody does."""
    path = folder / ".lock"
    if not path.exists():
        return None
    with path.open() as lock:
        owner = lock.read().strip()
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return owner or "another process"
    return owner if owner and not owner.endswith(f" on {socket.gethostname()}") else None


def none_for_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {name: none_for_nan(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
