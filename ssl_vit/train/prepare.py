"""Prepare a model for the device: precision, attention kernel, compiled blocks."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Model
from ssl_vit.runtime import Precision, uses_bf16

if TYPE_CHECKING:
    from accelerate import Accelerator

Attention = Literal["auto", "flash", "efficient", "cudnn", "math"]
IMAGES = 128  # the batch at which cuDNN's NaN was reported


def set_attention_kernel(attention: Attention) -> None:
    """Have torch use this kernel and no other; auto leaves it the choice among all but cuDNN's."""
    for name, enable in {
        "flash": torch.backends.cuda.enable_flash_sdp,
        "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
        "math": torch.backends.cuda.enable_math_sdp,
        "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    }.items():
        enable(name == attention or (attention == "auto" and name != "cudnn"))


def check_gradients(
    attention: Attention,
    shape: tuple[int, int, int],
    device: torch.device,
    half: bool,
    images: int = IMAGES,
    num_queries: int | None = None,
) -> None:
    """Raise ExitError(USAGE) where a kernel cannot do heads, tokens and head width, or its gradients are not finite.

    `num_queries` tokens have queries (none: all), as in the last block.
    """
    heads, tokens, width = shape
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if half else torch.float32

    def random_tensor(tokens: int) -> Tensor:
        size = min(IMAGES, images), tokens, heads, width
        return torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2).requires_grad_()

    q, k, v = random_tensor(num_queries or tokens), random_tensor(tokens), random_tensor(tokens)
    try:
        gradients = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), (q, k, v))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        text = f"attention={attention} cannot compute {tokens} tokens of {heads} heads of {width} here"
        raise ExitError(
            ExitCode.USAGE, f"{text} ({str(error).splitlines()[0]}); take attention=auto", shared=True
        ) from error
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        text = f"attention={attention}: gradients of {tokens} tokens of {heads} heads of {width} are not finite"
        raise ExitError(ExitCode.USAGE, f"{text}; take flash, efficient or math", shared=True)


def prepare_model(
    model: Model, accelerator: "Accelerator", precision: Precision, compiled: bool | None, checkpointing: bool
) -> None:
    """Make a model ready; `compiled` None is yes on a GPU, but not under ZeRO-3."""
    device = accelerator.device.type
    model.encoder.activation_checkpointing = checkpointing
    fsdp_plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp_plugin is not None:  # what is gathered as one
        blocks = list(model.encoder.blocks) or [model.encoder]
        fsdp_plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})
    can_compile = device == "cuda" and not shards_parameters(accelerator) and has_compiler()
    if can_compile if compiled is None else compiled:
        compile_blocks(model)
    if precision == "bf16_residual":
        if not hasattr(model.encoder, "residual"):
            text = f"precision=bf16_residual: the blocks of {model.encoder.config.title} are not ours; take bf16"
            raise ExitError(ExitCode.USAGE, text, shared=True)
        model.encoder.residual = torch.bfloat16
    if uses_bf16(precision):
        model.forward = torch.autocast(device, dtype=torch.bfloat16)(model.forward)


@contextmanager
def in_fp32(model: Model) -> Iterator[None]:
    """A model that `prepare_model` has computing in bf16, in fp32 for as long as this lasts."""
    bf16_forward, residual = model.__dict__.pop("forward"), getattr(model.encoder, "residual", None)
    if residual is not None:
        model.encoder.residual = None
    try:
        yield
    finally:
        model.forward = bf16_forward
        if residual is not None:
            model.encoder.residual = residual


def pin_attention(attention: Attention, model: Model, device: torch.device, half: bool, images: int) -> None:
    """Pin the kernel; on a GPU see that its gradients are finite at a ViT's length, and at that of its last block.

    There only corrupted tokens ask. Raises ExitError(USAGE).
    """
    set_attention_kernel(attention if device.type == "cuda" else "auto")  # of others a CPU has none
    shape = model.encoder.attention_shape
    if device.type == "cuda" and shape is not None:
        for num_queries in {None, model.head.query_count}:
            check_gradients(attention, shape, device, half, images, num_queries)


def shards_parameters(accelerator: "Accelerator") -> bool:
    """Whether ZeRO-3 gathers parameters by hooks inside the blocks, which break compiled graphs (pytorch#115484)."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def has_compiler() -> bool:
    """Whether there is a C compiler, which Triton asks for when a kernel first runs."""
    available = any(map(shutil.which, ("cc", "gcc", "clang")))
    if not available:
        print("no C compiler: training without torch.compile, which is slower", flush=True)
    return available


def compile_blocks(model: Model) -> None:
    """Compile the encoder's blocks in place, before they are wrapped, and what comes before them as one."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each block at DDP's bucket edges
    if hasattr(model.encoder, "embed"):
        model.encoder.embed = MethodType(torch.compile(type(model.encoder).embed), model.encoder)  # a copy's is its own
    for block in getattr(model.encoder, "blocks", ()):
        block.compile()
