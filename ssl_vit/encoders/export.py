"""Where an encoder's weights go: timm, Hugging Face, ONNX, or our own folder, which opens everything.

A folder is `model.safetensors` under timm's names and `config.json`, whose `ssl_vit` entry is the encoder's config:
that is our format, and `load_encoder` opens it. Where timm has the same model, `config.json` says so to timm too, and
`timm.create_model("local-dir:FOLDER", pretrained=True)` opens the folder as well.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_vit.encoders import Encoder
from ssl_vit.encoders.checkpoint_formats import Weights
from ssl_vit.encoders.timm_encoder import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit, VitEncoder
from ssl_vit.encoders.weights import AnyEncoder, PretrainedClassifier
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import pool_tokens

ARCHITECTURES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
MAX_INLINE_BYTES = 1.9e9  # bytes of weights inside an ONNX file, whose format ends at 2 GiB
BIT_SIZES = ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")  # what timm has names for


def export_encoder(encoder: AnyEncoder, folder: Path, classifier: PretrainedClassifier | None = None) -> str:
    """Write an encoder, and a classifier with it, into a folder; returns what opens it."""
    config = encoder.config
    height, width = config.image_hw
    architecture = timm_architecture(config) if classifier is None or isinstance(config, Vit) else None
    classes = len(classifier.names) if classifier else 0
    pretrained_cfg = {
        "input_size": [config.channels, height, width],
        "mean": list(config.mean * (config.channels // len(config.mean))),
        "std": list(config.std * (config.channels // len(config.std))),
        "interpolation": "bilinear",
        "crop_pct": classifier.crop if classifier else 0.875,
        "fixed_input_size": "img_size" in (architecture or ("", {}))[1],  # if true, timm hands one over
        "num_classes": classes,
        **({"label_names": classifier.names} if classifier else {}),
    }
    if isinstance(config, Vit):
        first_conv = "patch_embed.proj" if config.stem == "patch" else "patch_embed.backbone.stem.conv"
        pretrained_cfg |= {"first_conv": first_conv, "classifier": "head"}
    content: dict[str, Any] = {
        "num_classes": classes,
        **({"label_names": classifier.names} if classifier else {}),
        "num_features": encoder.width,
        "pretrained_cfg": pretrained_cfg,
        "ssl_vit": config.model_dump(mode="json"),
    }
    if architecture is not None:
        name, arguments = architecture
        pool = {"global_pool": arguments["global_pool"]} if "global_pool" in arguments else {}
        content = {"architecture": name, **pool, "model_args": arguments | {"num_classes": classes}, **content}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(export_tensors(encoder, classifier), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    return "opened by timm and load_encoder" if architecture else "timm has no such model: opened by load_encoder only"


def export_tensors(encoder: AnyEncoder, classifier: PretrainedClassifier | None = None) -> Weights:
    """An encoder's tensors under timm's names, on the CPU."""
    prefix = encoder.state_dict_prefix
    state_dict = {name.removeprefix(prefix): v.detach().cpu().contiguous() for name, v in encoder.state_dict().items()}
    if classifier:
        state_dict |= {"head.weight": classifier.weight.contiguous(), "head.bias": classifier.bias.contiguous()}
    return state_dict


def timm_architecture(config: Encoder) -> tuple[str, dict[str, Any]] | None:
    """timm's name of a model and its arguments; None where timm cannot express it."""
    if isinstance(config, TimmZoo):
        name = config.name.split(".")[0]
        return (name, config.arguments) if ":" not in name else None
    if isinstance(config, Bit):
        size = f"{config.depth}x{config.widen}"
        return (f"resnetv2_{size}_bit", {"in_chans": config.channels}) if size in BIT_SIZES else None
    if not isinstance(config, Vit) or config.resolved_placement != "stem" or config.positions not in ("1d", "none"):
        return None
    width, depth, heads, mlp = config.dims
    arguments = {
        "img_size": list(config.image_hw),
        "in_chans": config.channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": (mlp + 0.5) / width,  # timm cuts their product off, and mlp / width * width may fall short of mlp
        "global_pool": "token" if config.pool == "class" else "avg",
        "fc_norm": False,  # the final norm stays before pooling, as it was trained
        **({} if config.positions == "1d" else {"pos_embed": "none"}),
        **({} if config.class_token else {"class_token": False}),
    }
    if config.stem == "r50":
        return ("vit_base_r50_s16_224" if config.patch == 16 else "vit_large_r50_s32_224"), arguments
    name = f"vit_{ARCHITECTURES[config.size]}_patch{14 if config.size == 'H' else 16}_224"
    return name, arguments | {"patch_size": config.patch}


