"""Weights in: encoders and classifiers from runs, folders, weights files and timm."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ssl_vit.encoders import Encoder, layers
from ssl_vit.encoders.checkpoint_formats import NOT_ENCODER, Weights, infer, read_file
from ssl_vit.encoders.timm_encoder import TimmEncoder, TimmZoo
from ssl_vit.encoders.vit import SIZES, Vit, VitEncoder
from ssl_vit.errors import DATA, Refusal

AnyEncoder = VitEncoder | TimmEncoder
CONFIG: TypeAdapter[Encoder] = TypeAdapter(Encoder)
PLAIN = re.compile(r"(?:vit|deit)_(?:(t)iny|(s)mall|(b)ase|(l)arge|(h)uge)_(?:patch\d+|r50_s\d+)_\d+(?:\..*)?")
"""timm's names of plain ViTs and hybrids with the authors' numbers of heads; of other names timm is asked."""
SHAPES = {"img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio"}
SHAPES |= {"global_pool", "fc_norm", "class_token", "pos_embed", "drop_rate", "drop_path_rate"}
"""timm's arguments that tensors show, or that are read here; others make another model of the same shapes."""
SAME = 1e-5  # of the largest number: how far two programs may be apart that compute the same


def load_encoder(path: str | Path) -> AnyEncoder:
    """An encoder in eval mode from a run folder, its encoder/ folder, or a weights file (safetensors, .npz or .pth).

    Raises Refusal(DATA) where there is nothing to load or the weights do not fit.
    """
    config, weights = read(str(path))
    encoder = config.build()
    fill(encoder, config, weights, str(path))
    return encoder.eval()


def read(source: str, classifier: bool = False) -> tuple[Encoder, Weights]:
    """The architecture and the weights of a source: a path as in `load_encoder`, or `timm:NAME`.

    Of a run, those of its encoder/ folder, or with `classifier` of its classifier/ folder.
    """
    if source.startswith("timm:"):
        return _read_timm(source.removeprefix("timm:"))
    path = Path(source)
    if path.is_dir():
        path = _inside(path, classifier)
    if not path.is_file():
        raise Refusal(DATA, f"{path}: no such run, folder or weights file")
    weights, said = read_file(path)
    beside = path.with_name("config.json")
    if not beside.is_file() or path.suffix == ".npz":
        return infer(weights, str(path), said), weights
    try:
        content = json.loads(beside.read_text())
        if "ssl_vit" in content:
            return CONFIG.validate_python({"kind": "vit"} | content["ssl_vit"]), weights
        if "model_type" in content:
            return infer(weights, str(path), said | _said_by_hugging_face(content, beside)), weights
        name = content.get("architecture")
        if name is None or (PLAIN.fullmatch(name) and not set(content.get("model_args", {})) - SHAPES):
            return infer(weights, str(path), said | _said_by_timm(content, beside)), weights
        return _asked_of_timm(content, weights, beside), weights
    except (ValidationError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise Refusal(DATA, f"{beside}: not an encoder's config ({' '.join(str(error).split())[:200]})") from error


def _inside(path: Path, classifier: bool) -> Path:
    """The weights file of a run, or of a folder."""
    places = (path / "classifier", path) if classifier else (path / "encoder", path)
    names = ("model.safetensors", "pytorch_model.bin")
    found = next((folder / name for folder in places for name in names if (folder / name).is_file()), None)
    if found is not None:
        return found
    kind, end = (
        ("classifier", "tools/finetune.py makes one") if classifier else ("encoder", "a run exports it at its end")
    )
    several = sorted(path.glob(f"seed-*/{kind}"))
    cure = f"give one of its runs, such as {several[0].parent}" if several else end
    raise Refusal(DATA, f"{path}: no {kind}/model.safetensors in it ({cure})")


def _said_by_timm(content: dict[str, Any], beside: Path) -> dict[str, Any]:
    """What timm's config.json says that shapes do not: heads, image size, read-out, mean and deviation."""
    arguments, preparation = content.get("model_args", {}), content.get("pretrained_cfg", {})
    said = {name: preparation[name] for name in ("mean", "std") if name in preparation}
    pool = arguments.get("global_pool", content.get("global_pool"))
    if pool not in (None, "", "token", "avg"):
        raise Refusal(DATA, f"{beside}: global_pool={pool} makes it another model than a plain ViT")
    if pool:
        said["pool"] = "class" if pool == "token" else "mean"
    name = PLAIN.fullmatch(content.get("architecture", ""))
    letter = next((one for one in name.groups() if one), "") if name else ""
    size = {"t": "Ti"}.get(letter, letter.upper())
    if "num_heads" in arguments or size:
        said["heads"] = arguments.get("num_heads") or SIZES[size][2]
    image = arguments.get("img_size", preparation.get("input_size", [None])[1:])
    return said | ({"image": image} if image else {})


def _said_by_hugging_face(content: dict[str, Any], beside: Path) -> dict[str, Any]:
    """What Hugging Face's config.json and preprocessor_config.json say that shapes do not."""
    others = {"hidden_act": "gelu", "qkv_bias": True}
    found = {name: content.get(name, usual) for name, usual in others.items()}
    if content["model_type"] not in ("vit", "vit_mae") or found != others or content.get("layer_norm_eps", 0) > 1e-5:
        facts = {"model_type": content["model_type"], **found, "layer_norm_eps": content.get("layer_norm_eps")}
        text = ", ".join(f"{name}={value}" for name, value in facts.items())
        raise Refusal(DATA, f"{beside}: {text} is another model than a plain ViT")
    said: dict[str, Any] = {"heads": content["num_attention_heads"], "image": content["image_size"]}
    preparation = beside.with_name("preprocessor_config.json")
    if preparation.is_file():
        given = json.loads(preparation.read_text())
        for new, old, nothing in (("mean", "image_mean", 0.0), ("std", "image_std", 1.0)):
            value = given.get(old) if given.get("do_normalize", True) else nothing
            if value is not None:
                said[new] = value if isinstance(value, list) else [value]
    return said


def _read_timm(name: str) -> tuple[Encoder, Weights]:
    """timm's model with its weights."""
    if name.startswith("local-dir:"):
        return read(name.removeprefix("local-dir:"))
    import timm

    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0).eval()
    except Exception as error:  # timm and its hub client raise many kinds
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Refusal(DATA, f"timm:{name} cannot be had ({text}); without a network give a local file") from error
    tensors = model.state_dict()
    return _chosen(model, tensors, name, model.pretrained_cfg, f"timm:{name}"), tensors


