"""The run folder: who holds it, what was asked of it, and how the last start ended."""

import fcntl
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any, TextIO

import yaml

from ssl_vit import config
from ssl_vit.durable import write_bytes
from ssl_vit.exits import CANNOT_CREATE, MISMATCH, Refusal

# keys that may change from start to start: what they steer leaves the weights as they are, or goes on from them
FREE = {"log_every", "save_every", "eval_every", "keep", "tracker", "quiet", "dry_run", "compile", "run", "world"}
FREE |= {"micro_batch", "activation_checkpointing", "timeout", "data.workers", "data.train", "data.val"}
FREE |= {"data.cache", "data.cache_gb", "data.verify", "data.max_bad"}


class Run:
    """A run's folder. One process (the main one) holds it at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.step = 0  # done so far, for whoever reports the end
        self.held = False
        self._lock: TextIO | None = None

    def claim(self, recipe: config.Config) -> None:
        """Make and lock the folder, and check that the recipe is the one it was started with, or write it.

        Raises Refusal: CANNOT_CREATE where it cannot be made or is held, MISMATCH with the keys that differ.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a+")
        except OSError as error:
            raise Refusal(CANNOT_CREATE, f"run={self.folder}: {error.strerror}; name another folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise Refusal(
                CANNOT_CREATE, f"run={self.folder}: in use by {holder}; wait for it, or name another"
            ) from error
        self.held = True
        os.register_at_fork(after_in_child=self._lock.close)  # else loader workers would hold it after a kill
        (self.folder / "exit.json").unlink(missing_ok=True)
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
        self._lock.flush()
        self._compare(recipe)

    def _compare(self, recipe: config.Config) -> None:
        path = self.folder / "recipe.yaml"
        text = config.dump(recipe)
        begun = self.checkpoints.exists() or (self.folder / "metrics.jsonl").exists()
        if begun and path.exists():
            old, new = (yaml.load(t, yaml.BaseLoader) for t in (path.read_text(), text))
            names = {line: line.split(":")[0] for line in config.differences(old, new)}
            changed = [line for line, name in names.items() if name not in FREE and not name.startswith("device.")]
            if changed:
                cure = "give the old values, or name another run"
                raise Refusal(
                    MISMATCH, f"run={self.folder}: was started with other keys ({'; '.join(changed)}); {cure}"
                )
        write_bytes(path, text.encode())

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()

    def write_exit(self, code: int, reason: str) -> None:
        """Say in exit.json how this start ended, because launchers turn every exit code into 1.

        Only a start that holds the folder writes, and of its processes the one that failed first: the others fail by
        what that did to them.
        """
        path = self.folder / "exit.json"
        if self.held and not path.exists():
            end = {"code": code, "step": self.step, "reason": reason, "time": time.strftime("%FT%T%z")}
            write_bytes(path, (json.dumps(end, indent=1) + "\n").encode())

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json."""
        finite = {name: none_for_nan(value) for name, value in results.items()}
        write_bytes(self.folder / "results.json", (json.dumps(finite, indent=1) + "\n").encode())


def none_for_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
