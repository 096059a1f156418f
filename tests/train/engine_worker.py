"""Many trainings in one launch: `torchrun --nproc_per_node 2 engine_worker.py JOBS.json`.

A job is {"engine": ..., "words": [key=value, ...]}, and the engine is asked for as accelerate's launcher asks for it:
by the environment. The process group stays from job to job; all else of Accelerate is made anew.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from ssl_vit import config, recipe

OF_ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_DEEPSPEED_CONFIG_FILE")


def ask(engine: str, zero: dict[str, Any]) -> None:
    """Set the environment as `accelerate launch` does for an engine; `zero` is ZeRO's section of DeepSpeed's config."""
    for name in OF_ENGINES:
        os.environ.pop(name, None)
    os.environ["ACCELERATE_USE_CPU"] = "1"
    if engine == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    elif engine.startswith("zero"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = json.dumps(
            {"zero_optimization": {"stage": int(engine[-1]), **zero}}
        )


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    Accelerator.end_training = lambda self: None  # it would end the process group
    for job in json.loads(Path(sys.argv[1]).read_text()):
        ask(job["engine"], job.get("zero", {}))
        kind = recipe.Finetune if job.get("finetune") else recipe.Pretrain
        recipe.run(config.parse(kind, job["words"], recipe.FOLDER))
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


if __name__ == "__main__":
    main()
