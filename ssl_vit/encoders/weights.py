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
from ssl_vit.encoders.checkpoint_formats import NON_ENCODER_PREFIXES, Weights, infer_config, read_weights_file
from ssl_vit.encoders.timm_encoder import TimmEncoder, TimmZoo
from ssl_vit.encoders.vit import SIZES, Vit, VitEncoder
from ssl_vit.errors import ExitCode, ExitError

AnyEncoder = VitEncoder | TimmEncoder
CONFIG_ADAPTER: TypeAdapter[Encoder] = TypeAdapter(Encoder)
PLAIN_VIT_NAME = re.compile(r"(?:vit|deit)_(?:(t)iny|(s)mall|(b)ase|(l)arge|(h)uge)_(?:patch\d+|r50_s\d+)_\d+(?:\..*)?")
"""timm's names of plain ViTs and hybrids with the authors' numbers of heads; of other names timm is asked."""
SUPPORTED_MODEL_ARGS = {
    "img_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
}
SUPPORTED_MODEL_ARGS |= {"global_pool", "fc_norm", "class_token", "pos_embed", "drop_rate", "drop_path_rate"}
"""timm's arguments that tensors show, or that are read here; others make another model of the same shapes."""
OUTPUT_TOLERANCE = 1e-5  # of the largest number: how far two programs may be apart that compute the same


def load_encoder(path: str | Path) -> AnyEncoder:
    """An encoder in eval mode from a run folder, its encoder/ folder, or a weights file (safetensors, .npz or .pth).

    Raises ExitError(DATA) where there is nothing to load or the weights do not fit.
    """
    config, weights = read_source(str(path))
    encoder = config.build()
    load_weights(encoder, config, weights, str(path))
    return encoder.eval()


def read_source(source: str, classifier: bool = False) -> tuple[Encoder, Weights]:
    """The architecture and the weights of a source: a path as in `load_encoder`, or `timm:NAME`.

    Of a run, those of its encoder/ folder, or with `classifier` of its classifier/ folder.
    """
    if source.startswith("timm:"):
        return _read_timm(source.removeprefix("timm:"))
    path = Path(source)
    if path.is_dir():
        path = _weights_file(path, classifier)
    if not path.is_file():
        raise ExitError(ExitCode.DATA, f"{path}: no such run, folder or weights file")
    weights, metadata = read_weights_file(path)
    config_path = path.with_name("config.json")
    if not config_path.is_file() or path.suffix == ".npz":
        return infer_config(weights, str(path), metadata), weights
    try:
        content = json.loads(config_path.read_text())
        if "ssl_vit" in content:
            return CONFIG_ADAPTER.validate_python({"kind": "vit"} | content["ssl_vit"]), weights
        if "model_type" in content:
            return infer_config(weights, str(path), metadata | _hugging_face_metadata(content, config_path)), weights
        name = content.get("architecture")
        if name is None or (
            PLAIN_VIT_NAME.fullmatch(name) and not set(content.get("model_args", {})) - SUPPORTED_MODEL_ARGS
        ):
            return infer_config(weights, str(path), metadata | _timm_metadata(content, config_path)), weights
        return _resolve_timm(content, weights, config_path), weights
    except (ValidationError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ExitError(
            ExitCode.DATA, f"{config_path}: not an encoder's config ({' '.join(str(error).split())[:200]})"
        ) from error


def _weights_file(path: Path, classifier: bool) -> Path:
    """The weights file of a run, or of a folder."""
    folders = (path / "classifier", path) if classifier else (path / "encoder", path)
    names = ("model.safetensors", "pytorch_model.bin")
    weights_path = next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)
    if weights_path is not None:
        return weights_path
    kind, default_hint = (
        ("classifier", "tools/finetune.py makes one") if classifier else ("encoder", "a run exports it at its end")
    )
    seed_runs = sorted(path.glob(f"seed-*/{kind}"))
    hint = f"give one of its runs, such as {seed_runs[0].parent}" if seed_runs else default_hint
    raise ExitError(ExitCode.DATA, f"{path}: no {kind}/model.safetensors in it ({hint})")


