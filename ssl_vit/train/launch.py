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

from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.runtime import Precision, env_flag, launcher_argv, on_gpu, uses_bf16, world_size
from ssl_vit.train import logger
from ssl_vit.train.logger import TrackerName
from ssl_vit.train.prepare import set_attention_kernel

if TYPE_CHECKING:
    from accelerate import Accelerator

# in numbers of 4 bytes: our reduce_bucket_size (DeepSpeed's 500 M are 2 GB and a flat copy of what is in them); of
# DeepSpeed 0.19.8 stage3_prefetch_bucket_size and half of stage3_max_reuse_distance, because a parameter's way to the
# backward pass and back is twice what stands behind it
ZERO_BUCKET, ZERO_PREFETCH, ZERO_MAX_REUSE = 50_000_000, 50_000_000, 500_000_000

UNSET_VALUES = {None, "", "none", "no", "auto", "1", "1.0"}  # launchers export these whether or not they were given
DEEPSPEED_KEYS = {
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("steps_per_print", "wall_clock_breakdown", "comms_logger", "flops_profiler", "prescale_gradients"),
    *("fp16", "bf16", "torch_autocast"),
}
"""What a DeepSpeed config may hold here. DeepSpeed itself passes over a misspelt key without a word."""


@dataclass(frozen=True)
class LaunchSettings:
    """What the recipe says of things that a launch file can say too."""

    batch: int
    micro_batch: int
    accumulate: int
    clip: float | None
    precision: Precision
    activation_checkpointing: bool
    timeout: float  # seconds


def launcher_settings() -> dict[str, str | None]:
    """What accelerate's launcher exported of things that the recipe decides."""
    names = {
        "mixed_precision": "ACCELERATE_MIXED_PRECISION",
        "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
        "dynamo_backend": "ACCELERATE_DYNAMO_BACKEND",
        "fsdp_activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
    }
    return {name: os.environ.get(variable) for name, variable in names.items()}


def check_conflicts(settings: LaunchSettings, launch_values: dict[str, Any]) -> None:
    """Raise ExitError(USAGE) with both values where a launch file's claim differs from the recipe."""
    precision = "bf16" if uses_bf16(settings.precision) else "fp32"
    recipe = {
        "mixed_precision": ("precision", precision),
        "gradient_accumulation_steps": ("batch and micro_batch make", settings.accumulate),
        "gradient_clipping": ("optim.clip", settings.clip),
        "dynamo_backend": ("compile decides: leave it out;", "no"),
        "fsdp_activation_checkpointing": ("activation_checkpointing", settings.activation_checkpointing or None),
        "train_batch_size": ("batch", settings.batch),
        "train_micro_batch_size_per_gpu": ("micro_batch", settings.micro_batch),
    }
    for name, launch_value in launch_values.items():
        text = str(launch_value).lower()
        key, value = recipe[name]
        if launch_value is None or text in UNSET_VALUES or text == "false" or text == str(value).lower():
            continue
        if name == "gradient_clipping" and value is None and _parse_number(text) == 0:
            continue
        if _parse_number(text) is not None and _parse_number(text) == _parse_number(str(value)):
            continue
        recipe_value = "none" if value is None else value
        raise ExitError(
            ExitCode.USAGE,
            f"the launch file says {name}={launch_value}, the recipe {key} {recipe_value}: take it out of the former",
        )


def _parse_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def engine_plugins(settings: LaunchSettings) -> dict[str, Any]:
    """The plugin of the engine that the launcher asked for, filled from the recipe."""
    if env_flag("ACCELERATE_USE_DEEPSPEED"):
        return {"deepspeed_plugin": _deepspeed_plugin(settings)}
    if env_flag("ACCELERATE_USE_FSDP"):
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


