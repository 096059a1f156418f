"""What a forward pass leaves in memory for the backward pass, found without a machine that could hold it.

Fake tensors have a shape, a device and no content: the code of the training runs on them as it is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssl_vit.model import Model


@dataclass(frozen=True)
class SavedTensors:
    """What autograd keeps of a forward pass, without what the model itself holds."""

    storages: list[tuple[int, int]]  # of each: the block that it was kept in, -1 for none, and its bytes
    inputs: list[int]  # bytes of what each block was given

    @property
    def bytes(self) -> int:
        """Of all."""
        return sum(size for _, size in self.storages)

    def of_block(self, number: int) -> int:
        """Bytes that a block keeps, by its number; -1 for what is outside of them."""
        return sum(size for block, size in self.storages if block == number)


def record_saved_tensors(module: nn.Module, blocks: Sequence[nn.Module], run: Callable[[], object]) -> SavedTensors:
    """What autograd keeps while `run` passes a module; real tensors are seen as well as fake ones."""
    storages: dict[int, tuple[int, int]] = {}  # by storage
    current_block, inputs = [-1], []
    keep_alive: list[Any] = []  # an address must not be given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, (current_block[0], storage.nbytes()))
        keep_alive.append(storage)
        return tensor

    def enter(number: int, _block: nn.Module, args: tuple[Any, ...]) -> None:
        current_block[0] = number
        inputs.append(args[0].untyped_storage().nbytes())

    def leave(*_: Any) -> None:
        current_block[0] = -1

    hooks = [block.register_forward_pre_hook(partial(enter, number)) for number, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    own_storages = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    for hook in hooks:
        hook.remove()
    return SavedTensors([entry for storage, entry in storages.items() if storage not in own_storages], inputs)


@contextmanager
def fake_device(device: str, bf16: bool) -> Iterator[None]:
    """Tensors made meanwhile are fake ones of a device, cpu or cuda, that need not be there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    attention = FlashAttentionMode() if device == "cuda" else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), attention:
        torch.set_autocast_enabled(device, bf16)  # torch.autocast does nothing on a machine without GPU
        torch.set_autocast_dtype(device, torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled(device, False)
            torch.clear_autocast_cache()


class FlashAttentionMode(TorchFunctionMode):
    """Attention as a GPU computes it, also where there is none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and len(args) == 3 and not (kwargs or {}).get("attn_mask"):
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


def saved_activation_bytes(
    build: Callable[[], Model], size: tuple[int, int, int], device: str, bf16: bool
) -> tuple[int, int]:
    """Bytes that a training's forward pass keeps, head and loss included, of `size` images, height and width; eager.

    And of the block that keeps most, where checkpointing computes it again. To the byte what autograd keeps on a CPU.
    """
    images, height, width = size
    with torch.device("meta"):
        model = build()
    with fake_device(device, bf16):
        model.to_empty(device=device)
        if getattr(model.head, "mix", None) is not None:
            model.head.mix = partial(_fake_mixup, model.head.layers[-1].out_features)
        batch = {
            "image": torch.empty(images, model.encoder.channels, height, width, dtype=torch.uint8),
            "label": torch.empty(images, dtype=torch.int64),
            "seed": torch.empty(images, dtype=torch.int64),
            "valid": torch.empty(images, dtype=torch.bool),
        }
        run = partial(model, batch)
        blocks = list(model.encoder.blocks)
        saved = record_saved_tensors(model, blocks, run).bytes
        if not model.encoder.activation_checkpointing:
            return saved, 0
        model.encoder.activation_checkpointing = False
        full = record_saved_tensors(model, blocks, run)
    return saved, max(map(full.of_block, range(len(blocks))), default=0)


def _fake_mixup(classes: int, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """In place of mixup, which looks at numbers: other images and soft targets of its shapes."""
    return image.float(), torch.empty(len(label), classes)
