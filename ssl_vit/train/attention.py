"""Which kernel computes attention on a GPU: pinned, shown, and refused where its gradients are not finite.

torch would take cuDNN's on Hopper, whose backward pass gives NaN at lengths of ViTs (pytorch#169849, #196678).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.exits import USAGE, Refusal

Attention = Literal["auto", "flash", "efficient", "cudnn", "math"]
IMAGES = 128  # the batch at which cuDNN's NaN was reported


def pin(attention: Attention) -> None:
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
    asking: int | None = None,
) -> None:
    """Raise Refusal(USAGE) where a kernel cannot do heads, tokens and head width, or its gradients are not finite.

    `asking` tokens have queries (none: all), as in the last block.
    """
    heads, tokens, width = shape
    made = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if half else torch.float32

    def draw(tokens: int) -> Tensor:
        size = min(IMAGES, images), tokens, heads, width
        return torch.randn(size, generator=made, device=device, dtype=dtype).transpose(1, 2).requires_grad_()

    q, k, v = draw(asking or tokens), draw(tokens), draw(tokens)
    try:
        gradients = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), (q, k, v))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        text = f"attention={attention} cannot compute {tokens} tokens of {heads} heads of {width} here"
        raise Refusal(USAGE, f"{text} ({str(error).splitlines()[0]}); take attention=auto", shared=True) from error
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        text = f"attention={attention}: gradients of {tokens} tokens of {heads} heads of {width} are not finite"
        raise Refusal(USAGE, f"{text}; take flash, efficient or math", shared=True)
