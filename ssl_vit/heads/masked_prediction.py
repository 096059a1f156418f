"""Masked prediction: corrupt patch embeddings, predict a Target of each with one linear layer (paper 4.6 and B.1.2)."""

import math
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.encoders.layers import Linear
from ssl_vit.heads import corruption
from ssl_vit.heads.visualize import image_grid, outline
from ssl_vit.model import Batch, Encoder, Output, Sums, masked_mean


class MaskedPrediction(Config):
    """How patches are corrupted."""

    needs_labels: ClassVar[bool] = False
    ratio: float = Field(default=0.5, gt=0, le=1, description="share of the patch embeddings that is corrupted")
    mix: tuple[float, float, float] = Field(
        default=(0.8, 0.1, 0.1), description="shares of the corrupted: mask embedding, another patch, kept"
    )
    mask_unit: int = Field(
        default=1, ge=1, description="side of the squares of patches that are corrupted as one (SimMIM)"
    )
    mask_blockwise: bool = Field(
        default=False, description="corrupt rectangles of patches instead of single ones (BEiT)"
    )

    @model_validator(mode="after")
    def _check_mix(self) -> "MaskedPrediction":
        if min(self.mix) < 0 or abs(sum(self.mix) - 1) > 1e-6:
            raise ValueError(f"mix {self.mix} does not add up to 1")
        if self.mask_blockwise and self.mask_unit > 1:
            raise ValueError("mask_unit and mask_blockwise are two ways to corrupt neighbors; take one")
        return self

    def counts(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """How many patches of an image are masked, swapped and kept."""
        square = self.mask_unit**2
        masked, swapped, kept = corruption.counts(
            grid[0] * grid[1] // square, self.ratio, self.mix, up=self.mask_unit > 1
        )
        return masked * square, swapped * square, kept * square

    def check_encoder(self, encoder: Encoder) -> None:
        """Raises ValueError where an encoder has no patches to corrupt, or the corruption does not fit them."""
        if not encoder.maskable:
            raise ValueError(
                f"head.kind={self.kind} replaces patch embeddings, and this encoder has none that stand for its tokens:"  # type: ignore[attr-defined]
                " take a ViT, a hybrid or an axial one, or head.kind=classifier"
            )
        rows, columns = encoder.grid
        if rows % self.mask_unit or columns % self.mask_unit:
            raise ValueError(f"head.mask_unit={self.mask_unit} does not divide a grid of {rows} x {columns} patches")
        if sum(self.counts(encoder.grid)) == 0:
            raise ValueError(f"head.ratio={self.ratio} of {rows * columns} patches corrupts none")


class Target(Protocol):
    """What a masked head predicts of each corrupted patch, what a prediction costs, and how a target looks.

    A module, so that its tensors move to the device; it learns nothing.
    """

    outputs: int  # numbers that are predicted per patch

    def targets(self, encoder: Encoder, image: Tensor) -> Tensor:
        """The target of each patch: image uint8 [B, C, H, W] -> [B, N, ...]."""
        ...

    def loss(self, predictions: Tensor, target: Tensor) -> Tensor:
        """predictions [B, K, outputs] and target [B, K, ...] -> the loss per image [B]."""
        ...

    def sums(self, predictions: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """What `report` needs, summed over the images `valid` [B]."""
        ...

    def neighbor_sums(self, neighbor_target: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """What `report` needs of targets [B, K, ...] that were copied from the neighbors."""
        ...

    def report(self, sums: Sums, weight: float) -> dict[str, float]:
        """Metrics of the sums over `weight` images: the loss, and beside it what it costs to guess."""
        ...

    def predicted(self, predictions: Tensor) -> Tensor:
        """The likeliest target [B, K, ...] of predictions [B, K, outputs]."""
        ...

    def render(self, encoder: Encoder, image: Tensor, target: Tensor) -> Tensor:
        """How targets [B, N, ...] look: pixels [B, C P^2, N] from 0 to 255."""
        ...


class MaskedPredictionHead(nn.Module):
    """The learned mask embedding, and one linear layer on the final tokens of the corrupted patches."""

    shapes: Tensor
    target: Any  # an nn.Module that is a Target

    def __init__(self, config: MaskedPrediction, encoder: Encoder, target: Target):
        super().__init__()
        self.config, self.grid, self.patch, self.target = config, encoder.grid, encoder.stride, target
        self.query_count = sum(config.counts(encoder.grid))  # tokens that are read of the encoder's last block
        self.forward_macs = self.query_count * encoder.width * target.outputs  # multiply-accumulates per image
        self.mask_token = nn.Parameter(torch.randn(encoder.width) * 0.02)
        self.linear = Linear(encoder.width, target.outputs)
        nn.init.zeros_(self.linear.weight)  # so that the first loss is ln 512 exactly
        nn.init.zeros_(self.linear.bias)
        shapes = corruption.block_shapes(encoder.grid, self.query_count)
        self.register_buffer("shapes", torch.tensor(shapes), persistent=False)

    def draw(self, seed: Tensor) -> corruption.Corruption:
        """The corruption of each image: seed int64 [B] -> tensors [B, K]."""
        ratio, mix = self.config.ratio, self.config.mix
        if self.config.mask_blockwise:
            return corruption.draw_blocks(seed, self.grid, self.shapes, ratio, mix)
        if self.config.mask_unit > 1:
            return corruption.draw_units(seed, self.grid, self.config.mask_unit, ratio, mix)
        return corruption.draw(seed, self.grid[0] * self.grid[1], ratio, mix)

    def predict(self, encoder: Encoder, batch: Batch) -> tuple[corruption.Corruption, Tensor, Tensor]:
        """The corruption, the target of every patch [B, N, ...] and the predictions [B, K, outputs]."""
        masking = self.draw(batch["seed"])
        tokens = encoder(
            batch["image"],
            edit=lambda patches: masking.apply(patches, self.mask_token),
            select=masking.index + encoder.prefix,
        )
        return masking, self.target.targets(encoder, batch["image"]), self.linear(tokens).float()

    def forward(self, encoder: Encoder, batch: Batch, log_metrics: bool = False) -> Output:
        """The mean loss of every corrupted patch, the swapped and the kept ones included.

        The baseline that copies neighbors is in the sums in eval mode, and in training with `log_metrics`.
        """
        masking, target, predictions = self.predict(encoder, batch)
        target, valid = gather_patches(target, masking.index), batch["valid"]
        loss = self.target.loss(predictions, target)
        with torch.no_grad():
            sums = {"loss": (loss * valid).sum(), **self.target.sums(predictions, target, valid)}
            if log_metrics or not self.training:
                colors = self.neighbor_colors(batch["image"], masking.index)
                neighbor_target = gather_patches(self.targets_of_flat_color(encoder, colors), masking.index)
                sums |= self.target.neighbor_sums(neighbor_target, target, valid)
        return Output(masked_mean(valid, loss), sums, valid.sum())

    def report(self, sums: Sums, weight: float) -> dict[str, float]:
        """The target's metrics."""
        return self.target.report(sums, weight)

    def neighbor_colors(self, image: Tensor, index: Tensor) -> Tensor:
        """The mean color of the visible patches around each corrupted one: uint8 [B, C, rows, columns].

        A baseline that learns nothing (paper.md 2.4). Of the eight around it, those that are not corrupted; where all
        are, as within rectangles, colors go inwards from the border; where nothing is visible it is gray.
        """
        color = F.avg_pool2d(image.float(), self.patch)
        visible = torch.ones_like(color[:, 0]).flatten(1).scatter(1, index, 0.0).view_as(color[:, :1])
        known = torch.cat([color * visible, visible], dim=1)
        for _ in range(max(self.grid) // 2 if self.config.mask_blockwise else self.config.mask_unit):
            neighbors = F.avg_pool2d(known, 3, stride=1, padding=1)
            neighbors = torch.cat(
                [neighbors[:, :-1] / neighbors[:, -1:].clamp(min=0.1), (neighbors[:, -1:] > 0).float()], dim=1
            )
            known = torch.where(known[:, -1:] > 0, known, neighbors)
        count = visible.sum((2, 3), keepdim=True)
        fallback = torch.where(count > 0, (color * visible).sum((2, 3), keepdim=True) / count.clamp(min=1), 127.5)
        return torch.where(known[:, -1:] > 0, known[:, :-1], fallback).round().to(torch.uint8)

    def targets_of_flat_color(self, encoder: Encoder, color: Tensor) -> Tensor:
        """The target [B, N, ...] of patches of one color each: uint8 [B, C, rows, columns]."""
        return self.target.targets(encoder, color.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3))

    @torch.no_grad()
    def visualize(self, encoder: Encoder, batch: Batch) -> Tensor:
        """A picture, one row an image: input, as corrupted, predicted and true targets, error; uint8 [3, h, w].

        Masked patches are gray, swapped ones show the patch they got, framed in red, kept ones are framed in white. The
        error is the mean difference of the channels as a gray; where nothing was predicted it is black.
        """
        image, side = batch["image"], self.patch
        masking, target, predicted = self.predict(encoder, batch)
        predicted_target = target.scatter(
            1, expand_index(masking.index, target), self.target.predicted(predicted).to(target.dtype)
        )
        blocks = F.unfold(image.float(), side, stride=side)  # [B, C P^2, N]
        empty = torch.full(blocks.shape[::2], -1, device=image.device)
        fate = empty.scatter(1, masking.index, masking.fate)[:, None, :]
        source = (
            torch.arange(blocks.shape[2], device=image.device)
            .expand_as(empty)
            .scatter(1, masking.index, masking.source)
        )
        corrupted = blocks.gather(2, source[:, None, :].expand_as(blocks))
        corrupted = torch.where(fate == corruption.MASK, torch.full_like(corrupted, 128), corrupted)
        frame = outline(side, image.device).repeat(image.shape[1])[None, :, None]
        white = torch.full_like(corrupted, 255)
        red = white * (torch.arange(corrupted.shape[1], device=image.device) < side * side)[None, :, None]
        corrupted = torch.where(frame & (fate == corruption.SWAP), red, corrupted)
        corrupted = torch.where(frame & (fate == corruption.KEEP), white, corrupted)

        def fold_patches(blocks: Tensor) -> Tensor:
            return F.fold(blocks.float(), image.shape[2:], side, stride=side).round().clamp(0, 255).to(torch.uint8)

        predicted, true_pixels = (
            self.target.render(encoder, image, targets).float() for targets in (predicted_target, target)
        )
        error = (predicted.clamp(0, 255) - true_pixels).abs().unflatten(1, (-1, side * side)).mean(1, keepdim=True)
        error = error.expand(-1, image.shape[1], -1, -1).flatten(1, 2)
        return image_grid([image, *map(fold_patches, (corrupted, predicted, true_pixels, error))])


class ClassTarget(nn.Module):
    """Targets that are classes, int64 [B, N, cells]: one per patch, or one per cell of it.

    A subclass adds `targets` and `render`.
    """

    def __init__(self, classes: int, cells: int = 1):
        super().__init__()
        self.classes, self.cells, self.outputs = classes, cells, cells * classes

    def loss(self, predictions: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, the mean over patches and cells."""
        logits = predictions.unflatten(2, (self.cells, self.classes)).flatten(0, 2)
        return F.cross_entropy(logits, target.flatten(), reduction="none").view(len(target), -1).mean(1)

    def sums(self, predictions: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """The accuracy per image, and how often each class is a target."""
        is_correct = (self.predicted(predictions) == target).float().flatten(1).mean(1)
        return {"accuracy": (is_correct * valid).sum(), "histogram": self._histogram(target, _expand(valid, target))}

    def neighbor_sums(self, neighbor_target: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """Histograms [classes] of the targets that were compared, and of those that are as their neighbors."""
        counts = _expand(valid, target)
        return {
            "compared": self._histogram(target, counts),
            "copied": self._histogram(target, counts & (neighbor_target == target)),
        }

    def predicted(self, predictions: Tensor) -> Tensor:
        """The class with the largest logit."""
        return predictions.unflatten(2, (self.cells, self.classes)).argmax(3)

    def _histogram(self, target: Tensor, counts: Tensor) -> Tensor:
        """How often each class [classes] is a target that counts."""
        zeros = torch.zeros(self.classes, device=target.device)
        return zeros.scatter_add_(0, target.flatten(), counts.flatten().float())

    def report(self, sums: Sums, weight: float) -> dict[str, float]:
        """Loss and accuracy, and beside them what it costs to guess: uniformly, by the labels' frequencies, by copying.

        `top_label` is the share of the commonest label: near 1 there is nothing to learn.
        """
        label_fractions = sums["histogram"].double() / sums["histogram"].sum()
        compared, matched = (sums[name].double() / sums["compared"].sum() for name in ("compared", "copied"))
        entropy = -(label_fractions * label_fractions.clamp(min=1e-12).log()).sum()
        return {
            "loss": float(sums["loss"]) / weight,
            "accuracy": float(sums["accuracy"]) / weight,
            "unigram_entropy": float(entropy),
            "neighbor_loss": neighbor_baseline_loss(compared, matched),
            "neighbor_accuracy": float(matched.sum()),
            "uniform": math.log(self.classes),
            "top_label": float(label_fractions.max()),
        }


def neighbor_baseline_loss(class_fractions: Tensor, matched: Tensor) -> float:
    """The cross-entropy of who says the neighbors' class with probability p, and else goes by frequency; the best p.

    Of each class [classes] `share` is how often it is, `copied` how often it is and the neighbors say so too.
    """
    p = torch.linspace(0, 0.99, 100, dtype=class_fractions.dtype, device=class_fractions.device)[:, None]
    frequency = class_fractions.clamp(min=1e-12)
    costs = matched * (p + (1 - p) * frequency).log() + (class_fractions - matched) * ((1 - p) * frequency).log()
    return float(-costs.sum(1).max())


def _expand(valid: Tensor, target: Tensor) -> Tensor:
    """valid [B] as a target [B, ...]."""
    return valid.view(-1, *[1] * (target.ndim - 1)).expand_as(target)


def expand_index(index: Tensor, target: Tensor) -> Tensor:
    """index [B, K] as [B, K, ...] for what a target [B, N, ...] holds of a patch."""
    return index.view(*index.shape, *[1] * (target.ndim - 2)).expand(-1, -1, *target.shape[2:])


def gather_patches(target: Tensor, index: Tensor) -> Tensor:
    """target [B, N, ...] of the patches of index [B, K] -> [B, K, ...]."""
    return target.gather(1, expand_index(index, target))
