"""Who takes part: our step, the same without each of its levers, its matrix products, timm's and Hugging Face's."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit import recipes
from ssl_vit.distributed import Distributed
from ssl_vit.encoders import layers
from ssl_vit.encoders import layers as encoder_layers
from ssl_vit.encoders.export import export_tensors, to_hugging_face_names
from ssl_vit.encoders.vit import PatchConv2d, Vit, VitEncoder, gather_tokens
from ssl_vit.heads.masked_prediction import MaskedPrediction
from ssl_vit.model import Batch, Edit, Model
from ssl_vit.runtime import uses_bf16
from ssl_vit.train.engine import prepare_engine
from ssl_vit.train.launch import start_accelerator
from ssl_vit.train.loop import TrainingTask, optimizer_step
from ssl_vit.train.metrics import StepMetrics
from ssl_vit.train.prepare import prepare_model, set_attention_kernel
from tools.benchmarks.timing import Row, format_table, race

Step = Callable[[], object]
Rivals = dict[str, Callable[[], Step]]


def ssl_vit_step(recipe: recipes.Recipe, model: Model, batch: Batch, output: Path) -> Step:
    """The loop's own step on a batch of `made.batch` images, or of the micro batch that they are."""
    single_recipe = recipe.model_copy(update={"batch": len(batch["image"]), "micro_batch": None})
    accelerator = start_accelerator(single_recipe.launch_settings(recipe.optim.clip, world=1), "none", output)
    prepare_model(
        model.to(accelerator.device), accelerator, recipe.precision, recipe.compile, recipe.activation_checkpointing
    )
    state, batches = bare_state(accelerator, single_recipe, model), repeat(batch)
    return lambda: optimizer_step(state, batches)


def bare_state(accelerator: Any, config: Any, model: Model) -> Any:
    """What an optimizer step needs of a TrainState, for a model that is prepared."""
    return SimpleNamespace(
        config=config,
        task=TrainingTask(model, stream=None, optim=config.optim),  # type: ignore[arg-type]  # a step reads no stream
        accelerator=accelerator,
        processes=Distributed.from_accelerator(accelerator),
        engine=prepare_engine(accelerator, model, config.optim),
        metrics=StepMetrics(),
        step=config.optim.warmup_steps,  # the learning rate is at its peak
        batch_index=0,
    )


def rivals(recipe: recipes.Recipe, model: Model, batch: Batch, compiled: bool = False) -> Rivals:
    """What builds each rival that is installed, with `model`'s weights, and gives its step; none but for a plain ViT.

    Each in the loop that one writes first, with torch's default AdamW and the loss read every step, and at its best:
    fused AdamW, nothing read, and if asked for compiled as a whole.
    """
    builders: Rivals = {}
    if not isinstance(recipe.encoder, Vit) or recipe.encoder.stem != "patch" or recipe.encoder.positions != "1d":
        return builders
    if find_spec("timm"):
        build_rival = partial(timm_model, copy.deepcopy(model).cpu())
        builders |= _variants("timm", build_rival, recipe, batch, compiled)
    if find_spec("transformers"):
        build_rival = partial(HuggingFace, copy.deepcopy(model.encoder).cpu(), batch["image"].shape[0])
        builders |= _variants("Hugging Face", build_rival, recipe, batch, compiled)
    return builders


def _variants(
    name: str, build: Callable[[], nn.Module], recipe: recipes.Recipe, batch: Batch, compiled: bool
) -> Rivals:
    def step(fused: bool, compile_model: bool) -> Step:
        model = build().to(batch["image"].device)
        if compile_model:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optim.lr, fused=True if fused else None)
        return simple_step(model, repeat(batch), optimizer, autocast(recipe, batch["image"].device), read=not fused)

    variants = {name: partial(step, False, False), f"{name}, fused AdamW": partial(step, True, False)}
    return variants | ({f"{name}, compiled": partial(step, True, True)} if compiled else {})


def simple_step(
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


def autocast(recipe: recipes.Recipe, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """bf16 where the recipe has it."""
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=uses_bf16(recipe.precision))


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
        width, depth, heads, mlp = vit.dims
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
        return x if select is None else gather_tokens(x, select)


class HuggingFace(nn.Module):
    """`ViTForMaskedImageModeling`, half of the patches of each image masked."""

    masked: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: VitEncoder, images: int):
        from transformers import ViTConfig, ViTForMaskedImageModeling

        super().__init__()
        vit: Vit = encoder.config
        width, depth, heads, mlp = vit.dims
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
        self.model.vit.load_state_dict(
            to_hugging_face_names(export_tensors(encoder)), strict=False
        )  # it has a mask token besides
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


