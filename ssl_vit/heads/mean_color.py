"""Masked patch prediction: the 3-bit mean colour of each corrupted patch (paper 4.6 and B.1.2)."""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.heads import corruption
from ssl_vit.heads.panel import grid, outline
from ssl_vit.model import Batch, Encoder, Output, mean_over


def labels(image: Tensor, patch: int, bits: int = 3) -> Tensor:
    """The class of each patch's mean colour: image uint8 [B, C, H, W] -> int64 [B, N] in raster order.

    Each channel's mean is cut into 2^bits equal bins; with 3 bits of RGB the class is 64 R + 8 G + B, 512 in all.
    Computed in integers, because a float mean falls on the wrong side of an edge now and then.
    """
    b, c, h, w = image.shape
    cells = image.reshape(b, c, h // patch, patch, w // patch, patch)
    total = cells.sum(dim=(3, 5), dtype=torch.int64)  # [B, C, rows, columns], at most 255 P^2
    level = ((total << bits) // (255 * patch * patch)).clamp(max=(1 << bits) - 1)
    label = level[:, 0]
    for channel in range(1, c):
        label = (label << bits) | level[:, channel]
    return label.flatten(1)


def colors(label: Tensor, bits: int = 3) -> Tensor:
    """The RGB in the middle of a class's bins: label int64 [...] -> uint8 [..., 3]."""
    level = torch.stack([label >> (bits * c) & (1 << bits) - 1 for c in (2, 1, 0)], dim=-1)
    return ((level + 0.5) * 255 / (1 << bits)).round().to(torch.uint8)


class MeanColor(Config):
    """Predict the mean colour of corrupted patches."""

    needs_labels: ClassVar[bool] = False
    kind: Literal["mean_color"] = "mean_color"
    ratio: float = Field(default=0.5, gt=0, le=1, description="share of the patch embeddings that is corrupted")
    mix: tuple[float, float, float] = Field(
        default=(0.8, 0.1, 0.1), description="shares of the corrupted: mask embedding, another patch, kept"
    )
    bits: int = Field(default=3, ge=1, le=4, description="bits a channel of the target; 3 makes 512 classes")

    @model_validator(mode="after")
    def _adds_up(self) -> "MeanColor":
        if min(self.mix) < 0 or abs(sum(self.mix) - 1) > 1e-6:
            raise ValueError(f"mix {self.mix} does not add up to 1")
        return self

    def build(self, encoder: Encoder, classes: int) -> "MeanColorHead":
        """The head for an encoder; the data's classes play no part. ValueError where no patch would be corrupted."""
        del classes
        patches = encoder.grid[0] * encoder.grid[1]
        if sum(corruption.counts(patches, self.ratio, self.mix)) == 0:
            raise ValueError(f"head.ratio={self.ratio} of {patches} patches corrupts none")
        return MeanColorHead(self, encoder)


class MeanColorHead(nn.Module):
    """The learned mask embedding, and one linear layer on the final tokens of the corrupted patches."""

    def __init__(self, config: MeanColor, encoder: Encoder):
        super().__init__()
        self.config = config
        self.classes = 1 << (config.bits * encoder.channels)
        corrupted = sum(corruption.counts(encoder.grid[0] * encoder.grid[1], config.ratio, config.mix))
        self.macs = corrupted * encoder.width * self.classes  # multiply-accumulates an image
        self.mask_token = nn.Parameter(torch.randn(encoder.width) * 0.02)
        self.linear = nn.Linear(encoder.width, self.classes)
        nn.init.zeros_(self.linear.weight)  # so that the first loss is ln 512 exactly
        nn.init.zeros_(self.linear.bias)

    def predict(self, encoder: Encoder, batch: Batch) -> tuple[corruption.Corruption, Tensor, Tensor]:
        """The corruption, the labels of its patches [B, K] and the logits [B, K, classes]."""
        target = labels(batch["image"], encoder.stride, self.config.bits)
        plan = corruption.draw(batch["seed"], target.shape[1], self.config.ratio, self.config.mix)
        tokens = encoder(
            batch["image"],
            edit=lambda patches: plan.apply(patches, self.mask_token),
            select=plan.index + encoder.prefix,
        )
        return plan, target.gather(1, plan.index), self.linear(tokens).float()

    def forward(self, encoder: Encoder, batch: Batch) -> Output:
        """Cross-entropy of every corrupted patch, the swapped and the kept ones included."""
        _, target, logits = self.predict(encoder, batch)
        valid = batch["valid"]
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target).mean(1)
        with torch.no_grad():
            right = (logits.argmax(2) == target).float().mean(1)
            weights = valid[:, None].expand_as(target).flatten().float()
            histogram = torch.zeros(self.classes, device=target.device).scatter_add_(0, target.flatten(), weights)
            sums = {"loss": (loss * valid).sum(), "accuracy": (right * valid).sum(), "histogram": histogram}
        return Output(mean_over(valid, loss), sums, valid.sum())

    def report(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        """Loss and accuracy, and beside them what a blind guess costs: uniform, and by the labels' frequencies."""
        share = sums["histogram"].double() / sums["histogram"].sum()
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        return {
            "loss": float(sums["loss"]) / weight,
            "accuracy": float(sums["accuracy"]) / weight,
            "unigram_entropy": float(entropy),
            "uniform": math.log(self.classes),
        }

    @torch.no_grad()
    def panel(self, encoder: Encoder, batch: Batch) -> Tensor:
        """A picture, one row an image: input, input as corrupted, true colours, predicted colours; uint8 [3, h, w].

        Masked patches are grey, swapped ones show the patch they got, framed in red, kept ones are framed in white.
        """
        image, side = batch["image"], encoder.stride
        plan, _, logits = self.predict(encoder, batch)
        truth = labels(image, side, self.config.bits)
        guess = truth.scatter(1, plan.index, logits.argmax(2))
        blocks = F.unfold(image.float(), side, stride=side)  # [B, C P^2, N]
        fate = torch.full_like(truth, -1).scatter(1, plan.index, plan.fate)[:, None, :]
        source = torch.arange(truth.shape[1], device=truth.device).expand_as(truth).scatter(1, plan.index, plan.source)
        seen = blocks.gather(2, source[:, None, :].expand_as(blocks))
        seen = torch.where(fate == corruption.MASK, torch.full_like(seen, 128), seen)
        frame = outline(side, image.device).repeat(image.shape[1])[None, :, None]
        white = torch.full_like(seen, 255)
        red = white * (torch.arange(seen.shape[1], device=image.device) < side * side)[None, :, None]
        seen = torch.where(frame & (fate == corruption.SWAP), red, seen)
        seen = torch.where(frame & (fate == corruption.KEEP), white, seen)
        corrupted = F.fold(seen, image.shape[2:], side, stride=side).to(torch.uint8)
        rows, columns = image.shape[2] // side, image.shape[3] // side

        def mosaic(label: Tensor) -> Tensor:
            tiles = colors(label, self.config.bits).view(-1, rows, columns, 3).permute(0, 3, 1, 2)
            return tiles.repeat_interleave(side, 2).repeat_interleave(side, 3)

        return grid([image, corrupted, mosaic(truth), mosaic(guess)])
