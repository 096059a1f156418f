"""What is put on a model before an engine wraps it: recomputation, compiled blocks, autocast."""

import shutil
from typing import TYPE_CHECKING

import torch

from ssl_vit.model import Model
from ssl_vit.train.environment import Precision, uses_bf16

if TYPE_CHECKING:
    from accelerate import Accelerator


def outfit(
    model: Model, accelerator: "Accelerator", precision: Precision, compiled: bool | None, checkpointing: bool
) -> None:
    """Make a model ready; `compiled` None is yes on a GPU, but not under ZeRO-3."""
    device = accelerator.device.type
    model.encoder.activation_checkpointing = checkpointing
    sharded = getattr(accelerator.state, "fsdp_plugin", None)
    if sharded is not None:  # what is gathered as one
        blocks = list(model.encoder.blocks) or [model.encoder]
        sharded.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})
    can = device == "cuda" and not cuts_layers(accelerator) and has_compiler()
    if can if compiled is None else compiled:
        compile_blocks(model)
    if precision == "bf16_residual":
        model.encoder.residual = torch.bfloat16
    if uses_bf16(precision):
        model.forward = torch.autocast(device, dtype=torch.bfloat16)(model.forward)


def cuts_layers(accelerator: "Accelerator") -> bool:
    """Whether ZeRO-3 gathers parameters by hooks inside the blocks, which break compiled graphs (pytorch#115484)."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def has_compiler() -> bool:
    """Whether there is a C compiler, which Triton asks for when a kernel first runs."""
    found = any(map(shutil.which, ("cc", "gcc", "clang")))
    if not found:
        print("no C compiler: training without torch.compile, which is slower", flush=True)
    return found


def compile_blocks(model: Model) -> None:
    """Compile the encoder's blocks in place, before they are wrapped, and what comes before them as one."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each block at DDP's bucket edges
    if hasattr(model.encoder, "embed"):
        model.encoder.embed = torch.compile(model.encoder.embed)
    for block in getattr(model.encoder, "blocks", ()):
        block.compile()