def _deepspeed_plugin(settings: LaunchSettings) -> Any:
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
        raise ExitError(ExitCode.USAGE, f"DeepSpeed cannot be used: {str(error).strip().splitlines()[0]}") from error
    config = plugin.deepspeed_config
    unknown = sorted(set(config) - DEEPSPEED_KEYS)
    if unknown:
        matches = difflib.get_close_matches(unknown[0], DEEPSPEED_KEYS, 1)
        hint = f"; did you mean {matches[0]}?" if matches else "; the optimizer and its schedule are the recipe's"
        raise ExitError(ExitCode.USAGE, f"the DeepSpeed config has a key that is not known here: {unknown[0]}{hint}")
    for section in ("fp16", "bf16", "torch_autocast"):
        options = config.pop(section, {})
        if not isinstance(options, dict) or options.get("enabled") not in (None, False, "auto"):
            text = f"the DeepSpeed config enables {section}: precision= decides, take it out of the former"
            raise ExitError(ExitCode.USAGE, text)
    recipe_keys = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    check_conflicts(settings, {name: config.get(name) for name in recipe_keys})
    zero = config["zero_optimization"]
    if zero.get("reduce_bucket_size", "auto") == "auto":
        zero["reduce_bucket_size"] = ZERO_BUCKET
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        details = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *details["loc"])))
        raise ExitError(ExitCode.USAGE, f"the DeepSpeed config: {key}: {details['msg'].lower()}") from error
    if "nvme" in (zero.get(name, {}).get("device") for name in ("offload_optimizer", "offload_param")):
        raise ExitError(ExitCode.USAGE, "offload to nvme is not supported: take device cpu")
    config |= {
        "train_batch_size": settings.batch,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_clipping": settings.clip or 0.0,  # "auto" would become 1.0; 0 is none
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


WATCHDOG_GRACE = 60.0  # seconds that the watchdog has to name who is missing, before the collective itself gives up


def start_accelerator(settings: LaunchSettings, tracker: TrackerName, folder: Path) -> "Accelerator":
    """Accelerate's handle on device and processes; ExitError(USAGE) for set-ups that would train something else."""
    _check_launch_file()
    _check_machine()
    logger.check_tracker(tracker)
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )

    check_conflicts(settings, launcher_settings())
    # of names that torch is about to change, which accelerate and DeepSpeed use at every step
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|accelerate)\.")
    set_attention_kernel("auto")
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=settings.timeout + WATCHDOG_GRACE))
    if "LOCAL_RANK" in os.environ and not on_gpu():
        os.environ.setdefault("ACCELERATE_USE_CPU", "1")  # else accelerate would not see the other processes
        if env_flag("ACCELERATE_USE_CPU"):
            process_group.backend = "gloo"
    plugin_kwargs = engine_plugins(settings)
    accelerator = Accelerator(
        mixed_precision="no",  # the model's forward holds its own autocast: the same mathematics under every engine
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=settings.accumulate, sync_with_dataloader=False
        ),
        log_with=None if tracker == "none" else tracker,
        project_dir=folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            process_group,
        ],
        **plugin_kwargs,
    )
    if world_size() != accelerator.num_processes:
        hint = "set ACCELERATE_USE_CPU=1 for processes without GPU"
        raise ExitError(
            ExitCode.USAGE,
            f"{world_size()} processes were started but accelerate sees {accelerator.num_processes}: {hint}",
        )
    if env_flag("ACCELERATE_USE_FSDP") and not on_gpu() and "LOCAL_RANK" in os.environ:
        allow_fsdp_on_cpu(accelerator, plugin_kwargs["fsdp_plugin"])
    return accelerator


def _check_machine() -> None:
    """Refuse where this machine lacks what the launch needs: GPUs, packages, a compiler."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_gpu() and local_world_size > torch.cuda.device_count():
        text = f"{local_world_size} processes were started on this machine, which has {torch.cuda.device_count()} GPUs"
        raise ExitError(ExitCode.USAGE, f"{text}: give --num_processes as all machines' GPUs together")
    if env_flag("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ExitError(ExitCode.USAGE, "the launch file asks for FSDP 1: set fsdp_config.fsdp_version: 2")
    if not env_flag("ACCELERATE_USE_DEEPSPEED"):
        return
    for package in ("deepspeed", "transformers"):  # accelerate's DeepSpeed plugin imports transformers
        if importlib.util.find_spec(package) is None:
            raise ExitError(ExitCode.USAGE, f"DeepSpeed needs the package {package}: pip install 'ssl_vit[deepspeed]'")
    if not on_gpu():
        if torch.cuda.is_available():
            raise ExitError(
                ExitCode.USAGE, "DeepSpeed takes the GPUs where there are some: CUDA_VISIBLE_DEVICES= hides them"
            )
        os.environ["PATH"] += f":{Path(sys.executable).parent}"  # where pip puts ninja
        for tool in ("g++", "ninja"):
            if shutil.which(tool) is None:
                raise ExitError(
                    ExitCode.USAGE, f"DeepSpeed on the CPU builds an extension: {tool} is missing, install it"
                )


def _check_launch_file() -> None:
    """Refuse keys of a launch file's sections that accelerate passes over without a word, such as `zero_stag`.

    Read from the launcher's command line, where the system shows it (Linux); keys outside sections it refuses itself.
    """
    args = [part for arg in launcher_argv() for part in arg.split("=", 1)]  # --config_file=PATH too
    if "--config_file" not in args[:-1]:
        return
    path = args[args.index("--config_file") + 1]
    from accelerate.commands.launch import launch_command_parser

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError):
        return
    valid_keys = {action.dest for action in launch_command_parser()._actions}
    for section in ("deepspeed_config", "fsdp_config"):
        for key in content.get(section) or {}:
            full_key = key if section != "fsdp_config" or key.startswith("fsdp") else f"fsdp_{key}"
            if full_key not in valid_keys:
                matches = difflib.get_close_matches(full_key, valid_keys, 1)
                hint = f"; did you mean {matches[0]}?" if matches else ""
                raise ExitError(
                    ExitCode.USAGE, f"{path}: {section} has a key that accelerate does not know: {key}{hint}"
                )
