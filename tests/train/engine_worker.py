"""Many trainings in one launch: `torchrun --nproc_per_node 2 engine_worker.py JOBS.json`.

A job is {"engine": ..., "words": [key=value, ...]}, {"copy": [RUN, OTHER]}, or {"configs": {name: a DeepSpeed config},
"to": FILE}. The engine is asked for as accelerate's launcher asks for it: by the environment. The process group stays
from job to job; all else of Accelerate is made anew.
"""

import gc
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from ssl_vit import config, recipes
from ssl_vit.commands import pretrain
from ssl_vit.errors import ExitError
from ssl_vit.heads.masked_prediction import MaskedPredictionHead
from ssl_vit.model import Output
from ssl_vit.runtime import select_engine
from ssl_vit.train import launch
from ssl_vit.train.launch import LaunchSettings
from tests.train.engines import HALF_CHECKPOINT

FORWARD = MaskedPredictionHead.forward
calls: list[int] = []


def nan_forward(self: Any, encoder: Any, batch: Any, log_metrics: bool = False) -> Output:
    """The head's forward, whose third loss in training is not a number on rank 1."""
    output = FORWARD(self, encoder, batch, log_metrics)
    calls.append(self.training)
    bad = self.training and sum(calls) == 3 and dist.get_rank() == 1
    return output._replace(loss=output.loss * float("nan")) if bad else output


def copy_half(run: Path, target: Path) -> None:
    """Make another run of the first half of one."""
    if dist.get_rank() == 0:
        shutil.copytree(run / HALF_CHECKPOINT, target / HALF_CHECKPOINT)
        for file in ("metrics.jsonl", "recipe.yaml"):
            shutil.copy(run / file, target)
    dist.barrier()


def resolve_configs(configs: dict[str, Any]) -> dict[str, Any]:
    """Starts up to where Accelerate would be made: refusals, or DeepSpeed's config as the recipe filled it."""
    results = {}
    for name, content in configs.items():
        environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": json.dumps(content)}
        if name == "file and section":
            environment["ACCELERATE_CONFIG_DS_FIELDS"] = "zero_stage"
        clip = None if name == "no clip" else 0.5
        settings = LaunchSettings(24, 4, 3, clip, precision="auto", activation_checkpointing=False, timeout=60)
        accelerator_stub = partial(SimpleNamespace, num_processes=dist.get_world_size())
        try:
            with patch.dict(os.environ, environment), patch("accelerate.Accelerator", accelerator_stub):
                accelerator: Any = launch.start_accelerator(settings, "none", Path())
            results[name] = accelerator.deepspeed_plugin.deepspeed_config
        except ExitError as error:
            results[name] = {"code": error.code, "message": error.message}
        except Exception as error:
            results[name] = {"code": None, "message": repr(error)}
    return results


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    Accelerator.end_training = lambda self: None  # it would end the process group
    for job in json.loads(Path(sys.argv[1]).read_text()):
        gc.freeze()  # else all that is imported would be looked through at the end of each training
        if "copy" in job:
            copy_half(*map(Path, job["copy"]))
        elif "configs" in job:
            results = resolve_configs(job["configs"])
            if dist.get_rank() == 0:
                Path(job["to"]).write_text(json.dumps(results))
        else:
            select_engine(job["engine"], job["zero"])
            MaskedPredictionHead.forward = nan_forward if job["poisoned"] else FORWARD
            calls.clear()
            pretrain.run(config.parse(recipes.Pretrain, job["words"]))
            AcceleratorState._reset_state(True)
            GradientState._reset_state()


if __name__ == "__main__":
    main()
