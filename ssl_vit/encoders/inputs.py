"""What every encoder takes: images of a size, normalized on the device with its own mean and deviation."""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_vit.config import Config

Pool = Literal["class", "mean"]
NO_CLASS_TOKEN = "there is no class token to read out; set encoder.pool=mean"


class ImageInput(Config):
    """The input of an encoder, and how its tokens become one vector."""

    image: int | tuple[int, int] = Field(
        default=224, description="input size, pixels (H,W or one side); data.image_size sets it"
    )
    channels: int = Field(default=3, ge=1, description="image channels")
    pool: Pool = Field(default="class", description="read-out: class token, or mean of the patch tokens")
    mean: tuple[float, ...] = Field(
        default=(0.5,), description="subtracted from pixels in [0,1], one value or one a channel"
    )
    std: tuple[float, ...] = Field(default=(0.5,), description="then divided by, one value or one a channel")

    @model_validator(mode="after")
    def _check_mean_std(self) -> "ImageInput":
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} has to be above 0")
        if {len(self.mean), len(self.std)} - {1, self.channels}:
            raise ValueError(f"mean and std take one value, or one for each of the {self.channels} channels")
        return self

    @property
    def title(self) -> str:
        """A short name, as the paper writes it."""
        raise NotImplementedError

    def build(self) -> Any:
        """A freshly initialized encoder (ssl_vit.model.Encoder); raises ValueError where it cannot be built."""
        raise NotImplementedError

    @property
    def image_hw(self) -> tuple[int, int]:
        """Input height and width, pixels."""
        return (self.image, self.image) if isinstance(self.image, int) else self.image


class NormalizedEncoder(nn.Module):
    """Has the mean and the deviation of a config as buffers, which are no part of the weights."""

    config: Any
    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageInput):
        super().__init__()
        self.config = config
        self.channels, self.pool = config.channels, config.pool
        self.register_buffer("mean", torch.tensor(config.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, -1, 1, 1), persistent=False)

    @property
    def attention_shape(self) -> tuple[int, int, int] | None:
        """Heads, tokens and head width of torch's attention kernel in its blocks; None: they do not use it."""
        return None

    def check_size(self, image: Tensor) -> None:
        """Raises ValueError where an image is not of the size that the encoder was built for."""
        if tuple(image.shape[2:]) != self.config.image_hw:
            raise ValueError(f"image is {tuple(image.shape[2:])}, the encoder takes {self.config.image_hw}")

    def normalize(self, image: Tensor) -> Tensor:
        """image uint8 [B, C, H, W] -> pixels float [B, C, H, W]; [-1, 1] with the default mean and std."""
        return (image.float() / 255 - self.mean) / self.std
