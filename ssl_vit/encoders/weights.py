"""Where an encoder's weights come from and go to.

The exported folder is `model.safetensors` under timm's names and a `config.json` that both timm
(`timm.create_model("local-dir:FOLDER", pretrained=True)`) and `load_encoder` read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_vit.encoders import positions
from ssl_vit.encoders.vit import SIZES, Vit, VitEncoder
from ssl_vit.exits import DATA, Refusal

ARCHITECTURES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
HIDDEN = ("act_layer", "norm_layer", "block_fn", "mlp_layer", "attn_layer", "embed_layer")
"""timm's arguments by which a model is another one though its tensors' shapes are a plain ViT's."""
NOT_ENCODER = ("head", "pre_logits", "fc_norm", "decoder", "mask_token")  # what others store beside their encoder
Weights = dict[str, Tensor]


def load_encoder(path: str | Path) -> VitEncoder:
    """An encoder in eval mode from a run folder, its encoder/ folder, or a weights file (safetensors, or .pth).

    Raises Refusal(DATA) where there is nothing to load or the weights do not fit.
    """
    config, weights = read(str(path))
    encoder = config.build()
    fill(encoder, config, weights, str(path))
    return encoder.eval()


def read(source: str, classifier: bool = False) -> tuple[Vit, Weights]:
    """The architecture and the weights of a source: a path as in `load_encoder`, or `timm:NAME`.

    Of a run, those of its encoder/ folder, or with `classifier` of its classifier/ folder.
    """
    if source.startswith("timm:"):
        return _read_timm(source.removeprefix("timm:"))
    path = Path(source)
    if path.is_dir():
        places = (path / "classifier", path) if classifier else (path / "encoder", path)
        folder = next((f for f in places if (f / "model.safetensors").is_file()), None)
        if folder is None and classifier:
            several = sorted(path.glob("seed-*/classifier"))
            cure = f"give one of its runs, such as {several[0].parent}" if several else "tools/finetune.py makes one"
            raise Refusal(DATA, f"{path}: no classifier/model.safetensors in it ({cure})")
        if folder is None:
            several = sorted(path.glob("seed-*/encoder"))
            cure = f"give one of its runs, such as {several[0].parent}" if several else "a run exports it when it ends"
            raise Refusal(DATA, f"{path}: no encoder/model.safetensors in it ({cure})")
        path = folder / "model.safetensors"
    if not path.is_file():
        raise Refusal(DATA, f"{path}: no such run, folder or weights file")
    weights = _tensors(path)
    beside = path.with_name("config.json")
    if beside.is_file():
        try:
            content = json.loads(beside.read_text())
            if "ssl_vit" in content:
                return Vit.model_validate(content["ssl_vit"]), weights
            return _as_timm_says(infer(weights, str(path)), content), weights
        except (ValidationError, ValueError, AttributeError) as error:
            raise Refusal(DATA, f"{beside}: not an encoder's config ({' '.join(str(error).split())[:200]})") from error
    return infer(weights, str(path)), weights


def _as_timm_says(config: Vit, content: dict[str, Any]) -> Vit:
    """A config with what timm says in its `config.json` and shapes do not: heads, read-out, mean and std."""
    said: dict[str, Any] = {}
    if "global_pool" in content:
        said["pool"] = "class" if content["global_pool"] == "token" else "mean"
    hidden = [name for name in HIDDEN if name in content.get("model_args", {})]
    if hidden or content.get("global_pool", "token") not in ("token", "avg", ""):
        raise Refusal(DATA, f"{hidden[0] if hidden else 'global_pool'} makes it another model than a plain ViT")
    if "num_heads" in content.get("model_args", {}):
        said["heads"] = content["model_args"]["num_heads"]
    said |= {
        name: content["pretrained_cfg"][name] for name in ("mean", "std") if name in content.get("pretrained_cfg", {})
    }
    return Vit.model_validate(config.model_dump() | said)


