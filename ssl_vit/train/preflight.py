"""Checks before the first step: is everybody there, and is everybody the same? What is not is named, with its rank."""

import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ssl_vit import config
from ssl_vit.distributed import everyone, from_main, refuse_first, together
from ssl_vit.errors import CANNOT_CREATE, MISMATCH, USAGE, Refusal
from ssl_vit.files import sha256
from ssl_vit.runtime import on_gpu, world

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGE = Path(__file__).parent.parent
LIBRARIES = ("torch", "accelerate", "deepspeed", "numpy")
SEEN_WITHIN = 10.0  # seconds in which a shared file system shows a new file to other machines


@dataclass(frozen=True)
class Facts:
    """What must be the same on every process; only plain values, which any version can read."""

    host: str
    recipe: str
    code: dict[str, str]
    libraries: dict[str, str]
    gpu: str

    @classmethod
    def here(cls, recipe: config.Config) -> "Facts":
        """Of this process."""
        code = {path.relative_to(PACKAGE).as_posix(): sha256(path) for path in sorted(PACKAGE.rglob("*.py"))}
        return cls(
            socket.gethostname(), config.dump(recipe), code, {name: _version(name) for name in LIBRARIES}, _gpu()
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _gpu() -> str:
    if not on_gpu():
        return "no GPU"
    device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
    return f"{device.name} of {device.total_memory / 2**30:.0f} GiB"


def meet(patience: float) -> None:
    """Before processes are joined: raise Refusal where the master's port is taken or not reached in `patience` seconds.

    Under torchrun and accelerate launch the launchers have met already, and hold the port.
    """
    if world() == 1:
        return
    rank = os.environ.get("RANK", "?")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise Refusal(
            USAGE, f"WORLD_SIZE={world()} but {', '.join(missing)} not set: use accelerate launch, or set them"
        )
    if not os.environ["MASTER_PORT"].isdecimal():
        raise Refusal(USAGE, f"MASTER_PORT={os.environ['MASTER_PORT']}: it must be a free port's number")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launcher_holds = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == "0" and not launcher_holds:
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            cure = "set another MASTER_PORT on all machines"
            raise Refusal(
                USAGE, f"rank 0: port {port} of this machine cannot be had ({os.strerror(error.errno or 0)}): {cure}"
            ) from error
        return
    end = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                text = f"rank {rank} on {socket.gethostname()}: no answer from the master at {host}:{port} ({error})"
                cure = "is rank 0 running there, the address right, the port open?"
                raise Refusal(USAGE, f"{text} in {patience:.0f} s: {cure}") from error
            time.sleep(0.2)


def check_alike(accelerator: "Accelerator", recipe: config.Config) -> None:
    """Raise the same Refusal on all processes where code, libraries, recipe or GPU differ among them."""
    refuse_first(compare(everyone(accelerator, vars(Facts.here(recipe)))))


def compare(facts: list[dict[str, Any]]) -> list[Refusal | None]:
    """What is wrong with each process, measured by the first."""
    return [_difference(rank, facts[0], other) for rank, other in enumerate(facts)]


def _difference(rank: int, first: dict[str, Any], other: dict[str, Any]) -> Refusal | None:
    where = f"rank {rank} on {other.get('host')}"
    if first["code"] != other.get("code"):
        files = sorted(
            name for name in {*first["code"], *other["code"]} if first["code"].get(name) != other["code"].get(name)
        )
        text = f"{where} runs other code than rank 0 on {first['host']}: ssl_vit/{files[0]} differs"
        return Refusal(MISMATCH, f"{text} ({len(files)} in all): install the same version on all machines")
    for name, mine in first["libraries"].items():
        if other["libraries"][name] != mine:
            text = f"{where} has {name} {other['libraries'][name]}, rank 0 on {first['host']} has {mine}"
            return Refusal(MISMATCH, f"{text}: install the same on all machines")
    if first["recipe"] != other["recipe"]:
        trees = (yaml.load(text, yaml.BaseLoader) for text in (first["recipe"], other["recipe"]))
        changed = "; ".join(config.differences(*trees))
        return Refusal(MISMATCH, f"{where} was given another recipe than rank 0: {changed}: give all the same command")
    if first["gpu"] != other["gpu"]:
        text = f"{where} has {other['gpu']}, rank 0 on {first['host']} has {first['gpu']}"
        return Refusal(USAGE, f"{text}: the slowest would set the pace; start on machines that are alike")
    return None


def check_shared(accelerator: "Accelerator", folder: Path) -> None:
    """Raise the same Refusal on all processes where one does not see what the main process writes into a folder."""
    if accelerator.num_processes == 1:
        return

    def make() -> str:
        name = f".shared-{secrets.token_hex(8)}"
        (folder / name).touch()
        return name

    token = folder / from_main(accelerator, make)
    end = time.monotonic() + SEEN_WITHIN
    while not (seen := token.exists()) and time.monotonic() < end:
        time.sleep(0.1)
        os.listdir(folder if folder.is_dir() else ".")  # has network file systems look again
    where = f"rank {accelerator.process_index} on {socket.gethostname()}"
    text = f"{where} does not see the run folder {folder} of rank 0: name one on a file system that all machines share"
    try:
        refuse_first(everyone(accelerator, None if seen else (CANNOT_CREATE, text)))
    finally:
        if accelerator.is_main_process:
            token.unlink()


def on_each_machine(accelerator: "Accelerator", check: Callable[[], None]) -> None:
    """Run a check once a machine, but not on the main process's, which has done it; all raise the first Refusal."""
    mine = accelerator.is_local_main_process and not accelerator.is_main_process
    together(accelerator, check if mine else lambda: None)
