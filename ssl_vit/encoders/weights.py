"""Where an encoder's weights come from: a run, a folder, a file of any known origin, or timm.

Names are timm's, of a ViT as of any other encoder; see `ssl_vit.encoders.export` for the way out.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from ssl_vit.encoders import Encoder, positions
from ssl_vit.encoders.formats import NOT_ENCODER, Weights, infer, read_file
from ssl_vit.encoders.timm_zoo import TimmEncoder, TimmZoo
from ssl_vit.encoders.vit import VitEncoder
from ssl_vit.exits import DATA, Refusal

AnyEncoder = VitEncoder | TimmEncoder
CONFIG: TypeAdapter[Encoder] = TypeAdapter(Encoder)
HIDDEN = ("act_layer", "norm_layer", "block_fn", "mlp_layer", "attn_layer", "embed_layer")
"""timm's arguments by which a model is another one though its tensors' shapes are a plain ViT's."""


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
    if beside.is_file() and path.suffix != ".npz":
        try:
            content = json.loads(beside.read_text())
            if "ssl_vit" in content:
                return CONFIG.validate_python({"kind": "vit"} | content["ssl_vit"]), weights
            return infer(weights, str(path), said | _said(content, beside)), weights
        except (ValidationError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise Refusal(DATA, f"{beside}: not an encoder's config ({' '.join(str(error).split())[:200]})") from error
    return infer(weights, str(path), said), weights


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


def _said(content: dict[str, Any], beside: Path) -> dict[str, Any]:
    """What a config.json of timm or Hugging Face says that shapes do not: heads, read-out, mean and deviation."""
    if "model_type" in content:
        return _said_by_hugging_face(content, beside)
    said: dict[str, Any] = {}
    if "global_pool" in content:
        said["pool"] = "class" if content["global_pool"] == "token" else "mean"
    hidden = [name for name in HIDDEN if name in content.get("model_args", {})]
    if hidden or content.get("global_pool", "token") not in ("token", "avg", ""):
        raise Refusal(DATA, f"{hidden[0] if hidden else 'global_pool'} makes it another model than a plain ViT")
    if "num_heads" in content.get("model_args", {}):
        said["heads"] = content["model_args"]["num_heads"]
    preparation = content.get("pretrained_cfg", {})
    return said | {name: preparation[name] for name in ("mean", "std") if name in preparation}


def _said_by_hugging_face(content: dict[str, Any], beside: Path) -> dict[str, Any]:
    if content["model_type"] not in ("vit", "vit_mae") or content.get("hidden_act", "gelu") != "gelu":
        text = f"model_type={content['model_type']} with hidden_act={content.get('hidden_act')}"
        raise Refusal(DATA, f"{beside}: {text} is another model than a plain ViT")
    said: dict[str, Any] = {"heads": content["num_attention_heads"], "image": content["image_size"]}
    preparation = beside.with_name("preprocessor_config.json")
    if preparation.is_file():
        found = json.loads(preparation.read_text())
        said |= {new: found[old] for new, old in (("mean", "image_mean"), ("std", "image_std")) if old in found}
    return said


def _read_timm(name: str) -> tuple[Encoder, Weights]:
    """timm's model with its weights: as our own ViT where that computes the same, else as timm's."""
    import timm

    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0).eval()
    except Exception as error:  # timm and its hub client raise many kinds
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Refusal(DATA, f"timm:{name} cannot be had ({text}); without a network give a local file") from error
    tensors, prepared = model.state_dict(), model.pretrained_cfg
    said = {key: prepared[key] for key in ("mean", "std") if key in prepared}
    try:
        heads = {"heads": model.blocks[0].attn.num_heads} if hasattr(model, "blocks") else {}
        token = getattr(model, "global_pool", "token") == "token" and "cls_token" in tensors
        plain = infer(tensors, f"timm:{name}", said | heads | {"pool": "class" if token else "mean"})
        ours = plain.build().eval()
        fill(ours, plain, tensors, f"timm:{name}")
        image = torch.randint(0, 256, (1, plain.channels, *plain.image_hw), dtype=torch.uint8)
        with torch.no_grad():
            if torch.allclose(ours(image), model.forward_features(ours.normalise(image)), atol=1e-4):
                return plain, tensors
    except (Refusal, AttributeError, ValueError, RuntimeError):
        pass
    _, height, width = prepared["input_size"]
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or (height, width)
    image_size = size[0] if size[0] == size[1] else tuple(size)
    return TimmZoo.model_validate({"name": name, "image": image_size, **said}), tensors


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
        text = "; ".join(f"{len(n)} tensors {kind} ({', '.join(n[:3])} ...)" for kind, n in kinds.items() if n)
        found = "" if share == 1 else f" ({report.share:.1%} of it can be filled, init_share={share:g})"
        raise Refusal(DATA, f"{source}: does not fit the encoder{found}: {text}")
    chosen = {encoder.inside + name: fitting[name] for name in report.matched}
    encoder.load_state_dict(chosen, strict=False)
    return report


def _resized(encoder: AnyEncoder, config: Encoder, weights: Weights, source: str) -> tuple[Weights, list[str]]:
    """The weights with positions for the encoder's grid, and the names of those that changed."""
    if isinstance(encoder, TimmEncoder):
        table = weights.get("pos_embed")
        own = getattr(encoder.model, "pos_embed", None)
        if table is None or own is None or table.shape == own.shape or table.ndim != 3:
            return weights, []
        old = config.build()  # of the size that the weights were made for
        prefix = table.shape[1] - old.grid[0] * old.grid[1]
        return weights | {"pos_embed": positions.resize(table, old.grid, encoder.grid, prefix)}, ["pos_embed"]
    old, new, made = config.grid, encoder.grid, dict(weights)  # type: ignore[union-attr]
    for name, value in weights.items():
        if name == "pos_embed" or name.endswith(".pos.table"):
            if value.shape[1] != encoder.prefix + old[0] * old[1]:
                raise Refusal(DATA, f"{source}: {value.shape[1]} positions do not fit its grid of {old} patches")
            made[name] = positions.resize(value, old, new, encoder.prefix)
        elif name.endswith(("pos_embed.rows", ".pos.rows", "pos_embed.columns", ".pos.columns")):
            made[name] = positions.resize_axis(value, new[name.endswith("columns")])
        elif name.split(".")[-1] == "offsets":
            lines = encoder.lines(name, old), encoder.lines(name, new)
            made[name] = positions.resize_offsets(value, *lines)
    return made, [name for name in made if made[name] is not weights[name]]