def with_1d_positions(encoder: AnyEncoder) -> AnyEncoder:
    """The same encoder with its 2-D positions as a 1-D table, which others can express; any other one as it is."""
    config = encoder.config
    if not isinstance(config, Vit) or config.positions != "2d" or config.resolved_placement != "stem":
        return encoder
    assert isinstance(encoder.pos_embed, nn.Module)
    converted = config.model_copy(update={"positions": "1d"}).build()
    weights = {name: value for name, value in encoder.state_dict().items() if not name.startswith("pos_embed.")}
    converted.load_state_dict(weights | {"pos_embed": encoder.pos_embed().detach()})
    return converted.train(encoder.training)


def export_hugging_face(encoder: AnyEncoder, folder: Path) -> None:
    """Write an encoder as Hugging Face's `ViTModel` (transformers); ExitError(USAGE) where that has no such model.

    `ViTModel.from_pretrained(FOLDER, add_pooling_layer=False)` gives the same tokens as `last_hidden_state`.
    """
    from transformers import ViTConfig, ViTImageProcessor, ViTModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    encoder, config = with_1d_positions(encoder), encoder.config
    reasons = {
        "it is no ViT": not isinstance(config, Vit),
        "it has no class token": not encoder.prefix,
        "its patches come from a ResNet": getattr(config, "stem", "patch") != "patch",
        "its positions are no table at the stem": not isinstance(getattr(encoder, "pos_embed", None), Tensor)
        or getattr(config, "resolved_placement", "") != "stem",
    }
    if any(reasons.values()):
        reason = next(text for text, holds in reasons.items() if holds)
        raise ExitError(ExitCode.USAGE, f"format=hf: Hugging Face's ViTModel cannot express this encoder: {reason}")
    assert isinstance(encoder, VitEncoder)
    width, depth, heads, mlp = encoder.config.dims
    height, image_width = config.image_hw
    hf_config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=height if height == image_width else (height, image_width),  # type: ignore[arg-type]
        patch_size=encoder.stride,
        num_channels=config.channels,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
    )
    model = ViTModel(hf_config, add_pooling_layer=False)
    model.load_state_dict(to_hugging_face_names(export_tensors(encoder)))
    model.save_pretrained(folder)
    mean, std = (list(values * (config.channels // len(values))) for values in (config.mean, config.std))
    ViTImageProcessor(size={"height": height, "width": image_width}, image_mean=mean, image_std=std).save_pretrained(
        folder
    )


def to_hugging_face_names(weights: Weights) -> Weights:
    """timm's names as transformers 5 has them in memory; it writes the ones of the hub."""
    renamed: Weights = {}
    for name, value in weights.items():
        for old, new in (
            ("cls_token", "embeddings.cls_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("blocks.", "layers."),
            (".attn.proj.", ".attention.o_proj."),
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
        ):
            name = name.replace(old, new)
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = piece.contiguous()
        else:
            renamed[f"layer{name}" if name.startswith("norm.") else name] = value
    return renamed


class ImageToFeatures(nn.Module):
    """What an ONNX file computes: image uint8 [B, C, H, W] -> tokens [B, T, D], and features [B, D] or logits."""

    def __init__(self, encoder: AnyEncoder, classifier: PretrainedClassifier | None):
        super().__init__()
        self.encoder, self.classifier = encoder, None
        if classifier is not None:
            self.classifier = nn.Linear(classifier.weight.shape[1], classifier.weight.shape[0])
            self.classifier.load_state_dict({"weight": classifier.weight, "bias": classifier.bias})

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encoder(image)
        features = pool_tokens(tokens, self.encoder.pool, self.encoder.prefix)
        return tokens, features if self.classifier is None else self.classifier(features)


def export_onnx(encoder: AnyEncoder, path: Path, classifier: PretrainedClassifier | None = None) -> float:
    """Write an ONNX file, any batch size; returns the largest difference that onnxruntime finds, relative to the whole.

    It takes images as they are, uint8: normalization is inside. Raises ExitError(USAGE) without the extra `onnx`.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise ExitError(ExitCode.USAGE, f"format=onnx: {error.name} is missing; pip install 'ssl_vit[onnx]'") from error
    model = ImageToFeatures(encoder, classifier).eval()
    image = torch.randint(0, 256, (2, encoder.channels, *encoder.config.image_hw), dtype=torch.uint8)
    names = ["tokens", "features" if classifier is None else "logits"]
    dynamic_shapes = {"image": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            (image,),
            input_names=["image"],
            output_names=names,
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        program.save(path, external_data=size > MAX_INLINE_BYTES)  # beside it as NAME.onnx.data
        images = torch.cat([image, image.flip(0)[:1]])
        expected = model(images)
    outputs = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        names, {"image": images.numpy()}
    )
    pairs = [(torch.from_numpy(a), b) for a, b in zip(outputs, expected, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
