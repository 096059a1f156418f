"""What a model costs before it is trained: a multiply-accumulate is 2 FLOPs, a backward pass twice the forward pass.

Parameters, gradients, optimizer state and what travels are fp32 under every engine, 4 bytes a number: bf16 comes from
autocast inside the forward pass alone. docs/scaling.md says how each formula was compared with the real thing.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ssl_vit.encoders import Encoder
from ssl_vit.encoders.axial import Axial
from ssl_vit.encoders.vit import Transformer
from ssl_vit.estimate.activations import fake_device, record_saved_tensors
from ssl_vit.model import count_parameters
from ssl_vit.runtime import Engine
from ssl_vit.train import launch

Function = TypeVar("Function")
IMAGES = 1009


def cached(function: Function) -> Function:
    """A function of encoders' configs that computes each answer once; frozen, they can be looked up."""
    return cache(function)  # type: ignore


@cached
def skeleton(config: Encoder) -> Any:
    """An encoder without content, to be counted."""
    with torch.device("meta"):
        encoder = config.build()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # which takes no single value to train on
    return encoder


def encoder_macs(config: Encoder) -> int:
    """Multiply-accumulates an image, forward, without head: of a ViT N 3P^2 D + L (4 T D^2 + 2 T^2 D + 2 T D M).

    An Axial-ViT has two such blocks for one, in which N (H + W) pairs of patches meet instead of 2 T^2; of any other
    encoder torch counts them.
    """
    if not isinstance(config, Transformer) or config.positions == "relative" or getattr(config, "stem", "") == "r50":
        return counted_macs(config)
    width, depth, _, mlp = config.dims
    (rows, columns), patches = config.grid, config.grid[0] * config.grid[1]
    tokens = config.prefix + patches
    embed = patches * config.channels * config.patch**2 * width
    per_block = 4 * tokens * width**2 + 2 * tokens * width * mlp
    if isinstance(config, Axial):
        return embed + depth * (2 * per_block + 2 * patches * (rows + columns) * width)
    return embed + depth * (per_block + 2 * tokens**2 * width)


@cached
def counted_macs(config: Encoder) -> int:
    """Multiply-accumulates an image as torch counts them, without computing anything; all taps of a convolution."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder = skeleton(config)  # before anything is counted: some are tried while they are built
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(torch.empty(1, config.channels, *config.image_hw, dtype=torch.uint8))
    return counter.get_total_flops() // 2


@cached
def padding_macs(config: Encoder) -> int:
    """Of these, those of convolutions' taps that lie outside of the image, which the paper's numbers leave out."""
    encoder, macs = skeleton(config), [0]

    def count(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        inside_macs = math.prod(map(_taps_inside, inputs[0].shape[2:], output.shape[2:], conv.kernel_size, conv.stride))
        taps = math.prod(output.shape[2:]) * math.prod(conv.kernel_size)
        macs[0] += (taps - inside_macs) * conv.in_channels * conv.out_channels // conv.groups

    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(count) for module in convolutions]
    with torch.device("meta"), torch.no_grad():
        encoder(torch.empty(1, config.channels, *config.image_hw, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    return macs[0]


def _taps_inside(size: int, out_size: int, kernel: int, stride: int) -> int:
    """Along one side: taps of all outputs that meet the image; which end has an odd row of padding does not matter."""
    padding = max(0, (out_size - 1) * stride + kernel - size) // 2
    starts = (i * stride - padding for i in range(out_size))
    return sum(min(size, start + kernel) - max(0, start) for start in starts)


def exaflops(macs: float, images: float) -> float:
    """Of training on so many images, 10^18: what the paper's Table 6 lists."""
    return 6 * macs * images / 1e18


def training_flops(macs: int) -> int:
    """FLOPs of a training step for that many multiply-accumulates forward."""
    return 6 * macs


