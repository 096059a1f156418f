"""Engines: one process, DDP, FSDP2 and DeepSpeed's ZeRO, behind one update and one whole state.

Whatever an engine does with parameters, what it gives and takes is the state of an unsharded model, named by parameter:
so a checkpoint of one engine and world size is a checkpoint of all, and an export needs no engine.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssl_vit.model import Tensors
from ssl_vit.train.metrics import local_tensor, squared_norms
from ssl_vit.train.optim import Optim

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare_engine(accelerator: "Accelerator", model: nn.Module, optim: Optim) -> "Engine":
    """Wrap a model in the engine that was launched, with an optimizer before its first step."""
    from accelerate.utils import DistributedType

    engine_class = Zero if accelerator.distributed_type == DistributedType.DEEPSPEED else Engine
    return engine_class(accelerator, model, optim)


class Engine:
    """One process, DDP or FSDP2: torch's optimizer on parameters that are whole, or a DTensor's share."""

    def __init__(self, accelerator: "Accelerator", model: nn.Module, optim: Optim):
        self.optimizer, self.state_keys = optim.build(model), optim.state
        self.model: Any
        self.model, self._prepared_optimizer = accelerator.prepare(model, self.optimizer)
        # as they are now: FSDP2 puts gathered ones into the modules from a forward pass to its backward pass
        self.parameters = dict(model.named_parameters())
        self.trainable = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self._fused, self._is_main = self._can_fuse(), accelerator.is_main_process
        self._init_optimizer_state()

    def step(self, clip: float | None) -> Tensor:
        """After the backward passes: clip, update, forget the gradients; returns their global norm before clipping.

        Where the norm is not finite, nothing is updated. It is the norm of averaged gradients, so every process skips
        the same updates; the fused optimizers do so by a flag that stays on the device.
        """
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        norm = full_tensor(nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip))
        if self._fused:
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        if self._fused or norm.isfinite():
            self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad()
        return norm

    def gradients(self, compute_value: Callable[[], Tensor]) -> list[Tensor]:
        """This process's part of the gradient of a value, which `value` computes by the wrapped model.

        Of every learned parameter, zeros where the value does not depend on it. No update follows, and nothing is left
        behind. Averaged over processes where parameters are cut over them, as FSDP2 does it; else this process's own.
        """
        if self.replicated:
            with getattr(self.model, "no_sync", nullcontext)():
                return self._differentiate(compute_value())
        compute_value().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainable.values()]
        self._prepared_optimizer.zero_grad()
        return [local_tensor(gradient) for gradient in gradients]

    def _differentiate(self, value: Tensor) -> list[Tensor]:
        """By autograd alone: the hooks by which DDP and ZeRO reduce gradients are not called."""
        parameters = list(self.trainable.values())
        return list(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))

    def gradient_squares(self) -> dict[str, Tensor]:
        """Before a step, the sum of squares of each layer's gradients; what processes hold adds up."""
        return squared_norms(((name, p.grad) for name, p in self.parameters.items()), self._num_copies())

    def weight_squares(self) -> dict[str, Tensor]:
        """The same of the weights."""
        return squared_norms(self.parameters.items(), self._num_copies())

    def _num_copies(self) -> int:
        return torch.distributed.get_world_size() if self.replicated and torch.distributed.is_initialized() else 1

    @property
    def replicated(self) -> bool:
        """Whether every process holds a copy of all weights, and updates it by itself."""
        return not any(map(_is_dtensor, self.parameters.values()))

    @property
    def shards_gradients(self) -> bool:
        """Whether `gradients` gives a part of them, as FSDP2 does."""
        return not self.replicated

    def reshard(self) -> None:
        """After parameters were written to: FSDP2 would go on with what it gathered for a pass without backward."""
        for module in self.model.modules() if not self.replicated else ():
            if hasattr(module, "reshard"):
                module.reshard()

    def state_dict(self) -> dict[str, Tensors]:
        """`model` and `optimizer`: every tensor, whole, on the main process's CPU; nothing on the others.

        Called by all processes together. An optimizer's tensor is named PARAMETER/KEY.
        """
        weights = ((name, self._full_parameter(p)) for name, p in self.parameters.items())
        moments = (
            (f"{name}/{key}", self._full_state(p, key)) for name, p in self.trainable.items() for key in self.state_keys
        )
        return {"model": self.collect_on_main(weights), "optimizer": self.collect_on_main(moments)}

    def load_state_dict(self, state: dict[str, Tensors]) -> None:
        """Fill the optimizer's state; the weights go into a model before it is wrapped."""
        for name, parameter in self.trainable.items():
            for key in self.state_keys:
                entry = self.optimizer.state[parameter][key]
                entry.copy_(local_shard(state["optimizer"][f"{name}/{key}"], entry))

    def collect_on_main(self, tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
        """The tensors on the main process's CPU; the other processes take part in gathering them and keep none."""
        return {name: value.cpu() for name, value in tensors if self._is_main}

    def _can_fuse(self) -> bool:
        """torch has no fused SGD for DTensors: there the plain one steps, and the norm is waited for."""
        sharded = any(map(_is_dtensor, self.parameters.values()))
        if not sharded or not isinstance(self.optimizer, torch.optim.SGD):
            return True
        for group in self.optimizer.param_groups:
            group["fused"] = False
        return False

    def _full_parameter(self, parameter: nn.Parameter) -> Tensor:
        return full_tensor(parameter.detach())

    def _full_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        return full_tensor(self.optimizer.state[parameter][key])

    def _init_optimizer_state(self) -> None:
        """Zeros, which torch's optimizers would make at their first step; rates and decays are the recipe's."""
        for parameter in self.trainable.values():
            self.optimizer.state[parameter] = initial_state(parameter, self.state_keys)


class Zero(Engine):
    """DeepSpeed's ZeRO: `backward` updates too, on flat parts of parameters that are cut over the processes."""

    def step(self, clip: float | None) -> Tensor:
        """The norm of the update that `backward` made, or inf where it made none; it clipped as its config says."""
        del clip
        norm = math.inf if self._zero.overflow else self.model.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.model.device)

    def gradients(self, compute_value: Callable[[], Tensor]) -> list[Tensor]:
        """This process's own, of whole parameters; see `Engine`.

        Of DeepSpeed's module, whose hooks gather parameters under stage 3: its engine would reduce after any backward.
        """
        engine, self.model = self.model, self.model.module
        try:
            return self._differentiate(compute_value())
        finally:
            self.model = engine

    def gradient_squares(self) -> dict[str, Tensor]:
        """None: DeepSpeed is through with the gradients when `backward` returns."""
        return {}

    def weight_squares(self) -> dict[str, Tensor]:
        """Of the parts under ZeRO-3, of whole weights under 1 and 2."""
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if not any(hasattr(p, "ds_tensor") for p in self.parameters.values()):
            return squared_norms(self.parameters.items(), world)
        return squared_norms((name, _local_partition(p, rank)) for name, p in self.parameters.items())

    @property
    def replicated(self) -> bool:
        """Each process's copy, where there is one, is overwritten with every update."""
        return False

    @property
    def shards_gradients(self) -> bool:
        """Autograd gives whole ones before ZeRO cuts them."""
        return False

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer around torch's."""
        return self._prepared_optimizer.optimizer

    def _flat_partitions(self) -> list[Tensor]:
        """This process's flat parts, which torch's optimizer steps on."""
        is_stage3 = hasattr(self._zero, "fp32_partitioned_groups_flat")
        return self._zero.fp32_partitioned_groups_flat if is_stage3 else self._zero.single_partition_of_fp32_groups

    def _full_parameter(self, parameter: nn.Parameter) -> Any:
        import deepspeed  # type: ignore
        from deepspeed.utils import safe_get_full_fp32_param  # type: ignore

        if not parameter.requires_grad:  # what learns nothing is in no flat part
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return safe_get_full_fp32_param(parameter)

    def _full_state(self, parameter: nn.Parameter, key: str) -> Any:
        from deepspeed.utils import safe_get_full_optimizer_state  # type: ignore

        if key == "step":
            return self.optimizer.state[self._flat_partitions()[0]][key].clone()
        return safe_get_full_optimizer_state(parameter, key)

    def _init_optimizer_state(self) -> None:
        for partition in self._flat_partitions():
            self.optimizer.state[partition] = initial_state(partition, self.state_keys)
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 find the parts by this
            self._zero._lazy_init_hp_params_optimizer_state()

    def load_state_dict(self, state: dict[str, Tensors]) -> None:
        """Fill the optimizer's state; one step count serves all parameters."""
        from deepspeed.utils import safe_set_full_optimizer_state  # type: ignore

        moments = state["optimizer"]
        step = next((value for name, value in moments.items() if name.endswith("/step")), torch.zeros(()))
        for partition in self._flat_partitions() if "step" in self.state_keys else ():
            self.optimizer.state[partition]["step"].copy_(step)
        for name, parameter in self.trainable.items():
            for key in self.state_keys:
                if key != "step":
                    safe_set_full_optimizer_state(parameter, moments[f"{name}/{key}"].to(parameter.device), key)


def _local_partition(parameter: Any, rank: int) -> Tensor:
    """What a process holds of a parameter under ZeRO-3, without the filling that makes all parts equally long."""
    size = parameter.ds_tensor.numel()
    return parameter.ds_tensor.flatten()[: max(0, min(size, parameter.ds_numel - rank * size))]


def initial_state(parameter: Tensor, keys: tuple[str, ...]) -> dict[str, Tensor]:
    """An optimizer's state of a parameter before its first step."""
    scalar = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {key: scalar.clone() if key == "step" else torch.zeros_like(parameter.detach()) for key in keys}


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # its module takes a second to import


def full_tensor(tensor: Any) -> Tensor:
    """A tensor that may be cut over the processes, whole; called by all of them."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def local_shard(full: Tensor, like: Any) -> Tensor:
    """What a process holds of a whole tensor."""
    full = full.to(like.device)
    if not _is_dtensor(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