def _timm_metadata(content: dict[str, Any], config_path: Path) -> dict[str, Any]:
    """What timm's config.json says that shapes do not: heads, image size, read-out, mean and deviation."""
    arguments, pretrained_cfg = content.get("model_args", {}), content.get("pretrained_cfg", {})
    metadata = {name: pretrained_cfg[name] for name in ("mean", "std") if name in pretrained_cfg}
    pool = arguments.get("global_pool", content.get("global_pool"))
    if pool not in (None, "", "token", "avg"):
        raise ExitError(ExitCode.DATA, f"{config_path}: global_pool={pool} makes it another model than a plain ViT")
    if pool:
        metadata["pool"] = "class" if pool == "token" else "mean"
    match = PLAIN_VIT_NAME.fullmatch(content.get("architecture", ""))
    letter = next((group for group in match.groups() if group), "") if match else ""
    size = {"t": "Ti"}.get(letter, letter.upper())
    if "num_heads" in arguments or size:
        metadata["heads"] = arguments.get("num_heads") or SIZES[size][2]
    image = arguments.get("img_size", pretrained_cfg.get("input_size", [None])[1:])
    return metadata | ({"image": image} if image else {})


def _hugging_face_metadata(content: dict[str, Any], config_path: Path) -> dict[str, Any]:
    """What Hugging Face's config.json and preprocessor_config.json say that shapes do not."""
    expected = {"hidden_act": "gelu", "qkv_bias": True}
    actual = {name: content.get(name, default) for name, default in expected.items()}
    if content["model_type"] not in ("vit", "vit_mae") or actual != expected or content.get("layer_norm_eps", 0) > 1e-5:
        settings = {"model_type": content["model_type"], **actual, "layer_norm_eps": content.get("layer_norm_eps")}
        text = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise ExitError(ExitCode.DATA, f"{config_path}: {text} is another model than a plain ViT")
    metadata: dict[str, Any] = {"heads": content["num_attention_heads"], "image": content["image_size"]}
    preprocessor_path = config_path.with_name("preprocessor_config.json")
    if preprocessor_path.is_file():
        preprocessor = json.loads(preprocessor_path.read_text())
        for new, old, identity in (("mean", "image_mean", 0.0), ("std", "image_std", 1.0)):
            value = preprocessor.get(old) if preprocessor.get("do_normalize", True) else identity
            if value is not None:
                metadata[new] = value if isinstance(value, list) else [value]
    return metadata


def _read_timm(name: str) -> tuple[Encoder, Weights]:
    """timm's model with its weights."""
    if name.startswith("local-dir:"):
        return read_source(name.removeprefix("local-dir:"))
    import timm

    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0).eval()
    except Exception as error:  # timm and its hub client raise many kinds
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ExitError(
            ExitCode.DATA, f"timm:{name} cannot be had ({text}); without a network give a local file"
        ) from error
    tensors = model.state_dict()
    return _select_encoder_config(model, tensors, name, model.pretrained_cfg, f"timm:{name}"), tensors


def _resolve_timm(content: dict[str, Any], weights: Weights, config_path: Path) -> Encoder:
    """The encoder that a config.json of timm stands for, from the model that timm builds by it."""
    name, arguments = content["architecture"], content.get("model_args", {})
    try:
        import timm
    except ImportError as error:
        raise ExitError(
            ExitCode.DATA, f"{config_path}: only timm knows what {name} is; pip install 'ssl_vit[timm]'"
        ) from error
    try:
        model: Any = timm.create_model(name, pretrained=False, **arguments | {"num_classes": 0}).eval()
        missing, _ = model.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ExitError(
            ExitCode.DATA, f"{config_path}: timm cannot build it ({' '.join(str(error).split())[:200]})"
        ) from error
    if missing:
        raise ExitError(
            ExitCode.DATA, f"{config_path}: its file has not all of timm's {name}: {format_names(missing)} are missing"
        )
    return _select_encoder_config(model, weights, name, content.get("pretrained_cfg", {}), str(config_path.parent))


