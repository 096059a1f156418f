"""Checks before the first step: is everybody there, and is everybody the same? What is not is named, with its rank."""

import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from ssl_vit import config
from ssl_vit.distributed import Distributed, raise_first
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.files import sha256
from ssl_vit.runtime import on_gpu, world_size

PACKAGE = Path(__file__).parent.parent
LIBRARIES = ("torch", "accelerate", "deepspeed", "numpy")
VISIBILITY_TIMEOUT = 10.0  # seconds in which a shared file system shows a new file to other machines


@dataclass(frozen=True)
class ProcessInfo:
    """What must be the same on every process; only plain values, which any version can read."""

    host: str
    recipe: str
    code: dict[str, str]
    libraries: dict[str, str]
    gpu: str

    @classmethod
    def of_this_process(cls, recipe: config.Config) -> "ProcessInfo":
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


def wait_for_rendezvous(timeout: float) -> None:
    """Before processes are joined: ExitError where the master's port is taken or not reached in `timeout` seconds.

    Under torchrun and accelerate launch the launchers have met already, and hold the port.
    """
    if world_size() == 1:
        return
    rank = os.environ.get("RANK", "?")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ExitError(
            ExitCode.USAGE,
            f"WORLD_SIZE={world_size()} but {', '.join(missing)} not set: use accelerate launch, or set them",
        )
    if not os.environ["MASTER_PORT"].isdecimal():
        raise ExitError(ExitCode.USAGE, f"MASTER_PORT={os.environ['MASTER_PORT']}: it must be a free port's number")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launcher_holds = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == "0" and not launcher_holds:
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            hint = "set another MASTER_PORT on all machines"
            raise ExitError(
                ExitCode.USAGE,
                f"rank 0: port {port} of this machine cannot be had ({os.strerror(error.errno or 0)}): {hint}",
            ) from error
        return
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                text = f"rank {rank} on {socket.gethostname()}: no answer from the master at {host}:{port} ({error})"
                hint = "is rank 0 running there, the address right, the port open?"
                raise ExitError(ExitCode.USAGE, f"{text} in {timeout:.0f} s: {hint}") from error
            time.sleep(0.2)


def check_processes_match(processes: Distributed, recipe: config.Config) -> None:
    """Raise the same ExitError on all processes where code, libraries, recipe or GPU differ among them."""
    raise_first(compare_processes(processes.all_gather(vars(ProcessInfo.of_this_process(recipe)))))


def compare_processes(infos: list[dict[str, Any]]) -> list[ExitError | None]:
    """What is wrong with each process, measured by the first."""
    return [_find_mismatch(rank, infos[0], info) for rank, info in enumerate(infos)]


def _find_mismatch(rank: int, first: dict[str, Any], info: dict[str, Any]) -> ExitError | None:
    location = f"rank {rank} on {info.get('host')}"
    if first["code"] != info.get("code"):
        files = sorted(
            name for name in {*first["code"], *info["code"]} if first["code"].get(name) != info["code"].get(name)
        )
        text = f"{location} runs other code than rank 0 on {first['host']}: ssl_vit/{files[0]} differs"
        return ExitError(ExitCode.MISMATCH, f"{text} ({len(files)} in all): install the same version on all machines")
    for name, expected in first["libraries"].items():
        if info["libraries"][name] != expected:
            text = f"{location} has {name} {info['libraries'][name]}, rank 0 on {first['host']} has {expected}"
            return ExitError(ExitCode.MISMATCH, f"{text}: install the same on all machines")
    if first["recipe"] != info["recipe"]:
        trees = (yaml.load(text, yaml.BaseLoader) for text in (first["recipe"], info["recipe"]))
        changed = "; ".join(config.diff(*trees))
        return ExitError(
            ExitCode.MISMATCH, f"{location} was given another recipe than rank 0: {changed}: give all the same command"
        )
    if first["gpu"] != info["gpu"]:
        text = f"{location} has {info['gpu']}, rank 0 on {first['host']} has {first['gpu']}"
        return ExitError(ExitCode.USAGE, f"{text}: the slowest would set the pace; start on machines that are alike")
    return None


def check_shared_folder(processes: Distributed, folder: Path) -> None:
    """Raise the same ExitError on all processes where one does not see what the main process writes into a folder."""
    if processes.world == 1:
        return

    def create_token() -> str:
        name = f".shared-{secrets.token_hex(8)}"
        (folder / name).touch()
        return name

    token = folder / processes.run_on_main(create_token)
    deadline = time.monotonic() + VISIBILITY_TIMEOUT
    while not (visible := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
        os.listdir(folder if folder.is_dir() else ".")  # has network file systems look again
    location = f"rank {processes.rank} on {socket.gethostname()}"
    text = (
        f"{location} does not see the run folder {folder} of rank 0: name one on a file system that all machines share"
    )
    try:
        raise_first(processes.all_gather(None if visible else (ExitCode.CANNOT_CREATE, text)))
    finally:
        if processes.is_main:
            token.unlink()


def on_each_machine(processes: Distributed, check: Callable[[], None]) -> None:
    """Run a check once a machine, but not on the main process's, which has done it; all raise the first ExitError."""
    runs_check = processes.local_rank == 0 and not processes.is_main
    processes.run_on_all(check if runs_check else lambda: None)
