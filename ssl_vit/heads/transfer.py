"""Fine-tuning: the pretraining head is gone, one zero-initialised linear layer takes its place (paper 3.2, B.1.1)."""

from typing import ClassVar, Literal

from torch import nn

from ssl_vit.config import Config
from ssl_vit.heads.classifier import ClassificationHead
from ssl_vit.model import Encoder


class Transfer(Config):
    """Classify images with a linear layer on a pretrained encoder."""

    needs_labels: ClassVar[bool] = True
    kind: Literal["transfer"] = "transfer"

    def build(self, encoder: Encoder, classes: int) -> ClassificationHead:
        """The head for an encoder and a number of classes; its first loss is ln(classes) exactly."""
        return ClassificationHead(nn.Sequential(nn.Linear(encoder.width, classes)), "softmax")
