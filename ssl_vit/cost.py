"""What a model costs, by formula: a multiply-accumulate is 2 FLOPs, a backward pass costs twice the forward pass.

Parameters, gradients, optimizer state and what travels are fp32 under every engine, 4 bytes a number: bf16 comes from
autocast inside the forward pass alone. docs/scaling.md says how each formula was compared with the real thing.
"""

from typing import Literal

from ssl_vit.encoders.vit import Vit

Engine = Literal["ddp", "zero1", "zero2", "fsdp2", "zero3"]
ENGINES: tuple[Engine, ...] = ("ddp", "zero1", "zero2", "fsdp2", "zero3")  # as to be tried: what is simpler comes first

# in numbers of 4 bytes: our reduce_bucket_size (DeepSpeed's 500 M are 2 GB and a flat copy of what is in them); of
# DeepSpeed 0.19.8 stage3_prefetch_bucket_size and half of stage3_max_reuse_distance, because a parameter's way to the
# backward pass and back is twice what stands behind it
ZERO_BUCKET, ZERO_PREFETCH, ZERO_KEPT = 50_000_000, 50_000_000, 500_000_000


def encoder_macs(config: Vit) -> int:
    """Multiply-accumulates an image, forward, without head: N 3P^2 D + L (4 T D^2 + 2 T^2 D + 2 T D M)."""
    width, depth, _, mlp = config.numbers
    patches = config.grid[0] * config.grid[1]
    tokens = patches + 1
    embed = patches * config.channels * config.patch**2 * width
    return embed + depth * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp)


def training_flops(macs: int) -> int:
    """FLOPs of a training step for that many multiply-accumulates forward."""
    return 6 * macs


def block_parameters(config: Vit) -> int:
    """Parameters of a block: qkv 3D^2 + 3D, projection D^2 + D, MLP 2DM + M + D, two norms 4D."""
    width, _, _, mlp = config.numbers
    return 4 * width**2 + 2 * width * mlp + mlp + 9 * width


def block_bytes(config: Vit, bf16: bool) -> int:
    """Bytes an image that a block's forward pass leaves for its backward pass.

    With T tokens and b bytes a number (2 under bf16 autocast, else 4). The norms keep what they are given, which is
    the residual stream in fp32: 2 x 4 TD, and a mean and a deviation a token: 2 x 8 T. The four linear layers keep what
    they are given: b (TD + TD + TD + TM), where the attention's output is kept once for itself and the projection.
    Attention keeps q, k, v and its logsumexp: 3 b TD + 4 hT; GELU its input: b TM. Dropout adds a mask of T (2D + M).
    """
    width, _, heads, mlp = config.numbers
    tokens = config.grid[0] * config.grid[1] + 1
    number = 2 if bf16 else 4
    masks = 2 * width + mlp if config.dropout else 0
    return tokens * (8 * width + 16 + number * (6 * width + 2 * mlp) + 4 * heads + masks)


def activation_bytes(config: Vit, bf16: bool, checkpointing: bool) -> int:
    """Most bytes an image that activations take in a step: of the encoder, eager; compiled blocks may keep less.

    All blocks'; or with `checkpointing` each block's input, 4 TD, and one block whole while it is computed again.
    Beside them the pixels, the patches that a head's edit keeps and the last block's output; and on the way back the
    gradients of the residual stream, 4 TD, and of the MLP's hidden layer, b TM. What the mean-colour head keeps of its
    own is left out: logits and gathered tokens, 0.7 MB or 1 % for B.
    """
    width, depth, _, mlp = config.numbers
    patches, number = config.grid[0] * config.grid[1], 2 if bf16 else 4
    residual = 4 * (patches + 1) * width
    block = block_bytes(config, bf16)
    blocks = (depth - 1) * residual + block if checkpointing else depth * block
    pixels = number * config.channels * config.image_hw[0] * config.image_hw[1]
    ends = pixels + number * patches * width + residual
    return blocks + ends + residual + number * (patches + 1) * mlp


def memory(
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
    bucket, flattened = 4 * ZERO_BUCKET, 4 * min(ZERO_BUCKET, parameters)
    gathered = 4 * min(ZERO_KEPT, parameters)
    again = whole if accumulates else 0
    match engine:
        case "ddp":
            buckets = whole if world > 1 else 0
            kept = whole + moments * whole + buckets
            forward, backward = again, again if buckets else whole
        case "zero1":
            kept = whole + (1 + moments) * part
            forward, backward = again + bucket, whole + bucket + flattened
        case "zero2":
            kept, grown = whole + (1 + moments) * part, part if accumulates else 0
            forward, backward = grown + bucket, max(2 * part, grown + part + bucket + flattened)
        case "zero3":
            kept = (3 + moments) * part + bucket
            forward, backward = gathered, max(part, gathered + 4 * min(ZERO_PREFETCH, parameters))
        case "fsdp2":
            kept = (1 + moments) * part
            forward, backward = again + 8 * block, max(part, again) + 16 * block
    return kept, kept + max(forward + copies + images, backward)


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
    again = (parameters - min(ZERO_KEPT, parameters)) / parameters
    times = {
        "ddp": 2.0,
        "zero1": 3.0,
        "zero2": 2.0 * micro_batches + 1,
        "zero3": (2 + again) * micro_batches,
        "fsdp2": 2.0 * micro_batches + 1,
    }
    return round(times[engine] * 4 * parameters * (world - 1) / world)
