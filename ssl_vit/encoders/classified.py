"""A linear classifier on an encoder, as a run keeps it."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssl_vit.encoders.weights import AnyEncoder, fill, read
from ssl_vit.exits import DATA, Refusal

BETWEEN = ("pre_logits", "fc_norm", "attn_pool", "head.norm", "head.mlp")
"""Beginnings of the names of what others have between an encoder's read-out and its last layer."""


@dataclass(frozen=True)
class Classifier:
    """A linear layer on the encoder's read-out, the names of its classes, and the crop it was judged on."""

    weight: Tensor  # [classes, D]
    bias: Tensor
    names: list[str]
    crop: float = 0.875  # side of the central crop, of the image's short side

    @property
    def count(self) -> int:
        """How many classes there are."""
        return len(self.names)

    @property
    def numbered(self) -> bool:
        """Whether nobody named the classes."""
        return self.names == [str(number) for number in range(self.count)]

    def is_for(self, names: list[str]) -> bool:
        """Whether these are its classes, as far as is known."""
        return names == self.names or (self.numbered and len(names) == self.count)

    def fill(self, layer: torch.nn.Linear, names: list[str], source: str) -> None:
        """Put the weights into a layer for classes of these names; raises Refusal(DATA) where they are others."""
        if not self.is_for(names):
            first = next((pair for pair in zip(names, self.names, strict=False) if pair[0] != pair[1]), ("", ""))
            text = f"{len(self.names)} classes there, {len(names)} here; the first that differ: {first[1]}, {first[0]}"
            raise Refusal(DATA, f"{source}: its classifier is for other classes ({text}); leave head.keep out")
        layer.load_state_dict({"weight": self.weight, "bias": self.bias})


def read_classifier(source: str) -> tuple[AnyEncoder, Classifier]:
    """A source's encoder, in eval mode, and the linear classifier on it; raises Refusal(DATA) where it has none."""
    config, weights = read(source, classifier=True)
    if "head.weight" not in weights or "head.bias" not in weights:
        raise Refusal(DATA, f"{source}: has no classifier (head.weight, head.bias); tools/finetune.py makes one")
    between = sorted({name.split(".")[0] for name in weights if name.startswith(BETWEEN)})
    if between:
        raise Refusal(
            DATA, f"{source}: its classifier is not linear on what the encoder gives: {between[0]} comes between"
        )
    sick = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if sick:
        raise Refusal(DATA, f"{source}: {sick[0]} has numbers that are not finite")
    encoder = config.build()
    fill(encoder, config, weights, source)
    folder = Path(source) / "classifier" if (Path(source) / "classifier").is_dir() else Path(source)
    names, crop = [str(number) for number in range(len(weights["head.weight"]))], 0.875
    try:
        said = json.loads(((folder if folder.is_dir() else folder.parent) / "config.json").read_text())
        given = said.get("pretrained_cfg", {})
        names = [str(name) for name in said.get("label_names") or given.get("label_names") or names]
        crop = float(given.get("crop_pct", crop))
    except FileNotFoundError:
        pass
    except (ValueError, AttributeError, TypeError) as error:
        raise Refusal(DATA, f"{source}: its config.json cannot be read ({error})") from error
    if len(names) != len(weights["head.weight"]):
        raise Refusal(DATA, f"{source}: {len(names)} label_names for {len(weights['head.weight'])} classes")
    return encoder.eval(), Classifier(weights["head.weight"], weights["head.bias"], names, crop)
