"""Who takes part: our step, the same without each of its levers, its matrix products, timm's and Hugging Face's."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit import recipes
from ssl_vit.encoders import layers
from ssl_vit.encoders import layers as encoder_layers
from ssl_vit.encoders.export import as_hugging_face, tensors
from ssl_vit.encoders.vit import Cut, Vit, VitEncoder, at
from ssl_vit.heads.masked_prediction import Masked
from ssl_vit.model import Batch, Edit, Model
from ssl_vit.runtime import uses_bf16
from ssl_vit.train.engine import prepare
from ssl_vit.train.launch import start
from ssl_vit.train.loop import Task, update
from ssl_vit.train.metrics import Window
from ssl_vit.train.prepare import outfit, pin
from tools.benchmarks.racing import Row, grid, race

Step = Callable[[], object]
Rivals = dict[str, Callable[[], Step]]


def ours(made: recipes.Recipe, model: Model, batch: Batch, output: Path) -> Step:
    """The loop's own step on a batch of `made.batch` images, or of the micro batch that they are."""
    alone = made.model_copy(update={"batch": len(batch["image"]), "micro_batch": None})
    accelerator = start(alone.asked(made.optim.clip, world=1), "none", output)
    outfit(model.to(accelerator.device), accelerator, made.precision, made.compile, made.activation_checkpointing)
    engine = prepare(accelerator, model, made.optim, {})
    task = Task(model, stream=None, optim=made.optim)  # type: ignore[arg-type]  # a step asks no stream
    batches: Iterator[Batch] = repeat(batch)
    return lambda: update(accelerator, alone, task, engine, batches, Window(), 0)


def rivals(made: recipes.Recipe, model: Model, batch: Batch, compiled: bool = False) -> Rivals:
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


def _ways(who: str, build: Callable[[], nn.Module], made: recipes.Recipe, batch: Batch, compiled: bool) -> Rivals:
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


