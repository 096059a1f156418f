"""Encoders: images in, tokens out. The union is the registry: a new encoder is one file and one name here."""

from ssl_vit.encoders.vit import Vit

Encoder = Vit