def _asked_of_timm(content: dict[str, Any], weights: Weights, beside: Path) -> Encoder:
    """The encoder that a config.json of timm stands for, from the model that timm builds by it."""
    name, arguments = content["architecture"], content.get("model_args", {})
    try:
        import timm
    except ImportError as error:
        raise Refusal(DATA, f"{beside}: only timm knows what {name} is; pip install 'ssl_vit[timm]'") from error
    try:
        model: Any = timm.create_model(name, pretrained=False, **arguments | {"num_classes": 0}).eval()
        missing, _ = model.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise Refusal(DATA, f"{beside}: timm cannot build it ({' '.join(str(error).split())[:200]})") from error
    if missing:
        raise Refusal(DATA, f"{beside}: its file has not all of timm's {name}: {listed(missing)} are missing")
    return _chosen(model, weights, name, content.get("pretrained_cfg", {}), str(beside.parent))


def _chosen(model: Any, tensors: Weights, name: str, prepared: dict[str, Any], source: str) -> Encoder:
    """Our own ViT where that computes the same as timm's model, else timm's of that name, compared as well."""
    said = {key: prepared[key] for key in ("mean", "std") if key in prepared}
    own = {} if getattr(model, "global_pool", "token") != "token" or "cls_token" not in tensors else {"pool": "class"}
    heads = getattr(getattr(next(iter(getattr(model, "blocks", ())), None), "attn", None), "num_heads", 1)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or prepared.get("input_size", (3, 224))[1:]
    said |= {"image": size[0] if len({*size}) == 1 else tuple(size)}
    channels = next((part.in_channels for part in model.modules() if isinstance(part, torch.nn.Conv2d)), 3)
    reason: Any = "another model than a plain ViT"
    for kind in (Vit, TimmZoo):
        try:
            if kind is Vit:
                config: Encoder = infer(tensors, source, said | {"heads": heads, "pool": own.get("pool", "mean")})
            else:
                config = TimmZoo.model_validate({"name": name, "channels": channels, **said, **own})
            with torch.device("meta"):
                wanted = config.build().state_dict().items()
            if any(getattr(tensors.get(key.removeprefix("model.")), "shape", None) != one.shape for key, one in wanted):
                continue  # found out without drawing random numbers for all of them
            ours = config.build().eval()
            fill(ours, config, tensors, source)
            if _alike(ours, model):
                return config
        except (Refusal, AttributeError, ValueError, RuntimeError) as error:
            reason = error
    raise Refusal(
        DATA, f"{source}: timm's {name} as it is there cannot be built here: {' '.join(str(reason).split())[:300]}"
    )


@torch.no_grad()
def _alike(ours: Any, model: Any) -> bool:
    """Whether an encoder's tokens are those of timm's model, of an image of noise."""
    shape = (1, ours.channels, *ours.config.image_hw)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens, theirs = ours(image), model.forward_features(ours.normalise(image))
    theirs = ours._tokens(theirs) if isinstance(ours, TimmEncoder) else theirs
    return tokens.shape == theirs.shape and bool((tokens - theirs).abs().max() <= SAME * tokens.abs().max())


