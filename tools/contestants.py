"""Who takes part where a training step is measured: our loop's own, and rivals with our weights on the same batch.

timm's ViT has our head, and so our mathematics. Hugging Face's `ViTForMaskedImageModeling` has its own, SimMIM's, a
linear decoder to pixels and an L1 loss; its encoder is the same.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit import recipe
from ssl_vit.encoders.export import as_hugging_face, tensors
from ssl_vit.encoders.vit import Vit, VitEncoder, at
from ssl_vit.model import Batch, Edit, Model
from ssl_vit.train.engine import prepare
from ssl_vit.train.environment import uses_bf16
from ssl_vit.train.launch import start
from ssl_vit.train.loop import Task, update
from ssl_vit.train.outfit import outfit
from ssl_vit.train.window import Window

Step = Callable[[], object]
Rivals = dict[str, Callable[[], Step]]


def ours(made: recipe.Recipe, model: Model, batch: Batch, output: Path) -> Step:
    """The loop's own step on a batch of `made.batch` images, or of the micro batch that they are."""
    alone = made.model_copy(update={"batch": len(batch["image"]), "micro_batch": None})
    accelerator = start(alone.asked(made.optim.clip, world=1), "none", output)
    outfit(model.to(accelerator.device), accelerator, made.precision, made.compile, made.activation_checkpointing)
    engine = prepare(accelerator, model, made.optim, {})
    task = Task(model, stream=None, optim=made.optim)  # type: ignore[arg-type]  # a step asks no stream
    batches: Iterator[Batch] = repeat(batch)
    return lambda: update(accelerator, alone, task, engine, batches, Window(), 0)


def rivals(made: recipe.Recipe, model: Model, batch: Batch, compiled: bool = False) -> Rivals:
    """What builds each rival that is installed, with `model`'s weights, and gives its step; none but for a plain ViT.

    Each in the loop that one writes first, with torch's default AdamW and the loss read every step, and at its best:
    fused AdamW, nothing read, and if asked for compiled as a whole.
    """
    found: Rivals = {}
    if not isinstance(made.encoder, Vit) or made.encoder.stem != "patch" or made.encoder.positions != "1d":
        return found
    if find_spec("timm"):
        theirs = partial(timm_model, copy.deepcopy(model).cpu())
        found |= _ways("timm", theirs, made, batch, compiled)
    if find_spec("transformers"):
        theirs = partial(HuggingFace, copy.deepcopy(model.encoder).cpu(), batch["image"].shape[0])
        found |= _ways("Hugging Face", theirs, made, batch, compiled)
    return found


def _ways(who: str, build: Callable[[], nn.Module], made: recipe.Recipe, batch: Batch, compiled: bool) -> Rivals:
    def step(best: bool, graph: bool) -> Step:
        model = build().to(batch["image"].device)
        if graph:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=made.optim.lr, fused=True if best else None)
        return simple(model, repeat(batch), optimizer, autocast(made, batch["image"].device), read=not best)

    ways = {who: partial(step, False, False), f"{who}, fused AdamW": partial(step, True, False)}
    return ways | ({f"{who}, compiled": partial(step, True, True)} if compiled else {})


def simple(
    model: nn.Module,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    cast: Callable[[], AbstractContextManager[Any]],
    clip: float | None = 1.0,
    read: bool = False,
) -> Step:
    """The plain loop of torch's tutorials, around a model that maps a batch to a loss; with `read` it is waited for."""

    def step() -> object:
        optimizer.zero_grad()
        with cast():
            loss = model(next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), float("inf") if clip is None else clip)
        optimizer.step()
        return loss.item() if read else loss.detach()

    return step


def autocast(made: recipe.Recipe, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """bf16 where the recipe has it."""
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=uses_bf16(made.precision))


class Loss(nn.Module):
    """A model whose call gives the loss alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch).loss


def timm_model(model: Model) -> nn.Module:
    """A timm ViT of the same size with the same weights and the same head."""
    return Loss(Model(TimmEncoder(model.encoder), copy.deepcopy(model.head)))


class TimmEncoder(nn.Module):
    """A timm ViT behind our encoder contract, composed of timm's own modules."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: VitEncoder):
        import timm

        super().__init__()
        vit: Vit = encoder.config
        width, depth, heads, mlp = vit.numbers
        self.config, self.prefix, self.channels = vit, encoder.prefix, vit.channels
        self.vit: Any = timm.create_model(
            "vit_base_patch16_224",
            img_size=vit.image_hw,
            patch_size=vit.patch,
            in_chans=vit.channels,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp / width,
            num_classes=0,
            class_token=vit.class_token,
            global_pool="token" if vit.class_token else "avg",
            fc_norm=False,
        )
        self.vit.load_state_dict(encoder.state_dict())
        self.register_buffer("mean", encoder.mean.clone(), persistent=False)
        self.register_buffer("std", encoder.std.clone(), persistent=False)

    def forward(self, image: Tensor, edit: Edit | None = None, select: Tensor | None = None) -> Tensor:
        patches = self.vit.patch_embed((image.float() / 255 - self.mean) / self.std)
        patches = edit(patches) if edit else patches
        x: Tensor = self.vit.norm(self.vit.blocks(self.vit._pos_embed(patches)))
        return x if select is None else at(x, select)


class HuggingFace(nn.Module):
    """`ViTForMaskedImageModeling`, half of the patches of each image masked."""

    masked: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: VitEncoder, images: int):
        from transformers import ViTConfig, ViTForMaskedImageModeling

        super().__init__()
        vit: Vit = encoder.config
        width, depth, heads, mlp = vit.numbers
        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp,
            image_size=vit.image_hw[0],
            patch_size=vit.patch,
            encoder_stride=vit.patch,  # type: ignore[call-arg]
            num_channels=vit.channels,
            layer_norm_eps=1e-6,
            hidden_dropout_prob=0.0,
        )
        self.model: Any = ViTForMaskedImageModeling(config)
        self.model.vit.load_state_dict(as_hugging_face(tensors(encoder)), strict=False)  # it has a mask token besides
        self.register_buffer("mean", encoder.mean.clone(), persistent=False)
        self.register_buffer("std", encoder.std.clone(), persistent=False)
        patches = encoder.grid[0] * encoder.grid[1]
        masked = torch.rand(images, patches).argsort(1) < patches // 2
        self.register_buffer("masked", masked, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        pixels = (batch["image"].float() / 255 - self.mean) / self.std
        return self.model(pixels, bool_masked_pos=self.masked).loss

    def tokens(self, image: Tensor) -> Tensor:
        """Its encoder's output, for comparison."""
        return self.model.vit((image.float() / 255 - self.mean) / self.std).last_hidden_state