def _select_encoder_config(
    model: Any, tensors: Weights, name: str, pretrained_cfg: dict[str, Any], source: str
) -> Encoder:
    """Our own ViT where that computes the same as timm's model, else timm's of that name, compared as well."""
    metadata = {key: pretrained_cfg[key] for key in ("mean", "std") if key in pretrained_cfg}
    pool_options = (
        {} if getattr(model, "global_pool", "token") != "token" or "cls_token" not in tensors else {"pool": "class"}
    )
    heads = getattr(getattr(next(iter(getattr(model, "blocks", ())), None), "attn", None), "num_heads", 1)
    size = (
        getattr(getattr(model, "patch_embed", None), "img_size", None) or pretrained_cfg.get("input_size", (3, 224))[1:]
    )
    metadata |= {"image": size[0] if len({*size}) == 1 else tuple(size)}
    channels = next((module.in_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d)), 3)
    reason: Any = "another model than a plain ViT"
    for kind in (Vit, TimmZoo):
        try:
            if kind is Vit:
                config: Encoder = infer_config(
                    tensors, source, metadata | {"heads": heads, "pool": pool_options.get("pool", "mean")}
                )
            else:
                config = TimmZoo.model_validate({"name": name, "channels": channels, **metadata, **pool_options})
            with torch.device("meta"):
                expected = config.build().state_dict().items()
            if any(
                getattr(tensors.get(key.removeprefix("model.")), "shape", None) != tensor.shape
                for key, tensor in expected
            ):
                continue  # found out without drawing random numbers for all of them
            encoder = config.build().eval()
            load_weights(encoder, config, tensors, source)
            if _outputs_match(encoder, model):
                return config
        except (ExitError, AttributeError, ValueError, RuntimeError) as error:
            reason = error
    raise ExitError(
        ExitCode.DATA,
        f"{source}: timm's {name} as it is there cannot be built here: {' '.join(str(reason).split())[:300]}",
    )


@torch.no_grad()
def _outputs_match(encoder: Any, model: Any) -> bool:
    """Whether an encoder's tokens are those of timm's model, of an image of noise."""
    shape = (1, encoder.channels, *encoder.config.image_hw)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens, timm_tokens = encoder(image), model.forward_features(encoder.normalize(image))
    timm_tokens = encoder._to_tokens(timm_tokens) if isinstance(encoder, TimmEncoder) else timm_tokens
    return tokens.shape == timm_tokens.shape and bool(
        (tokens - timm_tokens).abs().max() <= OUTPUT_TOLERANCE * tokens.abs().max()
    )


@dataclass
class LoadReport:
    """What became of the tensors of a source."""

    source: str
    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # of the encoder: not in the source, or of another shape there
    mismatched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # of the source: no place for them, its head's included
    fraction: float = 0.0  # of the encoder's numbers that were filled

    def __str__(self) -> str:
        kinds = {
            "resized": self.resized,
            "of another shape": self.mismatched,
            "missing": self.missing,
            "left over": self.unused,
        }
        parts = [f"{len(names)} {kind} ({format_names(names)})" for kind, names in kinds.items() if names]
        return f"{self.source}: {self.fraction:.1%} of the encoder; " + ", ".join(
            [f"{len(self.matched)} matched", *parts]
        )


