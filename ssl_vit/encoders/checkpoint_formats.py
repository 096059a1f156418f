"""Weights as others store them: whose a file is, told by its names, and its tensors under timm's names.

Google's `.npz` (JAX), Hugging Face's ViT and ViTMAE, DINO's checkpoints; timm's and MAE's names are the ones used here.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssl_vit.encoders.vit import SIZES, Vit
from ssl_vit.errors import ExitCode, ExitError

Weights = dict[str, Tensor]
NON_ENCODER_PREFIXES = ("head", "fc.", "pre_logits", "fc_norm", "decoder", "mask_token", "pooler", "classifier")
"""Beginnings of the names of what others store beside their encoder."""

HUGGING_FACE_PATTERNS = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),  # on disk, and in memory since transformers 5
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkvo])_proj\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attn\.o\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.attn\.(q)uery\.|\.attn\.(k)ey\.|\.attn\.(v)alue\.", r".attn.\1\2\3."),
)
GOOGLE_PATTERNS = (
    (r"^embedding/", "patch_embed/proj/"),
    (r"^cls$", "cls_token"),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_2/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_1/(q|k|v)[a-z]+/", r"/attn/\1/"),
    (r"/MultiHeadDotProductAttention_1/out/", "/attn/proj/"),
    (r"/MlpBlock_3/Dense_(\d)/", lambda m: f"/mlp/fc{int(m[1]) + 1}/"),
    (r"^conv_root/", "patch_embed/backbone/stem/conv/"),
    (r"^gn_root/", "patch_embed/backbone/stem/norm/"),
    (r"^block(\d+)/unit(\d+)/", lambda m: f"patch_embed/backbone/stages/{int(m[1]) - 1}/blocks/{int(m[2]) - 1}/"),
    (r"/conv_proj/", "/downsample/conv/"),
    (r"/gn_proj/", "/downsample/norm/"),
    (r"/gn(\d)/", r"/norm\1/"),
)


def read_weights_file(path: Path) -> tuple[Weights, dict[str, Any]]:
    """A file's tensors under timm's names, and what else is known of their architecture: heads, where it is told.

    Safetensors; `.npz` without pickles; anything else by torch with weights_only, never in another way. Raises
    ExitError(DATA).
    """
    try:
        if path.suffix == ".safetensors":
            tree: Any = load_file(path)
        elif path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return with_timm_names({name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files})
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # a bag of values beside DINO's weights
                tree = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError) as error:
        raise ExitError(
            ExitCode.DATA, f"{path}: cannot be read as weights: {' '.join(str(error).split())[:200]}"
        ) from error
    except Exception as error:  # pickle's own errors: not a pickle at all, or what weights_only forbids
        raise ExitError(
            ExitCode.DATA, f"{path}: refused, not a file of tensors and nothing else ({type(error).__name__})"
        ) from error
    for name in ("model", "state_dict", "teacher"):  # of MAE, of many, of DINO, whose teacher is its result
        tree = tree.get(name, tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise ExitError(ExitCode.DATA, f"{path}: not a set of named tensors")
    return with_timm_names(tree)


def with_timm_names(tensors: Weights) -> tuple[Weights, dict[str, Any]]:
    """Tensors under timm's names, and the number of heads where the origin tells it."""
    tensors = {name.removeprefix("opt/target/"): value for name, value in tensors.items()}  # with Google's optimizer
    if "Transformer/encoder_norm/scale" in tensors:
        return _from_google(tensors)
    tensors = {name.removeprefix("module.").removeprefix("backbone."): value for name, value in tensors.items()}
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors):
        return _from_hugging_face(tensors), {}
    return tensors, {}


def _from_hugging_face(tensors: Weights) -> Weights:
    weights = {}
    for name, value in tensors.items():
        name = name.removeprefix("vit.")
        for pattern, new in HUGGING_FACE_PATTERNS if not name.startswith(NON_ENCODER_PREFIXES) else ():
            name = re.sub(pattern, new, name)
        weights[name] = value
    return _merge_qkv(weights)


def _from_google(tensors: Weights) -> tuple[Weights, dict[str, Any]]:
    """JAX keeps kernels as [in, out], those of attention with an axis for heads, convolutions as [h, w, in, out]."""
    weights, metadata = {}, {}
    for name, value in tensors.items():
        for pattern, new in GOOGLE_PATTERNS:
            name = re.sub(pattern, new, name)
        is_kernel = name.endswith("kernel")
        if re.search(r"/attn/[qkv]/", name):
            metadata["heads"] = value.shape[-2]
            value = value.flatten(-2)
        elif name.endswith("/attn/proj/kernel"):
            value = value.flatten(0, 1)
        if is_kernel:
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        elif "backbone" in name:
            value = value.flatten()  # GroupNorm's are [1, 1, 1, C]
        name = re.sub(r"/(kernel|scale)$", "/weight", name).replace("/", ".")
        weights[name] = value.contiguous()
    return _merge_qkv(weights), metadata


def _merge_qkv(tensors: Weights) -> Weights:
    """With q, k and v of each block in one tensor."""
    merged = {name: value for name, value in tensors.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name in tensors:
        if ".attn.q." in name:
            parts = [tensors.get(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
            if not any(part is None for part in parts):
                merged[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([part for part in parts if part is not None])
    return merged


def infer_config(weights: Weights, source: str, metadata: dict[str, Any] | None = None) -> Vit:
    """The architecture of a ViT or hybrid from its tensors' shapes; raises ExitError(DATA) where it is not one.

    `metadata` is what is known beside the shapes. Heads leave no trace in them: unless said, those of the named size of
    this width, or one for each 64.
    """
    try:
        width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        mlp = weights["blocks.0.mlp.fc1.weight"].shape[0]
        _, tokens, _ = weights["pos_embed"].shape if "pos_embed" in weights else (1, None, width)
    except (KeyError, ValueError, IndexError) as error:
        raise ExitError(ExitCode.DATA, f"{source}: not a plain ViT under timm's names (no {error})") from error
    stem_channels = next(
        (weights[name].shape[1] for name in weights if name.endswith("backbone.stem.conv.weight")), None
    )
    if stem_channels is not None:
        channels, patch = stem_channels, 32 if any("backbone.stages.3." in name for name in weights) else 16
    heads = next((row[2] for row in SIZES.values() if row[0] == width), max(1, width // 64))
    size = next((name for name, row in SIZES.items() if row[0] == width), "B")
    class_token = "cls_token" in weights
    side = patch * round(((tokens or 2) - class_token) ** 0.5)
    values = {"size": size, "patch": patch, "image": side, "channels": channels, "width": width, "depth": depth}
    values |= {"heads": heads, "mlp": mlp, "positions": "1d" if tokens else "none", "class_token": class_token}
    values |= {"stem": "patch" if stem_channels is None else "r50", "pool": "class" if class_token else "mean"}
    try:
        return Vit.model_validate(values | (metadata or {}))
    except ValueError as error:
        raise ExitError(ExitCode.DATA, f"{source}: {' '.join(str(error).split())[:200]}") from error
