"""What all masked objectives share: the corruption, the mask embedding, one linear layer on the corrupted patches.

An objective says what its targets are, what a prediction costs and how a target looks (paper 4.6 and B.1.2).
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.encoders.layers import Linear
from ssl_vit.heads import corruption
from ssl_vit.heads.visualize import grid, outline
from ssl_vit.model import Batch, Encoder, Output, mean_over

Sums = dict[str, Tensor]


class Masked(Config):
    """How patches are corrupted."""

    needs_labels: ClassVar[bool] = False
    ratio: float = Field(default=0.5, gt=0, le=1, description="share of the patch embeddings that is corrupted")
    mix: tuple[float, float, float] = Field(
        default=(0.8, 0.1, 0.1), description="shares of the corrupted: mask embedding, another patch, kept"
    )
    unit: int = Field(default=1, ge=1, description="side of the squares of patches that are corrupted as one (SimMIM)")
    blocks: bool = Field(default=False, description="corrupt rectangles of patches instead of single ones (BEiT)")

    @model_validator(mode="after")
    def _adds_up(self) -> "Masked":
        if min(self.mix) < 0 or abs(sum(self.mix) - 1) > 1e-6:
            raise ValueError(f"mix {self.mix} does not add up to 1")
        if self.blocks and self.unit > 1:
            raise ValueError("unit and blocks are two ways to corrupt neighbours; take one")
        return self

    def counts(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """How many patches of an image are masked, swapped and kept."""
        square = self.unit**2
        masked, swapped, kept = corruption.counts(grid[0] * grid[1] // square, self.ratio, self.mix, up=self.unit > 1)
        return masked * square, swapped * square, kept * square

    def check(self, encoder: Encoder) -> None:
        """Raises ValueError where an encoder has no patches to corrupt, or the corruption does not fit them."""
        if not encoder.maskable:
            raise ValueError(
                f"head.kind={self.kind} replaces patch embeddings, and this encoder has none that stand for its tokens:"  # type: ignore[attr-defined]
                " take a ViT, a hybrid or an axial one, or head.kind=classifier"
            )
        rows, columns = encoder.grid
        if rows % self.unit or columns % self.unit:
            raise ValueError(f"head.unit={self.unit} does not divide a grid of {rows} x {columns} patches")
        if sum(self.counts(encoder.grid)) == 0:
            raise ValueError(f"head.ratio={self.ratio} of {rows * columns} patches corrupts none")


class MaskedHead(nn.Module):
    """The learned mask embedding, and one linear layer on the final tokens of the corrupted patches."""

    told = True  # whether a row of metrics follows this step: in training the baseline that copies is only tried then

    shapes: Tensor

    def __init__(self, config: Masked, encoder: Encoder, outputs: int):
        super().__init__()
        self.config, self.grid, self.patch = config, encoder.grid, encoder.stride
        self.macs = sum(config.counts(encoder.grid)) * encoder.width * outputs  # multiply-accumulates an image
        self.mask_token = nn.Parameter(torch.randn(encoder.width) * 0.02)
        self.linear = Linear(encoder.width, outputs)
        nn.init.zeros_(self.linear.weight)  # so that the first loss is ln 512 exactly
        nn.init.zeros_(self.linear.bias)
        shapes = corruption.block_shapes(encoder.grid, sum(config.counts(encoder.grid)))
        self.register_buffer("shapes", torch.tensor(shapes), persistent=False)

    def target(self, encoder: Encoder, image: Tensor) -> Tensor:
        """What each patch asks for: image uint8 [B, C, H, W] -> [B, N, ...]."""
        raise NotImplementedError

    def cost(self, made: Tensor, target: Tensor) -> tuple[Tensor, Callable[[Tensor], Sums]]:
        """made [B, K, outputs] and target [B, K, ...] -> the loss [B], and what is summed over images valid [B]."""
        raise NotImplementedError

    def paint(self, encoder: Encoder, image: Tensor, target: Tensor) -> Tensor:
        """How targets [B, N, ...] look: pixels [B, C P^2, N] from 0 to 255."""
        raise NotImplementedError

    def guess(self, made: Tensor) -> Tensor:
        """The likeliest target [B, K, ...] of made [B, K, outputs]."""
        raise NotImplementedError

    def draw(self, seed: Tensor) -> corruption.Corruption:
        """The corruption of each image: seed int64 [B] -> tensors [B, K]."""
        ratio, mix = self.config.ratio, self.config.mix
        if self.config.blocks:
            return corruption.draw_blocks(seed, self.grid, self.shapes, ratio, mix)
        if self.config.unit > 1:
            return corruption.draw_units(seed, self.grid, self.config.unit, ratio, mix)
        return corruption.draw(seed, self.grid[0] * self.grid[1], ratio, mix)

    def predict(self, encoder: Encoder, batch: Batch) -> tuple[corruption.Corruption, Tensor, Tensor]:
        """The corruption, the target of every patch [B, N, ...] and the outputs [B, K, outputs]."""
        plan = self.draw(batch["seed"])
        tokens = encoder(
            batch["image"],
            edit=lambda patches: plan.apply(patches, self.mask_token),
            select=plan.index + encoder.prefix,
        )
        return plan, self.target(encoder, batch["image"]), self.linear(tokens).float()

    def forward(self, encoder: Encoder, batch: Batch) -> Output:
        """The mean cost of every corrupted patch, the swapped and the kept ones included."""
        plan, target, made = self.predict(encoder, batch)
        target, valid = chosen(target, plan.index), batch["valid"]
        loss, rest = self.cost(made, target)
        with torch.no_grad():
            sums = {"loss": (loss * valid).sum(), **rest(valid)}
            if self.told or not self.training:
                copied = chosen(self.flat(encoder, self.neighbours(batch["image"], plan.index)), plan.index)
                sums |= self.copied(copied, target, valid)
        return Output(mean_over(valid, loss), sums, valid.sum())

    def neighbours(self, image: Tensor, index: Tensor) -> Tensor:
        """The mean colour of the visible patches around each corrupted one: uint8 [B, C, rows, columns].

        A baseline that learns nothing (paper.md 2.4). Of the eight around it, those that are not corrupted; where all
        are, as within rectangles, colours go inwards from the border; where nothing is visible it is grey.
        """
        color = F.avg_pool2d(image.float(), self.patch)
        seen = torch.ones_like(color[:, 0]).flatten(1).scatter(1, index, 0.0).view_as(color[:, :1])
        known = torch.cat([color * seen, seen], dim=1)
        for _ in range(max(self.grid) // 2 if self.config.blocks else self.config.unit):
            around = F.avg_pool2d(known, 3, stride=1, padding=1)
            around = torch.cat([around[:, :-1] / around[:, -1:].clamp(min=0.1), (around[:, -1:] > 0).float()], dim=1)
            known = torch.where(known[:, -1:] > 0, known, around)
        count = seen.sum((2, 3), keepdim=True)
        whole = torch.where(count > 0, (color * seen).sum((2, 3), keepdim=True) / count.clamp(min=1), 127.5)
        return torch.where(known[:, -1:] > 0, known[:, :-1], whole).round().to(torch.uint8)

    def flat(self, encoder: Encoder, color: Tensor) -> Tensor:
        """The target [B, N, ...] of patches of one colour each: uint8 [B, C, rows, columns]."""
        return self.target(encoder, color.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3))

    def copied(self, copied: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """What `report` needs to know of targets [B, K, ...] that were copied from the neighbours."""
        raise NotImplementedError

    @torch.no_grad()
    def panel(self, encoder: Encoder, batch: Batch) -> Tensor:
        """A picture, one row an image: input, as corrupted, predicted and true targets, error; uint8 [3, h, w].

        Masked patches are grey, swapped ones show the patch they got, framed in red, kept ones are framed in white. The
        error is the mean difference of the channels as a grey; where nothing was predicted it is black.
        """
        image, side = batch["image"], self.patch
        plan, target, made = self.predict(encoder, batch)
        guess = target.scatter(1, wide(plan.index, target), self.guess(made).to(target.dtype))
        blocks = F.unfold(image.float(), side, stride=side)  # [B, C P^2, N]
        none = torch.full(blocks.shape[::2], -1, device=image.device)
        fate = none.scatter(1, plan.index, plan.fate)[:, None, :]
        source = torch.arange(blocks.shape[2], device=image.device).expand_as(none).scatter(1, plan.index, plan.source)
        seen = blocks.gather(2, source[:, None, :].expand_as(blocks))
        seen = torch.where(fate == corruption.MASK, torch.full_like(seen, 128), seen)
        frame = outline(side, image.device).repeat(image.shape[1])[None, :, None]
        white = torch.full_like(seen, 255)
        red = white * (torch.arange(seen.shape[1], device=image.device) < side * side)[None, :, None]
        seen = torch.where(frame & (fate == corruption.SWAP), red, seen)
        seen = torch.where(frame & (fate == corruption.KEEP), white, seen)

        def drawn(blocks: Tensor) -> Tensor:
            return F.fold(blocks.float(), image.shape[2:], side, stride=side).round().clamp(0, 255).to(torch.uint8)

        made, true = (self.paint(encoder, image, one).float() for one in (guess, target))
        error = (made.clamp(0, 255) - true).abs().unflatten(1, (-1, side * side)).mean(1, keepdim=True)
        error = error.expand(-1, image.shape[1], -1, -1).flatten(1, 2)
        return grid([image, *map(drawn, (seen, made, true, error))])


class ColorHead(MaskedHead):
    """Targets are classes: one an image patch, or one of each of its cells; [B, N, cells]."""

    def __init__(self, config: Masked, encoder: Encoder, classes: int, cells: int = 1):
        super().__init__(config, encoder, cells * classes)
        self.classes, self.cells = classes, cells

    def cost(self, made: Tensor, target: Tensor) -> tuple[Tensor, Callable[[Tensor], Sums]]:
        """Cross-entropy, the mean over patches and cells."""
        logits, flat = made.unflatten(2, (self.cells, self.classes)), target.flatten()
        loss = F.cross_entropy(logits.flatten(0, 2), flat, reduction="none").view(len(target), -1).mean(1)

        def rest(valid: Tensor) -> Sums:
            right = (logits.argmax(3) == target).float().flatten(1).mean(1)
            counts = valid.view(-1, *[1] * (target.ndim - 1)).expand_as(target)
            return {"accuracy": (right * valid).sum(), "histogram": self.histogram(target, counts)}

        return loss, rest

    def copied(self, copied: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """Histograms [classes] of the targets that were compared, and of those that are as their neighbours."""
        counts = valid.view(-1, *[1] * (target.ndim - 1)).expand_as(target)
        return {
            "compared": self.histogram(target, counts),
            "copied": self.histogram(target, counts & (copied == target)),
        }

    def histogram(self, target: Tensor, counts: Tensor) -> Tensor:
        """How often each class [classes] is a target that counts."""
        none = torch.zeros(self.classes, device=target.device)
        return none.scatter_add_(0, target.flatten(), counts.flatten().float())

    def guess(self, made: Tensor) -> Tensor:
        return made.unflatten(2, (self.cells, self.classes)).argmax(3)

    def report(self, sums: Sums, weight: float) -> dict[str, float]:
        """Loss and accuracy, and beside them what it costs to guess: uniformly, by the labels' frequencies, by copying.

        `top_label` is the share of the commonest label: near 1 there is nothing to learn.
        """
        share = sums["histogram"].double() / sums["histogram"].sum()
        compared, copied = (sums[name].double() / sums["compared"].sum() for name in ("compared", "copied"))
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        return {
            "loss": float(sums["loss"]) / weight,
            "accuracy": float(sums["accuracy"]) / weight,
            "unigram_entropy": float(entropy),
            "neighbour_loss": copying(compared, copied),
            "neighbour_accuracy": float(copied.sum()),
            "uniform": math.log(self.classes),
            "top_label": float(share.max()),
        }


def copying(share: Tensor, copied: Tensor) -> float:
    """The cross-entropy of who says the neighbours' class with probability p, and else goes by frequency; the best p.

    Of each class [classes] `share` is how often it is, `copied` how often it is and the neighbours say so too.
    """
    p = torch.linspace(0, 0.99, 100, dtype=share.dtype, device=share.device)[:, None]
    frequency = share.clamp(min=1e-12)
    costs = copied * (p + (1 - p) * frequency).log() + (share - copied) * ((1 - p) * frequency).log()
    return float(-costs.sum(1).max())


def wide(index: Tensor, target: Tensor) -> Tensor:
    """index [B, K] as [B, K, ...] for what a target [B, N, ...] holds of a patch."""
    return index.view(*index.shape, *[1] * (target.ndim - 2)).expand(-1, -1, *target.shape[2:])


def chosen(target: Tensor, index: Tensor) -> Tensor:
    """target [B, N, ...] of the patches of index [B, K] -> [B, K, ...]."""
    return target.gather(1, wide(index, target))