def format_names(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def load_weights(
    encoder: AnyEncoder, config: Encoder, weights: Weights, source: str, min_fraction: float = 1.0
) -> LoadReport:
    """Load weights that were made for `config` by name; positions are interpolated to the encoder's grid.

    The source's head is left. With min_fraction=1 anything else that only one of the two has, or that has another
    shape, is an ExitError(DATA) that lists it: nothing stays at its random start unnoticed, and no part of another
    architecture is dropped. With less, so much of the encoder's numbers has to be filled.
    """
    state_dict = {name.removeprefix(encoder.state_dict_prefix): value for name, value in encoder.state_dict().items()}
    resized_weights, resized = _resize_positions(encoder, config, weights, source)
    report = LoadReport(source)
    for name, value in state_dict.items():
        tensor = resized_weights.get(name)
        group = (
            report.missing if tensor is None else report.mismatched if tensor.shape != value.shape else report.matched
        )
        group.append(name)
    report.resized = [name for name in resized if name in report.matched]
    report.unused = [name for name in weights if name not in state_dict]
    num_loaded = sum(state_dict[name].numel() for name in report.matched)
    report.fraction = num_loaded / max(1, sum(value.numel() for value in state_dict.values()))
    unexpected = [name for name in report.unused if not name.startswith(NON_ENCODER_PREFIXES)]
    if report.fraction < min_fraction or (min_fraction == 1 and (report.missing or report.mismatched or unexpected)):
        kinds = {
            "missing": report.missing,
            "of another shape": report.mismatched,
            "that it has no place for": unexpected,
        }
        text = "; ".join(
            f"{len(names)} tensors {kind} ({format_names(names)})" for kind, names in kinds.items() if names
        )
        coverage = (
            ""
            if min_fraction == 1
            else f" ({report.fraction:.1%} of it can be filled, init_min_fraction={min_fraction:g})"
        )
        raise ExitError(ExitCode.DATA, f"{source}: does not fit the encoder{coverage}: {text}")
    for name in report.matched:
        if state_dict[name].is_floating_point() and not (
            resized_weights[name].is_floating_point() and resized_weights[name].isfinite().all()
        ):
            raise ExitError(
                ExitCode.DATA,
                f"{source}: {name} has numbers that are not finite, or whole numbers: the file is damaged",
            )
    loaded = {encoder.state_dict_prefix + name: resized_weights[name] for name in report.matched}
    encoder.load_state_dict(loaded, strict=False)
    return report


def _resize_positions(encoder: AnyEncoder, config: Encoder, weights: Weights, source: str) -> tuple[Weights, list[str]]:
    """The weights with positions for the encoder's grid, and the names of those that changed."""
    if isinstance(encoder, TimmEncoder):
        table = weights.get("pos_embed")
        model_table = getattr(encoder.model, "pos_embed", None)
        if table is None or model_table is None or table.shape == model_table.shape or table.ndim != 3:
            return _resize_axial_offsets(encoder, weights)
        old = config.build()  # of the size that the weights were made for
        prefix = table.shape[1] - old.grid[0] * old.grid[1]
        return weights | {"pos_embed": layers.resize(table, old.grid, encoder.grid, prefix)}, ["pos_embed"]
    old, new, resized = config.grid, encoder.grid, dict(weights)  # type: ignore[union-attr]
    for name, value in weights.items():
        if name == "pos_embed" or name.endswith(".pos.table"):
            if value.shape[1] != encoder.prefix + old[0] * old[1]:
                raise ExitError(
                    ExitCode.DATA, f"{source}: {value.shape[1]} positions do not fit its grid of {old} patches"
                )
            resized[name] = layers.resize(value, old, new, encoder.prefix)
        elif name.endswith(("pos_embed.rows", ".pos.rows", "pos_embed.columns", ".pos.columns")):
            resized[name] = layers.resize_axis(value, new[name.endswith("columns")])
        elif name.split(".")[-1] == "offsets":
            grids = encoder.offset_grid(name, old), encoder.offset_grid(name, new)
            resized[name] = layers.resize_offsets(value, *grids)
    return resized, [name for name in resized if resized[name] is not weights[name]]


def _resize_axial_offsets(encoder: TimmEncoder, weights: Weights) -> tuple[Weights, list[str]]:
    """The same of the rows' and columns' relative positions of an AxialResNet."""
    state_dict, resized = encoder.model.state_dict(), dict(weights)
    for name, value in weights.items():
        if (
            name in state_dict
            and name.endswith((".rows.offsets", ".columns.offsets"))
            and state_dict[name].shape != value.shape
        ):
            grids = ((1, (len(table) + 1) // 2) for table in (value, state_dict[name]))
            resized[name] = layers.resize_offsets(value, *grids)
    return resized, [name for name in resized if resized[name] is not weights[name]]


INTERMEDIATE_PREFIXES = ("pre_logits", "fc_norm", "attn_pool", "head.norm", "head.mlp")
"""Beginnings of the names of what others have between an encoder's read-out and its last layer."""


@dataclass(frozen=True)
class PretrainedClassifier:
    """A linear layer on the encoder's read-out, the names of its classes, and the crop it was judged on."""

    weight: Tensor  # [classes, D]
    bias: Tensor
    names: list[str]
    crop: float = 0.875  # side of the central crop, of the image's short side

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.names)

    @property
    def has_numbered_classes(self) -> bool:
        """Whether nobody named the classes."""
        return self.names == [str(number) for number in range(self.num_classes)]

    def has_classes(self, names: list[str]) -> bool:
        """Whether these are its classes, as far as is known."""
        return names == self.names or (self.has_numbered_classes and len(names) == self.num_classes)

    def load_into_layer(self, layer: torch.nn.Linear, names: list[str], source: str) -> None:
        """Put the weights into a layer for classes of these names; raises ExitError(DATA) where they are others."""
        if not self.has_classes(names):
            mismatch = next((pair for pair in zip(names, self.names, strict=False) if pair[0] != pair[1]), ("", ""))
            difference = f"the first that differ: {mismatch[1]}, {mismatch[0]}"
            text = f"{len(self.names)} classes there, {len(names)} here; {difference}"
            raise ExitError(
                ExitCode.DATA, f"{source}: its classifier is for other classes ({text}); leave head.keep out"
            )
        layer.load_state_dict({"weight": self.weight, "bias": self.bias})


def read_classifier(source: str) -> tuple[AnyEncoder, PretrainedClassifier]:
    """A source's encoder, in eval mode, and the linear classifier on it; raises ExitError(DATA) where it has none."""
    config, weights = read_source(source, classifier=True)
    if "head.weight" not in weights or "head.bias" not in weights:
        raise ExitError(
            ExitCode.DATA, f"{source}: has no classifier (head.weight, head.bias); tools/finetune.py makes one"
        )
    intermediate = sorted({name.split(".")[0] for name in weights if name.startswith(INTERMEDIATE_PREFIXES)})
    if intermediate:
        raise ExitError(
            ExitCode.DATA,
            f"{source}: its classifier is not linear on what the encoder gives: {intermediate[0]} comes between",
        )
    non_finite = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if non_finite:
        raise ExitError(ExitCode.DATA, f"{source}: {non_finite[0]} has numbers that are not finite")
    encoder = config.build()
    load_weights(encoder, config, weights, source)
    folder = Path(source) / "classifier" if (Path(source) / "classifier").is_dir() else Path(source)
    names, crop = [str(number) for number in range(len(weights["head.weight"]))], 0.875
    try:
        metadata = json.loads(((folder if folder.is_dir() else folder.parent) / "config.json").read_text())
        pretrained_cfg = metadata.get("pretrained_cfg", {})
        names = [str(name) for name in metadata.get("label_names") or pretrained_cfg.get("label_names") or names]
        crop = float(pretrained_cfg.get("crop_pct", crop))
    except FileNotFoundError:
        pass
    except (ValueError, AttributeError, TypeError) as error:
        raise ExitError(ExitCode.DATA, f"{source}: its config.json cannot be read ({error})") from error
    if len(names) != len(weights["head.weight"]):
        raise ExitError(ExitCode.DATA, f"{source}: {len(names)} label_names for {len(weights['head.weight'])} classes")
    return encoder.eval(), PretrainedClassifier(weights["head.weight"], weights["head.bias"], names, crop)


def tensor_digest(tensors: Weights) -> str:
    """A digest of named tensors."""
    hasher = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        hasher.update(name.encode() + value.contiguous().numpy().tobytes())
    return hasher.hexdigest()
