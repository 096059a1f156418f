"""Encoders: images in, tokens out. The union is the registry: a new encoder is one file and one name here."""

from typing import Annotated

from pydantic import Field

from ssl_vit.encoders.axial import Axial, AxialResnet
from ssl_vit.encoders.timm_encoder import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit

Encoder = Annotated[Vit | Axial | AxialResnet | Bit | TimmZoo, Field(discriminator="kind")]
