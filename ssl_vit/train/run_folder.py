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
from ssl_vit.errors import CANNOT_CREATE, DISK, MISMATCH, Refusal, verdict
from ssl_vit.files import sweep, write_bytes
from ssl_vit.runtime import restarted

# keys that may change from start to start: what they steer leaves the weights as they are, or goes on from them
FREE = {
    "log_every",
    "save_every",
    "eval_every",
    "panel_every",
    "keep",
    "tracker",
    "quiet",
    "dry_run",
    "compile",
    "run",
    "world",
}
FREE |= {
    "micro_batch",
    "activation_checkpointing",
    "attention",
    "profile",
    "timeout",
    "data.workers",
    "data.train",
    "data.val",
}
FREE |= {"data.cache", "data.cache_gb", "data.verify", "data.max_bad", "data.timeout"}
FREE |= {"fresh", "allow_change", "on_save_error", "check_every", "verify_step"}
FREE |= {"head.codebook"}  # where it lies: ssl_vit.commands.fit_clusters compares what is in it
FREE_GROUPS = ("device.", "metrics.", "benchmark.", "online.")
# keys that change the training, not what was trained so far: they may change where allow_change names them
SAFE = {"steps", "precision", "spike", "encoder.dropout", "data.crop_area", "data.flip"}
SAFE |= {f"optim.{name}" for name in ("lr", "warmup_steps", "schedule", "drops", "weight_decay", "clip", "betas")}

