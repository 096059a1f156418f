"""What this process is part of: launcher, machine, device, memory, number format; and how it ends with its parent."""

import ctypes
import json
import os
import resource
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch

Engine = Literal["ddp", "zero1", "zero2", "fsdp2", "zero3"]
ENGINES: tuple[Engine, ...] = ("ddp", "zero1", "zero2", "fsdp2", "zero3")  # as to be tried: what is simpler comes first

PR_SET_PDEATHSIG = 1


def set_parent_death_signal(signum: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends; elsewhere than on Linux nothing happens."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signum))
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signum)


def launcher_argv() -> list[str]:
    """The command line of the process that started this one; empty where the system does not show it."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except (OSError, UnicodeDecodeError):
        return []


def die_with_launcher() -> None:
    """Where a launcher started this process, take its end as SIGTERM: accelerate's and torchrun's leave orphans.

    Without a launcher the parent is a shell, which may well end before the training does.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal(signal.SIGTERM)


def detach_worker_signals() -> None:
    """For a worker: signals to the process group are the parent's to answer, and without it there is no work."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    set_parent_death_signal(signal.SIGKILL)


IMPORT_TIME = time.monotonic()
RESTART_VARIABLES = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
Precision = Literal["auto", "fp32", "bf16", "bf16_residual"]


def uptime() -> float:
    """Seconds since this process began, imports and all."""
    try:
        start_ticks = int(
            Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        )  # ticks since the machine did
    except (OSError, ValueError, IndexError):  # not Linux
        return time.monotonic() - IMPORT_TIME
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def world_size() -> int:
    """How many processes the launcher started, known before Accelerate is."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_restart() -> bool:
    """Whether a launcher or a scheduler repeats a command of its own accord."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in RESTART_VARIABLES)


def on_gpu() -> bool:
    """Whether this training runs on GPUs."""
    return torch.cuda.is_available() and not env_flag("ACCELERATE_USE_CPU")


def uses_bf16(precision: Precision) -> bool:
    """Whether a model's forward runs under bf16 autocast: `auto` is bf16 on a GPU, fp32 on the CPU."""
    return precision in ("bf16", "bf16_residual") or (precision == "auto" and on_gpu())


def env_flag(name: str) -> bool:
    """Whether a variable says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def current_engine() -> Engine:
    """The engine that was asked for by accelerate's launcher."""
    if env_flag("ACCELERATE_USE_DEEPSPEED"):
        stages: dict[str, Engine] = {"1": "zero1", "2": "zero2", "3": "zero3"}
        return stages.get(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", ""), "zero2")
    return "fsdp2" if env_flag("ACCELERATE_USE_FSDP") else "ddp"


def peak_and_total_memory() -> tuple[int, int]:
    """Bytes that this process used at its peak, and those there are: of its GPU, or else of the machine."""
    if on_gpu():
        return torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return peak, total if limit == resource.RLIM_INFINITY else min(total, limit)


def select_engine(engine: Engine, zero: dict[str, Any] | None = None) -> None:
    """Ask for an engine as accelerate's launcher does, by the environment: where one process uses several.

    `zero` goes into the zero_optimization section of DeepSpeed's config.
    """
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        os.environ.pop(name, None)
    if engine == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    elif engine.startswith("zero"):
        config = json.dumps({"zero_optimization": {"stage": int(engine[-1]), **(zero or {})}})
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": config}


def command_line() -> str:
    """The command line of this start."""
    return shlex.join(["python", *sys.argv])