@dataclass
class Report:
    """What became of the tensors of a source."""

    source: str
    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # of the encoder: not in the source, or of another shape there
    unlike: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # of the source: no place for them, its head's included
    share: float = 0.0  # of the encoder's numbers that were filled

    def __str__(self) -> str:
        kinds = {
            "resized": self.resized,
            "of another shape": self.unlike,
            "missing": self.missing,
            "left over": self.left,
        }
        parts = [f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names]
        return f"{self.source}: {self.share:.1%} of the encoder; " + ", ".join([f"{len(self.matched)} matched", *parts])


def listed(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def fill(encoder: AnyEncoder, config: Encoder, weights: Weights, source: str, share: float = 1.0) -> Report:
    """Load weights that were made for `config` by name; positions are interpolated to the encoder's grid.

    The source's head is left. With share=1 anything else that only one of the two has, or that has another shape, is a
    Refusal(DATA) that lists it: nothing stays at its random start unnoticed, and no part of another architecture is
    dropped. With less, so much of the encoder's numbers has to be filled.
    """
    wanted = {name.removeprefix(encoder.inside): value for name, value in encoder.state_dict().items()}
    fitting, resized = _resized(encoder, config, weights, source)
    report = Report(source)
    for name, value in wanted.items():
        found = fitting.get(name)
        kind = report.missing if found is None else report.unlike if found.shape != value.shape else report.matched
        kind.append(name)
    report.resized = [name for name in resized if name in report.matched]
    report.left = [name for name in weights if name not in wanted]
    filled = sum(wanted[name].numel() for name in report.matched)
    report.share = filled / max(1, sum(value.numel() for value in wanted.values()))
    strange = [name for name in report.left if not name.startswith(NOT_ENCODER)]
    if report.share < share or (share == 1 and (report.missing or report.unlike or strange)):
        kinds = {
            "missing": report.missing,
            "of another shape": report.unlike,
            "that it has no place for": strange,
        }
        text = "; ".join(f"{len(names)} tensors {kind} ({listed(names)})" for kind, names in kinds.items() if names)
        found = "" if share == 1 else f" ({report.share:.1%} of it can be filled, init_share={share:g})"
        raise Refusal(DATA, f"{source}: does not fit the encoder{found}: {text}")
    for name in report.matched:
        if wanted[name].is_floating_point() and not (
            fitting[name].is_floating_point() and fitting[name].isfinite().all()
        ):
            raise Refusal(
                DATA, f"{source}: {name} has numbers that are not finite, or whole numbers: the file is damaged"
            )
    chosen = {encoder.inside + name: fitting[name] for name in report.matched}
    encoder.load_state_dict(chosen, strict=False)
    return report


def _resized(encoder: AnyEncoder, config: Encoder, weights: Weights, source: str) -> tuple[Weights, list[str]]:
    """The weights with positions for the encoder's grid, and the names of those that changed."""
    if isinstance(encoder, TimmEncoder):
        table = weights.get("pos_embed")
        own = getattr(encoder.model, "pos_embed", None)
        if table is None or own is None or table.shape == own.shape or table.ndim != 3:
            return _resized_lines(encoder, weights)
        old = config.build()  # of the size that the weights were made for
        prefix = table.shape[1] - old.grid[0] * old.grid[1]
        return weights | {"pos_embed": layers.resize(table, old.grid, encoder.grid, prefix)}, ["pos_embed"]
    old, new, made = config.grid, encoder.grid, dict(weights)  # type: ignore[union-attr]
    for name, value in weights.items():
        if name == "pos_embed" or name.endswith(".pos.table"):
            if value.shape[1] != encoder.prefix + old[0] * old[1]:
                raise Refusal(DATA, f"{source}: {value.shape[1]} positions do not fit its grid of {old} patches")
            made[name] = layers.resize(value, old, new, encoder.prefix)
        elif name.endswith(("pos_embed.rows", ".pos.rows", "pos_embed.columns", ".pos.columns")):
            made[name] = layers.resize_axis(value, new[name.endswith("columns")])
        elif name.split(".")[-1] == "offsets":
            lines = encoder.lines(name, old), encoder.lines(name, new)
            made[name] = layers.resize_offsets(value, *lines)
    return made, [name for name in made if made[name] is not weights[name]]


def _resized_lines(encoder: TimmEncoder, weights: Weights) -> tuple[Weights, list[str]]:
    """The same of the rows' and columns' relative positions of an AxialResNet."""
    own, made = encoder.model.state_dict(), dict(weights)
    for name, value in weights.items():
        if name in own and name.endswith((".rows.offsets", ".columns.offsets")) and own[name].shape != value.shape:
            lines = ((1, (len(table) + 1) // 2) for table in (value, own[name]))
            made[name] = layers.resize_offsets(value, *lines)
    return made, [name for name in made if made[name] is not weights[name]]


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


def digest(tensors: Weights) -> str:
    """A digest of named tensors."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()
