"""Heads: each owns its targets, its loss and what it reports. The unions are the registry.

A head module is a `model.Head`. Its config has `build(encoder, classes)` and says whether it `needs_labels`.
"""

from typing import Annotated

from pydantic import Field

from ssl_vit.heads.classifier import Classifier, Transfer
from ssl_vit.heads.clusters import Clusters
from ssl_vit.heads.mean_color import MeanColor, PatchColors
from ssl_vit.heads.patch_pixels import PatchPixels

Head = Annotated[MeanColor | PatchColors | PatchPixels | Clusters | Classifier | Transfer, Field(discriminator="kind")]
