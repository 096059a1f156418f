"""Start the processes of a training: device, engine, and what the launcher has to say about it."""

import difflib
import importlib.util
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from pydantic import ValidationError

from ssl_vit.errors import USAGE, Refusal
from ssl_vit.runtime import Precision, flag, launcher_words, on_gpu, uses_bf16, world
from ssl_vit.train import logger
from ssl_vit.train.logger import TrackerName
from ssl_vit.train.prepare import pin

if TYPE_CHECKING:
    from accelerate import Accelerator

# in numbers of 4 bytes: our reduce_bucket_size (DeepSpeed's 500 M are 2 GB and a flat copy of what is in them); of
# DeepSpeed 0.19.8 stage3_prefetch_bucket_size and half of stage3_max_reuse_distance, because a parameter's way to the
# backward pass and back is twice what stands behind it
ZERO_BUCKET, ZERO_PREFETCH, ZERO_KEPT = 50_000_000, 50_000_000, 500_000_000

NOT_GIVEN = {None, "", "none", "no", "auto", "1", "1.0"}  # launchers export these whether or not they were given
ZERO_KEYS = {
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("steps_per_print", "wall_clock_breakdown", "comms_logger", "flops_profiler", "prescale_gradients"),
    *("fp16", "bf16", "torch_autocast"),
}
"""What a DeepSpeed config may hold here. DeepSpeed itself passes over a misspelt key without a word."""


@dataclass(frozen=True)
class Asked:
    """What the recipe says of things that a launch file can say too."""

    batch: int
    micro_batch: int
    accumulate: int
    clip: float | None
    precision: Precision
    activation_checkpointing: bool
    timeout: float  # seconds


def environment_claims() -> dict[str, str | None]:
    """What accelerate's launcher exported of things that the recipe decides."""
    names = {
        "mixed_precision": "ACCELERATE_MIXED_PRECISION",
        "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
        "dynamo_backend": "ACCELERATE_DYNAMO_BACKEND",
        "fsdp_activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
    }
    return {name: os.environ.get(variable) for name, variable in names.items()}


def agree(asked: Asked, claims: dict[str, Any]) -> None:
    """Raise Refusal(USAGE) with both values where a launch file's claim differs from the recipe."""
    precision = "bf16" if uses_bf16(asked.precision) else "fp32"
    recipe = {
        "mixed_precision": ("precision", precision),
        "gradient_accumulation_steps": ("batch and micro_batch make", asked.accumulate),
        "gradient_clipping": ("optim.clip", asked.clip),
        "dynamo_backend": ("compile decides: leave it out;", "no"),
        "fsdp_activation_checkpointing": ("activation_checkpointing", asked.activation_checkpointing or None),
        "train_batch_size": ("batch", asked.batch),
        "train_micro_batch_size_per_gpu": ("micro_batch", asked.micro_batch),
    }
    for name, claim in claims.items():
        text = str(claim).lower()
        key, value = recipe[name]
        if claim is None or text in NOT_GIVEN or text == "false" or text == str(value).lower():
            continue
        if name == "gradient_clipping" and value is None and _number(text) == 0:
            continue
        if _number(text) is not None and _number(text) == _number(str(value)):
            continue
        said = "none" if value is None else value
        raise Refusal(USAGE, f"the launch file says {name}={claim}, the recipe {key} {said}: take it out of the former")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def plugins(asked: Asked) -> dict[str, Any]:
    """The plugin of the engine that the launcher asked for, filled from the recipe."""
    if flag("ACCELERATE_USE_DEEPSPEED"):
        return {"deepspeed_plugin": _deepspeed(asked)}
    if flag("ACCELERATE_USE_FSDP"):
        from accelerate import FullyShardedDataParallelPlugin
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            activation_checkpointing=False,  # the encoder does it itself, under every engine
            mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        )
        return {"fsdp_plugin": plugin}
    return {}


def _deepspeed(asked: Asked) -> Any:
    if not on_gpu():
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.pop("ACCELERATE_USE_CPU", None)  # accelerate would take it for DDP
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    try:
        import deepspeed  # type: ignore
        from accelerate import DeepSpeedPlugin
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # type: ignore

        deepspeed.utils.logger.setLevel("WARNING")
        plugin = DeepSpeedPlugin()
    except Exception as error:  # its import compiles and probes; a launch file's DeepSpeed config is read here too
        raise Refusal(USAGE, f"DeepSpeed cannot be used: {str(error).strip().splitlines()[0]}") from error
    config = plugin.deepspeed_config
    unknown = sorted(set(config) - ZERO_KEYS)
    if unknown:
        known = difflib.get_close_matches(unknown[0], ZERO_KEYS, 1)
        cure = f"; did you mean {known[0]}?" if known else "; the optimizer and its schedule are the recipe's"
        raise Refusal(USAGE, f"the DeepSpeed config has a key that is not known here: {unknown[0]}{cure}")
    for section in ("fp16", "bf16", "torch_autocast"):
        given = config.pop(section, {})
        if not isinstance(given, dict) or given.get("enabled") not in (None, False, "auto"):
            text = f"the DeepSpeed config enables {section}: precision= decides, take it out of the former"
            raise Refusal(USAGE, text)
    ours = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    agree(asked, {name: config.get(name) for name in ours})
    zero = config["zero_optimization"]
    if zero.get("reduce_bucket_size", "auto") == "auto":
        zero["reduce_bucket_size"] = ZERO_BUCKET
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *wrong["loc"])))
        raise Refusal(USAGE, f"the DeepSpeed config: {key}: {wrong['msg'].lower()}") from error
    if "nvme" in (zero.get(name, {}).get("device") for name in ("offload_optimizer", "offload_param")):
        raise Refusal(USAGE, "offload to nvme is not supported: take device cpu")
    config |= {
        "train_batch_size": asked.batch,
        "train_micro_batch_size_per_gpu": asked.micro_batch,
        "gradient_accumulation_steps": asked.accumulate,
        "gradient_clipping": asked.clip or 0.0,  # "auto" would become 1.0; 0 is none
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW and SGD serve every engine, offloaded too
    }
    return plugin


def allow_fsdp_on_cpu(accelerator: "Accelerator", plugin: Any) -> None:
    """Accelerate gives FSDP to GPUs only; the tests take its own path on CPU processes."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


GRACE = 60.0  # seconds that the watchdog has to name who is missing, before the collective itself gives up


def start(asked: Asked, tracker: TrackerName, folder: Path) -> "Accelerator":
    """Accelerate's handle on device and processes; Refusal(USAGE) for set-ups that would train something else."""
    _check_launch_file()
    _check_machine()
    logger.check(tracker)
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