def _tensors(path: Path) -> Weights:
    """A file's tensors; a pickle is read with weights_only, and never in any other way."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError) as error:
        raise Refusal(DATA, f"{path}: cannot be read as weights: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # pickle's own errors: not a pickle at all, or what weights_only forbids
        raise Refusal(
            DATA, f"{path}: refused, not a file of tensors and nothing else ({type(error).__name__})"
        ) from error
    for name in ("model", "state_dict"):
        tree = tree.get(name, tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise Refusal(DATA, f"{path}: not a set of named tensors")
    return {name.removeprefix("module."): value for name, value in tree.items()}


def _read_timm(name: str) -> tuple[Vit, Weights]:
    import timm

    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm and its hub client raise many kinds
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Refusal(DATA, f"timm:{name} cannot be had ({text}); without a network give a local file") from error
    tensors = model.state_dict()
    config = infer(tensors, f"timm:{name}")
    heads = getattr(getattr(model.blocks[0], "attn", None), "num_heads", config.numbers[2])  # type: ignore[index]
    said = {"model_args": {"num_heads": heads}, "pretrained_cfg": getattr(model, "pretrained_cfg", {})}
    said |= {"global_pool": model.global_pool} if hasattr(model, "global_pool") else {}
    return _as_timm_says(config, said), tensors


def infer(weights: Weights, source: str) -> Vit:
    """The architecture of a plain ViT from its tensors' shapes; raises Refusal(DATA) where it is not one."""
    try:
        width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        mlp = weights["blocks.0.mlp.fc1.weight"].shape[0]
        tokens = weights["pos_embed"].shape[1] if "pos_embed" in weights else None
    except (KeyError, ValueError) as error:
        raise Refusal(DATA, f"{source}: not a plain ViT under timm's names (no {error})") from error
    heads = next((row[2] for row in SIZES.values() if row[0] == width), max(1, width // 64))
    size = next((name for name, row in SIZES.items() if row[0] == width), "B")
    side = patch * round(((tokens or 2) - 1) ** 0.5)
    numbers = {"size": size, "patch": patch, "image": side, "channels": channels, "width": width, "depth": depth}
    numbers |= {"heads": heads, "mlp": mlp, "positions": "1d" if tokens else "none"}
    try:
        return Vit.model_validate(numbers)
    except ValidationError as error:
        raise Refusal(DATA, f"{source}: {error.errors()[0]['msg']}") from error


def fill(encoder: VitEncoder, config: Vit, weights: Weights, source: str) -> None:
    """Load weights that were made for `config` by name; positions are interpolated to the encoder's grid.

    The source's head is left. Anything else that only one of the two has, or that has another shape, is a Refusal(DATA)
    that lists it: nothing stays at its random start unnoticed, and no part of another architecture is dropped.
    """
    wanted = encoder.state_dict()
    weights = dict(weights)
    if "pos_embed" in weights and encoder.pos_embed is not None:
        table = weights["pos_embed"]
        if table.shape[1] != encoder.prefix + config.grid[0] * config.grid[1]:
            raise Refusal(DATA, f"{source}: {table.shape[1]} positions do not fit its grid of {config.grid} patches")
        weights["pos_embed"] = positions.resize(table, config.grid, encoder.grid, encoder.prefix)
    missing = [name for name in wanted if name not in weights]
    unlike = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    strange = [name for name in weights if name not in wanted and not name.startswith(NOT_ENCODER)]
    if missing or unlike or strange:
        kinds = {"missing": missing, "of another shape": unlike, "that it has no place for": strange}
        text = "; ".join(f"{len(n)} tensors {kind} ({', '.join(n[:3])} ...)" for kind, n in kinds.items() if n)
        raise Refusal(DATA, f"{source}: does not fit the encoder: {text}")
    encoder.load_state_dict({name: weights[name] for name in wanted})


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


def read_classifier(source: str) -> tuple[VitEncoder, Classifier]:
    """A source's encoder, in eval mode, and the linear classifier on it; raises Refusal(DATA) where it has none."""
    config, weights = read(source, classifier=True)
    if "head.weight" not in weights or "head.bias" not in weights:
        raise Refusal(DATA, f"{source}: has no classifier (head.weight, head.bias); tools/finetune.py makes one")
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


def export(encoder: VitEncoder, folder: Path, classifier: Classifier | None = None) -> None:
    """Write `model.safetensors` and `config.json` for timm and for `load_encoder`, and a classifier with it."""
    config = encoder.config
    width, depth, heads, mlp = config.numbers
    height, side = config.image_hw
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {
        "img_size": [height, side],
        "patch_size": config.patch,
        "in_chans": config.channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp / width,
        "global_pool": "token" if config.pool == "class" else "avg",
        "fc_norm": False,  # the final norm stays before pooling, as it was trained
    } | ({} if config.positions == "1d" else {"pos_embed": "none"})
    preparation = {
        "input_size": [config.channels, height, side],
        "mean": list(config.mean * (config.channels // len(config.mean))),
        "std": list(config.std * (config.channels // len(config.std))),
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    classes = len(classifier.names) if classifier else 0
    arguments["num_classes"] = preparation["num_classes"] = classes
    if classifier:
        preparation |= {"crop_pct": classifier.crop, "label_names": classifier.names}
    content = {
        "architecture": f"vit_{ARCHITECTURES[config.size]}_patch{14 if config.size == 'H' else 16}_224",
        "num_classes": classes,
        **({"label_names": classifier.names} if classifier else {}),
        "num_features": width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": preparation,
        "ssl_vit": config.model_dump(mode="json"),
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    if classifier:
        weights |= {"head.weight": classifier.weight.contiguous(), "head.bias": classifier.bias.contiguous()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
