"""Accelerate's plugins, filled from the recipe in this one place; launch files that contradict it are refused."""

import difflib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ssl_vit.cost import ZERO_BUCKET
from ssl_vit.exits import USAGE, Refusal
from ssl_vit.train.environment import Precision, flag, on_gpu, uses_bf16

if TYPE_CHECKING:
    from accelerate import Accelerator

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
