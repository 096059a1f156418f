"""Heads: each owns its targets, its loss and what it reports. The unions are the registry.

A head module has `forward(encoder, batch) -> Output`, `report(sums, weight) -> dict of numbers`, `forward_macs` (its
multiply-accumulates an image) and, where there is something to see, `visualize(encoder, batch) -> uint8 [3, h, w]`, the
corrupted images in its second column; a training sets its `log_metrics` to whether a row of metrics follows a step. Its
config has `build(encoder, classes)` and says whether it `needs_labels`.
"""

from typing import Annotated

from pydantic import Field

from ssl_vit.heads.classifier import Classifier, Transfer
from ssl_vit.heads.clusters import Clusters
from ssl_vit.heads.mean_color import MeanColor, PatchColors
from ssl_vit.heads.patch_pixels import PatchPixels

Head = Annotated[MeanColor | PatchColors | PatchPixels | Clusters | Classifier | Transfer, Field(discriminator="kind")]