def needless_flops(config: Encoder) -> int:
    """Of these an image: the gradient for pixels, which nobody asks for, of an encoder that cuts patches from them."""
    if not isinstance(config, Transformer) or getattr(config, "stem", "") == "r50":
        return 0
    rows, columns = config.grid
    return 2 * rows * columns * config.channels * config.patch**2 * config.dims[0]


def image_flops(config: Encoder, head_macs: int) -> int:
    """FLOPs of training on an image: 105.4e9 of ViT-B/16 with the mean-color head."""
    return training_flops(encoder_macs(config) + head_macs) - needless_flops(config)


@cached
def parameters_per_block(config: Encoder) -> tuple[int, ...]:
    """The parameters of each block, which is what engines gather and what activation checkpointing computes again."""
    encoder = skeleton(config)
    return tuple(map(count_parameters, encoder.blocks)) or (count_parameters(encoder),)


def block_parameters(config: Encoder) -> int:
    """Parameters of the largest block; of a ViT's 4D^2 + 2DM + M + 9D."""
    return max(parameters_per_block(config))


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that an image leaves in a forward pass for the backward pass."""

    ends: int  # outside of the blocks
    blocks: tuple[int, ...]  # of each block
    inputs: tuple[int, ...]  # what each block was given
    largest: int  # tensor of a block


def activation_bytes(config: Encoder, bf16: bool, checkpointing: bool) -> int:
    """Most bytes an image that activations take in a step: of the encoder, eager; compiled blocks may keep less.

    All blocks'; or with `checkpointing` each block's input, and the largest block whole while it is computed again. On
    the way back gradients come in: of what a block was given, and of its largest tensor. What a head keeps of its own
    is left out: of the mean-color head logits and gathered tokens, 0.7 MB or 1 % for B.
    """
    saved = activation_parts(config, bf16)
    per_block, inputs = saved.blocks or (0,), saved.inputs or (0,)
    largest = per_block.index(max(per_block))
    in_blocks = sum(inputs) - inputs[largest] + per_block[largest] if checkpointing else sum(per_block)
    return in_blocks + saved.ends + max(inputs) + saved.largest


@cached
def activation_parts(config: Encoder, bf16: bool) -> ActivationBytes:
    """What torch would keep on a GPU with fused attention; found on tensors without content, so on any machine.

    Of a prime number of images: what it divides is theirs, and the rest, as bf16 copies of weights, is there once.
    """
    with torch.device("meta"):
        encoder = config.build()  # its own, which gets content
    image = IMAGES, config.channels, *config.image_hw
    with fake_device("cuda", bf16):
        encoder.to_empty(device="cuda")
        # a head's edit keeps the patches for its backward pass, as a sine does
        edit = torch.sin if encoder.maskable else None
        saved = record_saved_tensors(
            encoder, list(encoder.blocks), lambda: encoder(torch.empty(image, dtype=torch.uint8), edit=edit)
        )
    per_image = [(block, size // IMAGES) for block, size in saved.storages if size % IMAGES == 0]
    sizes = [sum(size for block, size in per_image if block == number) for number in range(-1, len(encoder.blocks))]
    largest = max((size for block, size in per_image if block >= 0), default=0)
    return ActivationBytes(sizes[0], tuple(sizes[1:]), tuple(size // IMAGES for size in saved.inputs), largest)


def state_bytes(model: nn.Module, state: tuple[str, ...]) -> dict[str, int]:
    """Bytes of what a process holds in a step beside activations, by part; `state` names the optimizer's tensors.

    Buffers, as of batch norms, are counted among the weights; Adam's count of steps is one number for each tensor.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in learned)
    return {
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "gradients": gradients,
        "optimizer": sum(4 * len(learned) if key == "step" else gradients for key in state),
    }