Change = Callable[[Model], None]


def ablations(recipe: recipes.Recipe, model: Model, batch: Batch, output: Path) -> Rivals:
    """What builds our step with one thing changed, by what that is."""

    pristine = copy.deepcopy(model)  # the given one may have been compiled when these are built

    def step(change: Change | None = None, **keys: Any) -> Step:
        replica, variant = copy.deepcopy(pristine), recipe.model_copy(update=keys)
        if change is not None:
            change(replica)
        return ssl_vit_step(variant, replica, batch, output)

    builders: Rivals = {
        "last block for all tokens": partial(step, whole_last_block),
        "norm and head for all tokens": partial(step, whole_head),
        "activation checkpointing": partial(step, activation_checkpointing=True),
        "loss read every step": lambda: read_loss(step()),
        "AdamW not fused": lambda: unfused_step(step),
    }
    if batch["image"].is_cuda:
        return builders | {
            "not compiled": partial(step, compile=False),
            "patches by convolution": partial(step, use_convolution),
            "bf16_residual": partial(step, precision="bf16_residual"),
            "fp32 (TF32 as torch has it)": partial(step, precision="fp32"),
            **{
                f"attention={name}": lambda name=name: pin_step(step(), name) for name in ("efficient", "cudnn", "math")
            },
        }
    threads = torch.get_num_threads()
    return builders | {
        "linear layers by MKL": lambda: changed_step(step(), partial(setattr, layers, "ONEDNN"), False, layers.ONEDNN),
        "one thread": lambda: changed_step(step(), torch.set_num_threads, 1, threads),
    }


def whole_last_block(model: Model) -> None:
    """Every token through the last block, then those that are asked for."""
    run_block = model.encoder.run_block

    def run_all_tokens(block: nn.Module, x: Tensor, select: Tensor | None = None) -> Tensor:
        x = run_block(block, x)
        return x if select is None else gather_tokens(x, select)

    model.encoder.run_block = run_all_tokens


def whole_head(model: Model) -> None:
    """Every token through the last block, the last norm and the head, then those that are asked for."""
    encoder, layer, selected = model.encoder, model.head.linear, []
    full_forward = encoder.forward

    def forward(image: Tensor, edit: Any = None, select: Tensor | None = None) -> Tensor:
        selected[:] = [select]
        return full_forward(image, edit)

    encoder.forward = forward
    layer.register_forward_hook(lambda _layer, _inputs, out: gather_tokens(out, selected[0]))


def use_convolution(model: Model) -> None:
    """The patch embedding as a convolution."""
    proj: PatchConv2d = model.encoder.patch_embed.proj
    proj.forward = partial(nn.Conv2d.forward, proj)  # type: ignore[method-assign]


def read_loss(step: Step) -> Step:
    """The loss is waited for."""
    return lambda: step()[0].item()  # type: ignore[index]


def unfused_step(build: Callable[..., Step]) -> Step:
    """torch's default AdamW, which cannot skip an update by a flag: the norm is waited for."""
    from ssl_vit.train.engine import Engine

    can_fuse, Engine._can_fuse = Engine._can_fuse, lambda self: False  # type: ignore[method-assign]
    try:
        adamw = torch.optim.AdamW
        torch.optim.AdamW = lambda *args, **keys: adamw(*args, **{**keys, "fused": None})  # type: ignore
        return build()
    finally:
        torch.optim.AdamW, Engine._can_fuse = adamw, can_fuse  # type: ignore


def pin_step(step: Step, name: Any) -> Step:
    """Another kernel for attention."""
    return changed_step(step, set_attention_kernel, name, "auto")


def changed_step(step: Step, change: Callable[[Any], object], during: Any, after: Any) -> Step:
    """A step during which something of the process is otherwise."""

    def changed() -> object:
        change(during)
        try:
            return step()
        finally:
            change(after)

    return changed


