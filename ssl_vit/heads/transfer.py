"""Fine-tuning: the pretraining head is gone, one zero-initialised linear layer takes its place (paper 3.2, B.1.1).

Mixup, CutMix and label smoothing are what practitioners use beside the paper's protocol; the mixing is timm's.
"""

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.encoders.linear import Linear
from ssl_vit.exits import USAGE, Refusal
from ssl_vit.heads.classifier import ClassificationHead
from ssl_vit.model import Encoder


class Transfer(Config):
    """Classify images with a linear layer on a pretrained encoder."""

    needs_labels: ClassVar[bool] = True
    kind: Literal["transfer"] = "transfer"
    keep: bool = Field(default=False, description="start from the classifier of init's source, which has these classes")
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing in training")
    mixup: float = Field(default=0.0, ge=0, description="alpha of mixup (0: none)")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of CutMix (0: none); with both, a batch has either")

    def build(self, encoder: Encoder, classes: int) -> ClassificationHead:
        """The head for an encoder and a number of classes; its first loss is ln(classes) exactly."""
        mix = Mix(self, classes) if self.mixup or self.cutmix else None
        return ClassificationHead(nn.Sequential(Linear(encoder.width, classes)), "softmax", self.smoothing, mix)


class Mix:
    """timm's mixup and CutMix of a process's batch, which has to be even: image i with the i-th from the end."""

    def __init__(self, config: Transfer, classes: int):
        self._options: Any = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix, "num_classes": classes}
        self._options |= {"label_smoothing": config.smoothing}

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """image uint8 [B, C, H, W], label [B] -> float images of the same range, targets [B, classes]."""
        from timm.data.mixup import Mixup

        if len(image) % 2:
            raise Refusal(USAGE, f"head.mixup and head.cutmix pair images: {len(image)} in a micro batch is odd")
        before = np.random.get_state()
        np.random.seed(int(torch.randint(1 << 31, ())))  # of the CPU's generator, which the loop seeds every step
        try:
            return Mixup(**self._options)(image.float(), label)
        finally:
            np.random.set_state(before)
