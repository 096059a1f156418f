"""From a launch file and a recipe to Accelerate's handle.

A launch file says which engine and how many processes; micro batch, accumulation, clipping and precision are the
recipe's. What a launch file says all the same must agree, or is refused with both values.
"""

import difflib
import importlib.util
import os
import shutil
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from ssl_vit.exits import USAGE, Refusal
from ssl_vit.family import launcher_words
from ssl_vit.train import trackers
from ssl_vit.train.attention import pin
from ssl_vit.train.environment import flag, on_gpu, world
from ssl_vit.train.plugins import Asked, agree, allow_fsdp_on_cpu, environment_claims, plugins
from ssl_vit.train.trackers import TrackerName

if TYPE_CHECKING:
    from accelerate import Accelerator

GRACE = 60.0  # seconds that the watchdog has to name who is missing, before the collective itself gives up


def start(asked: Asked, tracker: TrackerName, folder: Path) -> "Accelerator":
    """Accelerate's handle on device and processes; Refusal(USAGE) for set-ups that would train something else."""
    _check_launch_file()
    _check_machine()
    trackers.check(tracker)
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )

    agree(asked, environment_claims())
    # of names that torch is about to change, which accelerate and DeepSpeed use at every step
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|accelerate)\.")
    pin("auto")
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=asked.timeout + GRACE))
    if "LOCAL_RANK" in os.environ and not on_gpu():
        os.environ.setdefault("ACCELERATE_USE_CPU", "1")  # else accelerate would not see the other processes
        if flag("ACCELERATE_USE_CPU"):
            waiting.backend = "gloo"
    filled = plugins(asked)
    accelerator = Accelerator(
        mixed_precision="no",  # the model's forward holds its own autocast: the same mathematics under every engine
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=asked.accumulate, sync_with_dataloader=False),
        log_with=None if tracker == "none" else tracker,
        project_dir=folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            waiting,
        ],
        **filled,
    )
    if world() != accelerator.num_processes:
        cure = "set ACCELERATE_USE_CPU=1 for processes without GPU"
        raise Refusal(
            USAGE, f"{world()} processes were started but accelerate sees {accelerator.num_processes}: {cure}"
        )
    if flag("ACCELERATE_USE_FSDP") and not on_gpu() and "LOCAL_RANK" in os.environ:
        allow_fsdp_on_cpu(accelerator, filled["fsdp_plugin"])
    return accelerator


def _check_machine() -> None:
    """Refuse where this machine lacks what the launch needs: GPUs, packages, a compiler."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_gpu() and here > torch.cuda.device_count():
        text = f"{here} processes were started on this machine, which has {torch.cuda.device_count()} GPUs"
        raise Refusal(USAGE, f"{text}: give --num_processes as all machines' GPUs together")
    if flag("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise Refusal(USAGE, "the launch file asks for FSDP 1: set fsdp_config.fsdp_version: 2")
    if not flag("ACCELERATE_USE_DEEPSPEED"):
        return
    for package in ("deepspeed", "transformers"):  # accelerate's DeepSpeed plugin imports transformers
        if importlib.util.find_spec(package) is None:
            raise Refusal(USAGE, f"DeepSpeed needs the package {package}: pip install 'ssl_vit[deepspeed]'")
    if not on_gpu():
        if torch.cuda.is_available():
            raise Refusal(USAGE, "DeepSpeed takes the GPUs where there are some: CUDA_VISIBLE_DEVICES= hides them")
        os.environ["PATH"] += f":{Path(sys.executable).parent}"  # where pip puts ninja
        for tool in ("g++", "ninja"):
            if shutil.which(tool) is None:
                raise Refusal(USAGE, f"DeepSpeed on the CPU builds an extension: {tool} is missing, install it")


def _check_launch_file() -> None:
    """Refuse keys of a launch file's sections that accelerate passes over without a word, such as `zero_stag`.

    Read from the launcher's command line, where the system shows it (Linux); keys outside sections it refuses itself.
    """
    words = [part for word in launcher_words() for part in word.split("=", 1)]  # --config_file=PATH too
    if "--config_file" not in words[:-1]:
        return
    path = words[words.index("--config_file") + 1]
    from accelerate.commands.launch import launch_command_parser

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError):
        return
    known = {action.dest for action in launch_command_parser()._actions}
    for section in ("deepspeed_config", "fsdp_config"):
        for key in content.get(section) or {}:
            whole = key if section != "fsdp_config" or key.startswith("fsdp") else f"fsdp_{key}"
            if whole not in known:
                near = difflib.get_close_matches(whole, known, 1)
                cure = f"; did you mean {near[0]}?" if near else ""
                raise Refusal(USAGE, f"{path}: {section} has a key that accelerate does not know: {key}{cure}")