def matrix_products(recipe: recipes.Recipe, device: torch.device, bf16: bool) -> dict[str, Step]:
    """By torch.mm, and on a CPU by oneDNN too: forward, and both gradients of each."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if bf16 else torch.float32
    shapes, heads = linear_shapes(recipe), attention_shape(recipe)
    pairs = [
        (draw_matrix(rows, in_features, device, dtype), draw_matrix(out_features, in_features, device, dtype))
        for rows, in_features, out_features, _ in shapes
    ]
    counts = [count for *_, count in shapes]
    queries, weights = draw_matrix(*heads[1:], device, dtype), None
    queries = queries.expand(heads[0], -1, -1).contiguous()
    weights = queries @ queries.transpose(1, 2)

    def attend() -> None:
        for _ in range(recipe.encoder.dims[1]):  # type: ignore[union-attr]
            for _ in range(3):  # forward, and both gradients
                torch.bmm(queries, queries.transpose(1, 2), out=weights)
                torch.bmm(weights, queries)

    outs = [torch.empty(len(x), len(w), device=device, dtype=dtype) for x, w in pairs]
    gradients = [(torch.empty_like(x), torch.empty_like(w)) for x, w in pairs]

    def by_torch() -> None:
        for (x, w), count, product, (dx, dw) in zip(pairs, counts, outs, gradients, strict=True):
            for _ in range(count):
                torch.mm(x, w.t(), out=product)
                torch.mm(product, w, out=dx)
                torch.mm(product.t(), x, out=dw)
        attend()

    def by_onednn() -> None:
        for (x, w), count, product in zip(pairs, counts, outs, strict=True):
            for _ in range(count):
                encoder_layers.linear(x, w, None)
                encoder_layers.linear(product, w.t(), None)
                encoder_layers.linear(product.t(), x.t(), None)
        attend()

    steps: dict[str, Step] = {"products": by_torch}
    return steps | ({"products by oneDNN": by_onednn} if device.type == "cpu" and encoder_layers.ONEDNN else {})


def product_rates(recipe: recipes.Recipe, device: torch.device, bf16: bool, rounds: int, steps: int) -> Iterator[Row]:
    """TFLOP/s of each product of a step: forward, for what was given, for the weight."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    for rows, in_features, out_features, _ in linear_shapes(recipe):
        x, w, y = (
            draw_matrix(*shape, device, dtype)
            for shape in ((rows, in_features), (out_features, in_features), (rows, out_features))
        )
        products: dict[str, Step] = {
            "forward": partial(torch.mm, x, w.t()),
            "gradient of the input": partial(torch.mm, y, w),
            "gradient of the weight": partial(torch.mm, y.t(), x),
        }
        for name, times in race(products, rounds, steps, device).items():
            case = f"{rows} x {in_features} x {out_features} {dtype} {device.type}".replace("torch.", "")
            rate = 2 * rows * in_features * out_features / median(times) / 1e12
            spread = [
                round(2 * rows * in_features * out_features / seconds / 1e12, 4) for seconds in (max(times), min(times))
            ]
            yield {"benchmark": "product", "case": case, "who": name, "tflops": round(rate, 4), "tflops_spread": spread}


def draw_matrix(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A random matrix."""
    return torch.randn(rows, columns, device=device, dtype=dtype)


def linear_shapes(recipe: recipes.Recipe) -> list[tuple[int, int, int, int]]:
    """(rows, in, out, how often) of the linear layers of a ViT and of its head, on all tokens but for the head."""
    vit, head = recipe.encoder, recipe.head
    assert isinstance(vit, Vit)
    width, depth, _, mlp = vit.dims
    patches = vit.grid[0] * vit.grid[1]
    tokens = recipe.batch * (vit.prefix + patches)
    shapes = [(recipe.batch * patches, vit.channels * vit.patch**2, width, 1)]
    shapes += [(tokens, width, 3 * width, depth), (tokens, width, width, depth)]
    shapes += [(tokens, width, mlp, depth), (tokens, mlp, width, depth)]
    if isinstance(head, MaskedPrediction):
        shapes.append((recipe.batch * sum(head.counts(vit.grid)), width, 512, 1))
    return shapes


def attention_shape(recipe: recipes.Recipe) -> tuple[int, int, int]:
    """Heads of all images, tokens, width of a head."""
    vit = recipe.encoder
    assert isinstance(vit, Vit)
    width, _, heads, _ = vit.dims
    return recipe.batch * heads, vit.prefix + vit.grid[0] * vit.grid[1], width // heads


def product_table(rows: list[Row]) -> str:
    """The rows for reading."""
    lines = [
        [r["case"], r["who"], f"{r['tflops']:.3f}", "-".join(f"{rate:.3f}" for rate in r["tflops_spread"])]
        for r in rows
    ]
    return format_table(["product of rows x in x out", "", "TFLOP/s", "spread"], lines)