def step_memory_bytes(
    engine: Engine, parameters: int, block: int, moments: int, world: int, accumulates: bool, copies: int, images: int
) -> tuple[int, int]:
    """Bytes of a GPU: of the model between steps, and in all at the step's peak.

    `moments` are the optimizer's numbers a parameter (AdamW 2, SGD with momentum 1), `copies` the bytes of bf16 copies
    of the weights, which autocast keeps from the forward to the backward pass (2 a parameter, 0 in fp32), `images` the
    bytes of activations. The peak is the larger of two: where the forward pass ends, and where the backward pass does,
    when activations are gone and gradients are whole. With whole = 4 x parameters and part = whole / world:

    - ddp: parameters, gradients (views of the buckets, which stay) and moments, all whole. Accumulating, gradients
      grow outside the buckets first: whole once more. One process has no buckets: its gradients come and go.
    - zero1: parameters whole; an fp32 master copy (`single_partition_of_fp32_groups`, a clone although parameters are
      fp32) and the moments in parts. Gradients whole until the step; a bucket to reduce them in, and its flat copy.
    - zero2: as zero1, with gradients in parts, twice at the step: as they came and flat.
    - zero3: parameters, master copy (DeepSpeed compares a device with its name, so does not see that it could share
      them), gradients and moments in parts, a bucket; in a step the gathered parameters, which are not given back
      before the backward pass where that is nearer than ZERO_KEPT numbers, and those fetched ahead.
    - fsdp2: all in parts; in a step two gathered blocks, and their gradients before and after they are flattened.
      Accumulating, gradients stay whole until the step. What is outside the blocks is left out here.
    """
    whole, part = 4 * parameters, -(-4 * parameters // world)
    bucket, flattened = 4 * launch.ZERO_BUCKET, 4 * min(launch.ZERO_BUCKET, parameters)
    gathered = 4 * min(launch.ZERO_MAX_REUSE, parameters)
    accumulated = whole if accumulates else 0
    match engine:
        case "ddp":
            buckets = whole if world > 1 else 0
            persistent = whole + moments * whole + buckets
            forward, backward = accumulated, accumulated if buckets else whole
        case "zero1":
            persistent = whole + (1 + moments) * part
            forward, backward = accumulated + bucket, whole + bucket + flattened
        case "zero2":
            persistent, grown = whole + (1 + moments) * part, part if accumulates else 0
            forward, backward = grown + bucket, max(2 * part, grown + part + bucket + flattened)
        case "zero3":
            persistent = (3 + moments) * part + bucket
            forward, backward = gathered, max(part, gathered + 4 * min(launch.ZERO_PREFETCH, parameters))
        case "fsdp2":
            persistent = (1 + moments) * part
            forward, backward = accumulated + 8 * block, max(part, accumulated) + 16 * block
    return persistent, persistent + max(forward + copies + images, backward)


def sent_bytes(engine: Engine, parameters: int, world: int, micro_batches: int) -> int:
    """Bytes that a GPU sends in a step of so many micro batches, over rings.

    To gather or to reduce-scatter S bytes a GPU sends (W - 1) / W S, to all-reduce them twice that. Here S is 4 bytes
    a parameter; so many times it is sent, with A micro batches:

    - ddp: one all-reduce, with the last micro batch: 2.
    - zero1: one all-reduce (DeepSpeed all-reduces its buckets where it could reduce-scatter) and one gather: 3.
    - zero2: an all-reduce with every micro batch, one gather: 2 A + 1.
    - zero3: with every micro batch a gather, a second one of what was given back before the backward pass, and a
      reduce-scatter: 2 A to 3 A.
    - fsdp2: with every micro batch two gathers, and one reduce-scatter: 2 A + 1.
    """
    regathered = (parameters - min(launch.ZERO_MAX_REUSE, parameters)) / parameters
    times = {
        "ddp": 2.0,
        "zero1": 3.0,
        "zero2": 2.0 * micro_batches + 1,
        "zero3": (2 + regathered) * micro_batches,
        "fsdp2": 2.0 * micro_batches + 1,
    }
    return round(times[engine] * 4 * parameters * (world - 1) / world)
