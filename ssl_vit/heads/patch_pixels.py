"""The paper's third target: L2 regression of the full patch (B.1.2); or of the patch normalized by itself (MAE)."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_vit.heads.masked_prediction import MaskedPrediction, MaskedPredictionHead
from ssl_vit.model import Encoder, Sums

EPSILON = 1e-6  # added to a patch's variance, of pixels from -1 to 1


class PatchPixels(MaskedPrediction):
    """Predict the pixels of corrupted patches."""

    kind: Literal["patch_pixels"] = "patch_pixels"
    normalize: bool = Field(default=False, description="each patch less its mean, by its deviation (MAE)")

    def build(self, encoder: Encoder, classes: int) -> MaskedPredictionHead:
        """The head for an encoder; the data's classes play no part. ValueError where no patch could be corrupted."""
        del classes
        self.check_encoder(encoder)
        return MaskedPredictionHead(self, encoder, PatchPixelsTarget(encoder, self.normalize))


class PatchPixelsTarget(nn.Module):
    """As many outputs as a patch has numbers, 768 of 16 x 16 x 3; channel by channel."""

    def __init__(self, encoder: Encoder, normalize: bool):
        super().__init__()
        self.patch, self.normalize, self.outputs = encoder.stride, normalize, encoder.channels * encoder.stride**2

    def targets(self, encoder: Encoder, image: Tensor) -> Tensor:
        """Pixels as the encoder sees them, [B, N, C P^2]."""
        pixels = self._patchify(encoder.normalize(image))
        if not self.normalize:
            return pixels
        mean, deviation = _mean_std(pixels)
        return (pixels - mean) / deviation

    def loss(self, predictions: Tensor, target: Tensor) -> Tensor:
        """Squared error, the mean over patches and their numbers."""
        return (predictions - target).square().flatten(1).mean(1)

    def sums(self, predictions: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """The mean and the mean square of the targets, for their variance."""
        del predictions
        values = target.flatten(1)
        return {"sum": (values.mean(1) * valid).sum(), "square": (values.square().mean(1) * valid).sum()}

    def neighbor_sums(self, neighbor_target: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """The squared error of the neighbors' mean color, and over how many images."""
        return {"copied": (self.loss(neighbor_target, target) * valid).sum(), "compared": valid.sum()}

    def predicted(self, predictions: Tensor) -> Tensor:
        """The predictions themselves."""
        return predictions

    def report(self, sums: Sums, weight: float) -> dict[str, float]:
        """The loss, and beside it what it costs to guess one gray for all pixels, or the neighbors' mean color."""
        mean = float(sums["sum"]) / weight
        return {
            "loss": float(sums["loss"]) / weight,
            "variance": float(sums["square"]) / weight - mean**2,
            "neighbor_loss": float(sums["copied"] / sums["compared"].clamp(min=1)),
        }

    def render(self, encoder: Encoder, image: Tensor, target: Tensor) -> Tensor:
        """The pixels themselves; of normalized ones with the true patch's mean and deviation, as MAE shows them."""
        if self.normalize:
            mean, deviation = _mean_std(self._patchify(encoder.normalize(image)))
            target = target * deviation + mean
        mean, deviation = (
            stat.view(-1, 1).expand(image.shape[1], self.patch**2).flatten() for stat in (encoder.mean, encoder.std)
        )
        return 255 * (target * deviation + mean).transpose(1, 2)

    def _patchify(self, pixels: Tensor) -> Tensor:
        return F.unfold(pixels, self.patch, stride=self.patch).transpose(1, 2)


def _mean_std(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch."""
    variance = patches.var(dim=2, keepdim=True, unbiased=False)
    return patches.mean(2, keepdim=True), (variance + EPSILON).sqrt()
