"""Starts that must not train, and one that must: `startup_worker.py FOLDER WORDS...` as three ranks.

Rank 0 plays a machine and ranks 1 and 2 another, which differs in one thing; they go through all scenarios together.
FOLDER has the machines' working directories, a and b; rank r writes FOLDER/found-r.json: per scenario the code, message
and `shared` of its end.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from ssl_vit import config, recipes
from ssl_vit.commands import pretrain as command
from ssl_vit.errors import ExitError
from ssl_vit.train import preflight
from ssl_vit.train.run_folder import Run

FOLDER, ARGS = Path(sys.argv[1]), sys.argv[2:]
RANK = int(os.environ["RANK"])


def train(name: str, *overrides: str, **patches: Any) -> dict[str, Any]:
    """How a training of two steps in a folder of its own ends, with names of `startup` changed on machine b."""
    parsed = config.parse(recipes.Pretrain, [*ARGS, f"run={FOLDER}/run-{name}", *overrides])
    try:
        with patch.dict(vars(preflight), patches if RANK else {}):
            return {"code": command.run(parsed), "message": "", "shared": True}
    except ExitError as error:
        return {"code": error.code, "message": error.message, "shared": error.shared}
    except BaseException as error:
        return {"code": None, "message": repr(error), "shared": False}
    finally:  # the process group stays; all else of Accelerate is made anew
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        dist.barrier()


@contextmanager
def machine_dir() -> Iterator[None]:
    """Each process in its machine's working directory, with its number on that machine."""
    previous_dir = os.getcwd()
    os.chdir(FOLDER / ("b" if RANK else "a"))
    with patch.dict(os.environ, {"LOCAL_RANK": str(max(0, RANK - 1))}):
        yield
    os.chdir(previous_dir)


def train_in_held_folder() -> dict[str, Any]:
    """While another training holds the run folder."""
    other_run = Run(FOLDER / "run-held")
    if RANK == 0:
        other_run.acquire(recipes.Pretrain())
    result = train("held")
    other_run.release()
    return result


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # they have met: the port is held already
    Accelerator.end_training = lambda self: None  # it would end the process group
    preflight.VISIBILITY_TIMEOUT = 0.5
    results = {
        "batch": train("batch", "batch=8"),
        "code": train("code", PACKAGE=FOLDER / "ssl_vit"),
        "library": train("library", _version=lambda name: "2.0.0" if name == "torch" else preflight.version(name)),
        "gpu": train("gpu", _gpu=lambda: "NVIDIA L4 of 22 GiB"),
        "recipe": train("recipe", *(["seed=7", "optim.lr=1"] if RANK else [])),
        "no data": train("no-data", "data.train=/nowhere"),
        "held": train_in_held_folder(),
    }
    with machine_dir():
        results["folder"] = train("folder", "run=run")
        results["shards"] = train("shards", "data.train=shards/train")
    results["good"] = train("good")
    (FOLDER / f"found-{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    sys.exit(0)  # as the tools end
