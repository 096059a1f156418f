"""What the launcher left in the environment: how many processes, which device, which engine."""

import json
import os
from typing import Any, Literal

import torch

from ssl_vit.cost import Engine

Precision = Literal["auto", "fp32", "bf16"]


def world() -> int:
    """How many processes the launcher started, known before Accelerate is."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_gpu() -> bool:
    """Whether this training runs on GPUs."""
    return torch.cuda.is_available() and not flag("ACCELERATE_USE_CPU")


def uses_bf16(precision: Precision) -> bool:
    """Whether a model's forward runs under bf16 autocast: `auto` is bf16 on a GPU, fp32 on the CPU."""
    return precision == "bf16" or (precision == "auto" and on_gpu())


def flag(name: str) -> bool:
    """Whether a variable says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def choose(engine: Engine, zero: dict[str, Any] | None = None) -> None:
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
