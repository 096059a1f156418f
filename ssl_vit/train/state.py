"""What of a run travels through a checkpoint: gathered from the processes, and put back into them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_vit import inject
from ssl_vit.exits import MISMATCH, Refusal
from ssl_vit.model import Model
from ssl_vit.train import checkpoint
from ssl_vit.train.checkpoint import AVERAGE, Tensors
from ssl_vit.train.distributed import from_main, together
from ssl_vit.train.numbers import NOTHING, LeftOut
from ssl_vit.train.run import Run
from ssl_vit.train.tracker import best_row, rewind, row_of
from ssl_vit.train.window import Window

if TYPE_CHECKING:
    from accelerate import Accelerator


def on_main(accelerator: "Accelerator", tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
    """The tensors, on the main process's CPU; the others take part and keep none."""
    kept = accelerator.is_main_process
    return {name: value.cpu() for name, value in tensors if kept}


@dataclass
class State:
    """What a checkpoint says beside weights and moments, or what a run begins with."""

    window: Window
    owed: bool = False
    bad_samples: Sequence[int] = (0, 0)  # of the epoch, of the run
    left_out: LeftOut = NOTHING
    losses: Sequence[float] = ()
    skipped: Sequence[int] = ()
    average: Tensors = field(default_factory=dict)


def resume(
    run: Run, accelerator: "Accelerator", keep: int, model: Model, data: str, best: str | None = None
) -> tuple[Tensors, State]:
    """Put the newest checkpoint's weights in place, and its step into the run; returns moments, and all else it says.

    Where there is none they are empty, and the step is 0. Where one process cannot read it, all raise the same Refusal.
    """

    def choose() -> tuple[Path | None, bool]:
        folder = checkpoint.newest(run.checkpoints)
        step = checkpoint.step_of(folder) if folder else 0
        rewind(run.folder, step)
        row = best_row(run.folder, best)
        checkpoint.tidy(run.checkpoints, keep, row["step"] if row else None)
        return folder, row_of(run.folder, step) is not None

    folder, told = from_main(accelerator, choose)
    inject.point("resume.chosen")
    if folder is None:
        run.step = 0
        return {}, State(Window())
    weights, moments, state = together(accelerator, lambda: checkpoint.load(folder))
    if state["data"] != data:
        text = f"run={run.folder}: was started on other data than data.train holds now"
        raise Refusal(MISMATCH, text, shared=True)
    model.load_state_dict(weights)
    run.step = state["step"]
    inject.point("resume.loaded", run.step)
    owed = state["owed"] and not told
    sums = {name.removeprefix("window."): value for name, value in state.items() if name.startswith("window.")}
    paid = state["owed"] and not owed
    main = accelerator.is_main_process  # of sums over all, one process keeps them
    mine = {} if paid else {name: value if main else torch.zeros_like(value) for name, value in sums.items()}
    window = Window({name: value.to(accelerator.device) for name, value in mine.items()})
    left_out = LeftOut(tuple(state["left_out"]), state["rollbacks"])
    average = {name: value for name, value in state.items() if name.startswith(AVERAGE)}
    return moments, State(window, owed, state["bad_samples"], left_out, state["losses"], state["skipped"], average)