BEAT = 5.0  # seconds between two signs of life of a run's holder
MADE = ("checkpoints", "metrics.jsonl", "numerics.jsonl", "tensorboard", "encoder", "results.json", "recipe.yaml")
MADE += (
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
MADE += ("codebook.safetensors", "report.*", "predictions.*", ".predictions-*.npz", "per_class.csv", "confusion.csv")
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Run:
    """A run's folder. One process (the main one) holds it at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.step = 0  # done so far, for whoever reports the end
        self.held = False
        self._lock: TextIO | None = None
        self._released = threading.Event()

    def claim(self, recipe: config.Config, fresh: bool = False, allowed: tuple[str, ...] = ()) -> None:
        """Make and lock the folder, and check that the recipe is the one it was started with, or write it.

        `fresh` puts what was made so far aside first; keys of `allowed` may differ. Raises Refusal: CANNOT_CREATE where
        the folder cannot be made or is held, MISMATCH with the keys that differ.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a+")
            self._take(self._lock)
            self.held = True
            self._keep_alive(self._lock)
            (self.folder / "exit.json").unlink(missing_ok=True)
            if fresh and not restarted():
                self._put_aside([task.name for task in getattr(recipe, "tasks", ())])
            self.checkpoints.mkdir(exist_ok=True)
            write_bytes(self.checkpoints / ".probe", b"can be written")
            (self.checkpoints / ".probe").unlink()
            sweep(self.folder)
            for token in self.folder.glob(".shared-*"):
                token.unlink()
            self._compare(recipe, allowed)
        except OSError as error:
            code = DISK if verdict(error).code == DISK else CANNOT_CREATE
            raise Refusal(code, f"run={self.folder}: {error.strerror}; name another folder") from error

    def _take(self, lock: TextIO) -> None:
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
            known = holder.endswith(f" on {socket.gethostname()}") or not holder
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise self._in_use(holder) from error
            known = not holder
        if not known and self._shows_life():
            raise self._in_use(holder)

    def _in_use(self, holder: str) -> Refusal:
        text = f"run={self.folder}: in use by {holder or 'another process'}; wait for it, or name another"
        return Refusal(CANNOT_CREATE, text)

    def _shows_life(self) -> bool:
        """Whether the lock file is touched while we look; opened anew, as network file systems look again only then."""

        def touched() -> int:
            with (self.folder / ".lock").open() as lock:
                return os.fstat(lock.fileno()).st_mtime_ns

        first, end = touched(), time.monotonic() + 2.5 * BEAT
        while time.monotonic() < end:
            time.sleep(BEAT / 5)
            if touched() != first:
                return True
        return False

    def _keep_alive(self, lock: TextIO) -> None:
        os.register_at_fork(after_in_child=lock.close)  # else loader workers would hold it after a kill
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} since {time.strftime('%F %T')} on {socket.gethostname()}\n")
        lock.flush()

        def beat() -> None:
            while not self._released.wait(BEAT):
                with suppress(OSError, ValueError):  # a full disk, or closed between the two
                    os.utime(lock.fileno())

        threading.Thread(target=beat, daemon=True).start()

    def _put_aside(self, tasks: list[str]) -> None:
        made = [path for name in MADE for path in self.folder.glob(name)]
        made += [self.folder / name for name in tasks if (self.folder / name).exists()]
        if made:
            aside = self.folder / f"before-{datetime.now():%Y%m%dT%H%M%S%f}"
            aside.mkdir()
            for path in made:
                path.rename(aside / path.name)
            print(f"fresh=true: what {self.folder} held is in {aside} now; leave fresh out to go on later", flush=True)

    def _compare(self, recipe: config.Config, allowed: tuple[str, ...]) -> None:
        path = self.folder / "recipe.yaml"
        text = config.dump(recipe)
        begun = any(self.checkpoints.glob("step-*")) or (self.folder / "metrics.jsonl").exists()
        if begun:
            try:
                old, new = (yaml.load(t, config.Plain) for t in (path.read_text(), text))
                old.items()
            except (FileNotFoundError, yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
                text = f"{path}: cannot be read, so nobody knows what the run was started with"
                raise Refusal(MISMATCH, f"{text}; bring it back, or name another run") from error
            names = {line: line.split(":")[0] for line in config.differences(old, new)}
            changed = {
                line: name for line, name in names.items() if name not in FREE and not name.startswith(FREE_GROUPS)
            }
            wrong = {line: name for line, name in changed.items() if name not in allowed}
            if wrong:
                safe = ",".join(name for name in wrong.values() if name in SAFE)
                cure = f"give the old values, {f'allow_change={safe}, ' if safe else ''}or name another run"
                raise Refusal(MISMATCH, f"run={self.folder}: was started with other keys ({'; '.join(wrong)}); {cure}")
            for line in changed:
                print(f"allow_change: {line}", flush=True)
        write_bytes(path, (_named() + text).encode())

    def release(self) -> None:
        """Let another process have the folder."""
        self._released.set()
        if self._lock is not None:
            with suppress(OSError):  # of a full disk, where what it was to say is still waiting to be written
                if self.held:
                    self._lock.truncate(0)
            with suppress(OSError):
                self._lock.close()

    def write_exit(self, code: int, reason: str) -> None:
        """Say in exit.json how this start ended, because launchers turn every exit code into 1.

        Only a start that holds the folder writes, and of its processes the one that failed first: the others fail by
        what that did to them.
        """
        path = self.folder / "exit.json"
        if self.held and not path.exists():
            end: dict[str, Any] = {"code": code, "step": self.step, "reason": reason}
            end |= {"rank": int(os.environ.get("RANK", "0")), "time": time.strftime("%FT%T%z")}
            try:
                write_bytes(path, (json.dumps(end, indent=1) + "\n").encode())
            except OSError as error:  # which must not take the place of what it was to tell
                print(f"{path} could not be written: {error.strerror}", flush=True)

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json."""
        write_bytes(self.folder / "results.json", (json.dumps(none_for_nan(results), indent=1) + "\n").encode())


def _named() -> str:
    """A first line for recipe.yaml: which recipe the command line names, for people and tools/runs.py."""
    name = next((word.removeprefix("recipe=") for word in sys.argv[1:] if word.startswith("recipe=")), "")
    return f"# recipe: {' '.join(name.split())}\n" if name else ""


def holder(folder: Path) -> str | None:
    """Who holds a run's folder on this machine, or says so from another one; None where nobody does."""
    path = folder / ".lock"
    if not path.exists():
        return None
    with path.open() as lock:
        who = lock.read().strip()
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return who or "another process"
    return who if who and not who.endswith(f" on {socket.gethostname()}") else None


def none_for_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {name: none_for_nan(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
