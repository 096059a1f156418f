"""Many trainings in one launch: `torchrun --nproc_per_node 2 engine_worker.py JOBS.json`.

A job is {"copy": [RUN, OTHER]}, or {"engine": ..., "words": [key=value, ...]}. The engine is asked for as accelerate's
launcher asks for it: by the environment. The process group stays from job to job; all else of Accelerate is made anew.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from ssl_vit import config, recipe, session
from ssl_vit.heads.mean_color import MeanColorHead
from ssl_vit.model import Output
from ssl_vit.train.environment import choose

FORWARD = MeanColorHead.forward
calls: list[int] = []


def poisoned(self: Any, encoder: Any, batch: Any) -> Output:
    """The head's forward, whose fifth loss in training is not a number on rank 1."""
    output = FORWARD(self, encoder, batch)
    calls.append(self.training)
    bad = self.training and sum(calls) == 5 and dist.get_rank() == 1
    return output._replace(loss=output.loss * float("nan")) if bad else output


def half_of(run: Path, other: Path) -> None:
    """Make another run of the first half of one."""
    if dist.get_rank() == 0:
        shutil.copytree(run / "checkpoints" / "step-00000010", other / "checkpoints" / "step-00000010")
        for file in ("metrics.jsonl", "recipe.yaml"):
            shutil.copy(run / file, other)
    dist.barrier()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    Accelerator.end_training = lambda self: None  # it would end the process group
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "copy" in job:
            half_of(*map(Path, job["copy"]))
            continue
        choose(job["engine"], job["zero"])
        MeanColorHead.forward = poisoned if job.get("poisoned") else FORWARD
        calls.clear()
        session.run(config.parse(recipe.Pretrain, job["words"], recipe.FOLDER))
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


if __name__ == "__main__":
    main()
