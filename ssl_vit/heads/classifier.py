"""Classification heads: supervised pretraining and transfer (paper 3.1 and B.1.1)."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.encoders.layers import Linear
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Batch, Encoder, Output, masked_mean, pool_features


class Classifier(Config):
    """Classify images while pretraining."""

    needs_labels: ClassVar[bool] = True
    kind: Literal["classifier"] = "classifier"
    hidden: int | None = Field(default=None, ge=1, description="width of the tanh layer (none: the encoder's)")
    loss: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="cross-entropy: softmax, or a sigmoid a class"
    )
    bias: float = Field(default=0.0, description="start of the last bias; -10 in the authors' ImageNet-21k models")

    def build(self, encoder: Encoder, classes: int) -> "ClassificationHead":
        """The head for an encoder and a number of classes."""
        hidden = self.hidden or encoder.width
        last = Linear(hidden, classes)
        layers = nn.Sequential(Linear(encoder.width, hidden), nn.Tanh(), last)
        head = ClassificationHead(layers, self.loss)
        nn.init.constant_(last.bias, self.bias)
        return head


class ClassificationHead(nn.Module):
    """Pooled tokens [B, D] -> logits [B, classes], with the last layer starting at zero (paper B.1.1)."""

    query_count = None
    visualize = None

    def __init__(
        self,
        layers: nn.Sequential,
        loss: Literal["softmax", "sigmoid"],
        smoothing: float = 0.0,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ):
        super().__init__()
        self.layers = layers
        self.loss, self.smoothing, self.mix = loss, smoothing, mix
        self.forward_macs = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))  # an image
        last = layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, encoder: Encoder, batch: Batch, log_metrics: bool = False) -> Output:
        """The loss of each labeled image; an image without label (-1) carries none.

        `mix`, in training only, makes other images and soft targets [B, classes] of images and labels. The sums are
        the same for any `log_metrics`.
        """
        del log_metrics
        label, valid = batch["label"].clamp(min=0), batch["valid"] & (batch["label"] >= 0)
        image, target = (
            self.mix(batch["image"], label) if self.training and self.mix is not None else (batch["image"], label)
        )
        features = pool_features(encoder, image)
        with torch.autocast(features.device.type, enabled=False):  # in bf16 the best two of many classes often tie
            logits = self.layers(features.float())
        if self.loss == "softmax":
            smoothing = self.smoothing if self.training and self.mix is None else 0.0  # a mixed target has its own
            loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        else:
            target = F.one_hot(label, logits.shape[1]).float()
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
        with torch.no_grad():
            # ties count against: a head that still gives every class the same score is right for none; nor is NaN
            label_logits = logits.gather(1, label[:, None])
            rank = (logits >= label_logits).sum(1) - 1
            sums = {
                "loss": loss,
                "top1": (rank < 1) & ~label_logits[:, 0].isnan(),
                "top5": (rank < 5) & ~label_logits[:, 0].isnan(),
            }
            sums = {name: (value * valid).sum() for name, value in sums.items()}
        return Output(masked_mean(valid, loss), sums, valid.sum(), None if self.training else logits)

    def report(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        """Means over the images that were counted."""
        return {name: float(value) / weight for name, value in sums.items()}


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
        mix = MixupCutmix(self, classes) if self.mixup or self.cutmix else None
        return ClassificationHead(nn.Sequential(Linear(encoder.width, classes)), "softmax", self.smoothing, mix)


class MixupCutmix:
    """timm's mixup and CutMix of a process's batch, which has to be even: image i with the i-th from the end."""

    def __init__(self, config: Transfer, classes: int):
        self._options: Any = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix, "num_classes": classes}
        self._options |= {"label_smoothing": config.smoothing}

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """image uint8 [B, C, H, W], label [B] -> float images of the same range, targets [B, classes]."""
        from timm.data.mixup import Mixup

        if len(image) % 2:
            raise ExitError(
                ExitCode.USAGE, f"head.mixup and head.cutmix pair images: {len(image)} in a micro batch is odd"
            )
        numpy_state = np.random.get_state()
        np.random.seed(int(torch.randint(1 << 31, ())))  # of the CPU's generator, which the loop seeds every step
        try:
            return Mixup(**self._options)(image.float(), label)
        finally:
            np.random.set_state(numpy_state)