def autocast(made: recipes.Recipe, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
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


Change = Callable[[Model], None]


def without_levers(made: recipes.Recipe, model: Model, batch: Batch, output: Path) -> Rivals:
    """What builds our step with one thing changed, by what that is."""

    fresh = copy.deepcopy(model)  # the given one may have been compiled when these are built

    def step(change: Change | None = None, **keys: Any) -> Step:
        mine, asked = copy.deepcopy(fresh), made.model_copy(update=keys)
        if change is not None:
            change(mine)
        return ours(asked, mine, batch, output)

    found: Rivals = {
        "last block for all tokens": partial(step, whole_last_block),
        "norm and head for all tokens": partial(step, whole_head),
        "activation checkpointing": partial(step, activation_checkpointing=True),
        "loss read every step": lambda: reading(step()),
        "AdamW not fused": lambda: unfused(step),
    }
    if batch["image"].is_cuda:
        return found | {
            "not compiled": partial(step, compile=False),
            "patches by convolution": partial(step, convolved),
            "bf16_residual": partial(step, precision="bf16_residual"),
            "fp32 (TF32 as torch has it)": partial(step, precision="fp32"),
            **{f"attention={name}": lambda name=name: pinned(step(), name) for name in ("efficient", "cudnn", "math")},
        }
    threads = torch.get_num_threads()
    return found | {
        "linear layers by MKL": lambda: changed_step(step(), partial(setattr, layers, "ONEDNN"), False, layers.ONEDNN),
        "one thread": lambda: changed_step(step(), torch.set_num_threads, 1, threads),
    }


def whole_last_block(model: Model) -> None:
    """Every token through the last block, then those that are asked for."""
    through = model.encoder.through

    def all_of_them(block: nn.Module, x: Tensor, select: Tensor | None = None) -> Tensor:
        x = through(block, x)
        return x if select is None else at(x, select)

    model.encoder.through = all_of_them


def whole_head(model: Model) -> None:
    """Every token through the last block, the last norm and the head, then those that are asked for."""
    encoder, layer, asked = model.encoder, model.head.linear, []
    whole = encoder.forward

    def forward(image: Tensor, edit: Any = None, select: Tensor | None = None) -> Tensor:
        asked[:] = [select]
        return whole(image, edit)

    encoder.forward = forward
    layer.register_forward_hook(lambda _layer, _given, out: at(out, asked[0]))


def convolved(model: Model) -> None:
    """The patch embedding as a convolution."""
    cut: Cut = model.encoder.patch_embed.proj
    cut.forward = partial(nn.Conv2d.forward, cut)  # type: ignore[method-assign]


def reading(step: Step) -> Step:
    """The loss is waited for."""
    return lambda: step()[0].item()  # type: ignore[index]


def unfused(build: Callable[..., Step]) -> Step:
    """torch's default AdamW, which cannot skip an update by a flag: the norm is waited for."""
    from ssl_vit.train.engine import Engine

    can, Engine._can_fuse = Engine._can_fuse, lambda self: False  # type: ignore[method-assign]
    try:
        made = torch.optim.AdamW
        torch.optim.AdamW = lambda *given, **keys: made(*given, **{**keys, "fused": None})  # type: ignore
        return build()
    finally:
        torch.optim.AdamW, Engine._can_fuse = made, can  # type: ignore


def pinned(step: Step, name: Any) -> Step:
    """Another kernel for attention."""
    return changed_step(step, pin, name, "auto")


def changed_step(step: Step, change: Callable[[Any], object], during: Any, after: Any) -> Step:
    """A step during which something of the process is otherwise."""

    def changed() -> object:
        change(during)
        try:
            return step()
        finally:
            change(after)

    return changed


def matrix_products(made: recipes.Recipe, device: torch.device, half: bool) -> dict[str, Step]:
    """By torch.mm, and on a CPU by oneDNN too: forward, and both gradients of each."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if half else torch.float32
    shapes, heads = linear_shapes(made), attention_shape(made)
    pairs = [
        (draw_matrix(rows, given, device, dtype), draw_matrix(out, given, device, dtype))
        for rows, given, out, _ in shapes
    ]
    counts = [count for *_, count in shapes]
    queries, weights = draw_matrix(*heads[1:], device, dtype), None
    queries = queries.expand(heads[0], -1, -1).contiguous()
    weights = queries @ queries.transpose(1, 2)

    def attend() -> None:
        for _ in range(made.encoder.numbers[1]):  # type: ignore[union-attr]
            for _ in range(3):  # forward, and both gradients
                torch.bmm(queries, queries.transpose(1, 2), out=weights)
                torch.bmm(weights, queries)

    outs = [torch.empty(len(x), len(w), device=device, dtype=dtype) for x, w in pairs]
    first = [(torch.empty_like(x), torch.empty_like(w)) for x, w in pairs]

    def by_torch() -> None:
        for (x, w), count, made_, (dx, dw) in zip(pairs, counts, outs, first, strict=True):
            for _ in range(count):
                torch.mm(x, w.t(), out=made_)
                torch.mm(made_, w, out=dx)
                torch.mm(made_.t(), x, out=dw)
        attend()

    def by_onednn() -> None:
        for (x, w), count, made_ in zip(pairs, counts, outs, strict=True):
            for _ in range(count):
                encoder_layers.linear(x, w, None)
                encoder_layers.linear(made_, w.t(), None)
                encoder_layers.linear(made_.t(), x.t(), None)
        attend()

    found: dict[str, Step] = {"products": by_torch}
    return found | ({"products by oneDNN": by_onednn} if device.type == "cpu" and encoder_layers.ONEDNN else {})


def product_rates(made: recipes.Recipe, device: torch.device, half: bool, rounds: int, steps: int) -> Iterator[Row]:
    """TFLOP/s of each product of a step: forward, for what was given, for the weight."""
    dtype = torch.bfloat16 if half else torch.float32
    for rows, given, out, _ in linear_shapes(made):
        x, w, y = (draw_matrix(*shape, device, dtype) for shape in ((rows, given), (out, given), (rows, out)))
        ways: dict[str, Step] = {
            "forward": partial(torch.mm, x, w.t()),
            "gradient of the input": partial(torch.mm, y, w),
            "gradient of the weight": partial(torch.mm, y.t(), x),
        }
        for who, times in race(ways, rounds, steps, device).items():
            case = f"{rows} x {given} x {out} {dtype} {device.type}".replace("torch.", "")
            rate = 2 * rows * given * out / median(times) / 1e12
            spread = [round(2 * rows * given * out / one / 1e12, 4) for one in (max(times), min(times))]
            yield {"benchmark": "product", "case": case, "who": who, "tflops": round(rate, 4), "tflops_spread": spread}


def draw_matrix(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A random matrix."""
    return torch.randn(rows, columns, device=device, dtype=dtype)


def linear_shapes(made: recipes.Recipe) -> list[tuple[int, int, int, int]]:
    """(rows, in, out, how often) of the linear layers of a ViT and of its head, on all tokens but for the head."""
    vit, head = made.encoder, made.head
    assert isinstance(vit, Vit)
    width, depth, _, mlp = vit.numbers
    patches = vit.grid[0] * vit.grid[1]
    tokens = made.batch * (vit.prefix + patches)
    shapes = [(made.batch * patches, vit.channels * vit.patch**2, width, 1)]
    shapes += [(tokens, width, 3 * width, depth), (tokens, width, width, depth)]
    shapes += [(tokens, width, mlp, depth), (tokens, mlp, width, depth)]
    if isinstance(head, Masked):
        shapes.append((made.batch * sum(head.counts(vit.grid)), width, 512, 1))
    return shapes


def attention_shape(made: recipes.Recipe) -> tuple[int, int, int]:
    """Heads of all images, tokens, width of a head."""
    vit = made.encoder
    assert isinstance(vit, Vit)
    width, _, heads, _ = vit.numbers
    return made.batch * heads, vit.prefix + vit.grid[0] * vit.grid[1], width // heads


def table_of_products(rows: list[Row]) -> str:
    """The rows for reading."""
    lines = [
        [r["case"], r["who"], f"{r['tflops']:.3f}", "-".join(f"{one:.3f}" for one in r["tflops_spread"])] for r in rows
    ]
    return grid(["product of rows x in x out", "", "TFLOP/s", "spread"], lines)
