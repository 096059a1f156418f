"""What a model costs, by formula: a multiply-accumulate is 2 FLOPs, a backward pass costs twice the forward pass."""

from ssl_vit.encoders.vit import Vit


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
