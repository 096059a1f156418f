"""Weights files as others write them, tiny, with loud random numbers: no released one can be had here."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH, HEADS, DEPTH, MLP, PATCH, SIDE = 48, 3, 2, 80, 4, 16
TIMM: dict[str, Any] = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
TIMM |= {"mlp_ratio": (MLP + 0.5) / WIDTH, "num_classes": 0}
"""timm's arguments of the ViT that most files hold; its heads are not one for each 64 of its width."""

HF: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
HF |= {"intermediate_size": MLP, "image_size": SIDE, "patch_size": PATCH}
"""The same for Hugging Face's ViTConfig."""


def randomize(model: nn.Module, seed: int = 0) -> Any:
    """A model with random parameters at which every part changes the output; in eval mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2 + scale)
    return model.eval()


def random_images(height: int = SIDE, width: int = SIDE, count: int = 2, channels: int = 3) -> Tensor:
    """Noise, uint8."""
    random = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=random)


def google_arrays(
    classes: int = 5, token: bool = True, stem: tuple[int, ...] = (), side: int = SIDE, pre_logits: bool = True
) -> dict[str, np.ndarray]:
    """Names, shapes and layout of google-research/vision_transformer's .npz, of a hybrid with a `stem` of blocks.

    Kernels are [in, out], of attention [in, heads, D/heads] and [heads, D/heads, out], of convolutions [h, w, in, out].
    """
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}

    def add_array(name: str, *shape: int, mean: float = 0.0, scale: float = 0.2) -> None:
        arrays[name] = (mean + scale * random.standard_normal(shape)).astype(np.float32)

    def dense(name: str, *shape: int, bias: tuple[int, ...] = ()) -> None:
        add_array(f"{name}/kernel", *shape)
        add_array(f"{name}/bias", *(bias or shape[-1:]))

    def norm(name: str, *shape: int) -> None:
        add_array(f"{name}/scale", *shape, mean=1.0)
        add_array(f"{name}/bias", *shape)

    head = WIDTH // HEADS
    grid = side // ((16 if len(stem) == 3 else 32) if stem else PATCH)
    if token:
        add_array("cls", 1, 1, WIDTH)
    add_array("Transformer/posembed_input/pos_embedding", 1, grid * grid + token, WIDTH)
    for number in range(DEPTH):
        block = f"Transformer/encoderblock_{number}"
        norm(f"{block}/LayerNorm_0", WIDTH)
        for part in ("query", "key", "value"):
            dense(f"{block}/MultiHeadDotProductAttention_1/{part}", WIDTH, HEADS, head, bias=(HEADS, head))
        dense(f"{block}/MultiHeadDotProductAttention_1/out", HEADS, head, WIDTH)
        norm(f"{block}/LayerNorm_2", WIDTH)
        dense(f"{block}/MlpBlock_3/Dense_0", WIDTH, MLP)
        dense(f"{block}/MlpBlock_3/Dense_1", MLP, WIDTH)
    norm("Transformer/encoder_norm", WIDTH)
    if pre_logits:
        dense("pre_logits", WIDTH, WIDTH)
    if classes:
        dense("head", WIDTH, classes)
    if not stem:
        dense("embedding", PATCH, PATCH, 3, WIDTH)
        return arrays
    add_array("conv_root/kernel", 7, 7, 3, 64)
    norm("gn_root", 64)
    in_channels = 64
    for stage, units in enumerate(stem, start=1):
        inner, out_channels = 64 * 2 ** (stage - 1), 256 * 2 ** (stage - 1)
        for unit in range(1, units + 1):
            name = f"block{stage}/unit{unit}"
            for number, shape in enumerate(
                ((1, 1, in_channels, inner), (3, 3, inner, inner), (1, 1, inner, out_channels)), start=1
            ):
                add_array(f"{name}/conv{number}/kernel", *shape)
                norm(f"{name}/gn{number}", 1, 1, 1, shape[-1])
            if unit == 1:
                add_array(f"{name}/conv_proj/kernel", 1, 1, in_channels, out_channels)
                norm(f"{name}/gn_proj", 1, 1, 1, out_channels)
            in_channels = out_channels
    dense("embedding", 1, 1, in_channels, WIDTH)
    return arrays


def write_google(path: Path, **options: Any) -> dict[str, np.ndarray]:
    """The file, and what is in it."""
    arrays = google_arrays(**options)
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return arrays


def headless_state_dict(timm_model: nn.Module) -> dict[str, Tensor]:
    """A ViT's tensors as DINO's and MAE's code name them, which is as timm does, without a head."""
    return {name: value for name, value in timm_model.state_dict().items() if not name.startswith("head.")}


def mae_checkpoint(timm_model: nn.Module, decoder: int = 32) -> dict[str, Any]:
    """What facebookresearch/mae saves in pretraining: the whole autoencoder, and the command beside it."""
    weights = headless_state_dict(timm_model)
    patches = weights["pos_embed"].shape[1]
    random = torch.Generator().manual_seed(2)
    shapes: dict[str, tuple[int, ...]] = {"mask_token": (1, 1, decoder), "decoder_pos_embed": (1, patches, decoder)}
    layers = {"decoder_embed": (decoder, WIDTH), "decoder_pred": (PATCH * PATCH * 3, decoder)}
    block = "decoder_blocks.0"
    layers |= {f"{block}.attn.qkv": (3 * decoder, decoder), f"{block}.attn.proj": (decoder, decoder)}
    layers |= {f"{block}.mlp.fc1": (4 * decoder, decoder), f"{block}.mlp.fc2": (decoder, 4 * decoder)}
    layers |= dict.fromkeys((f"{block}.norm1", f"{block}.norm2", "decoder_norm"), (decoder,))
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights |= {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    args = argparse.Namespace(model="mae_vit_base_patch16", mask_ratio=0.75, norm_pix_loss=True, blr=1.5e-4)
    return {"model": weights, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "epoch": 799, "args": args}


def dino_checkpoint(teacher: nn.Module, student: nn.Module) -> dict[str, Any]:
    """DINO's full checkpoint: a student in DDP, a teacher that is the result, their heads, the command."""
    random = torch.Generator().manual_seed(3)

    def prefixed_weights(model: nn.Module, prefix: str) -> dict[str, Tensor]:
        weights = {f"{prefix}backbone.{name}": value for name, value in headless_state_dict(model).items()}
        shapes = {"mlp.0.weight": (64, WIDTH), "mlp.0.bias": (64,), "mlp.2.weight": (64, 64), "mlp.2.bias": (64,)}
        shapes |= {"mlp.4.weight": (32, 64), "mlp.4.bias": (32,)}
        shapes |= {"last_layer.weight_g": (128, 1), "last_layer.weight_v": (128, 32)}
        return weights | {f"{prefix}head.{name}": torch.randn(s, generator=random) for name, s in shapes.items()}

    args = argparse.Namespace(arch="vit_small", patch_size=16, local_crops_scale=(0.05, 0.4), gpu=0, use_fp16=True)
    checkpoint = {"student": prefixed_weights(student, "module."), "teacher": prefixed_weights(teacher, "")}
    state = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 100, "args": args}
    return checkpoint | state | {"dino_loss": {"center": torch.zeros(1, 128)}, "fp16_scaler": {"scale": 65536.0}}
