"""Starts under DeepSpeed, refused or not: `accelerate launch --config_file FILE launch_worker.py OUTPUT CONFIGS`.

The first start is under FILE; the others under each of the DeepSpeed configs in the JSON file CONFIGS, by name. OUTPUT
is JSON: per start the code and message of its refusal, or DeepSpeed's config as the recipe filled it.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from ssl_vit.exits import Refusal
from ssl_vit.train import launch
from ssl_vit.train.launch import Asked


def end_of(clip: float | None = 0.5) -> dict[str, Any]:
    """A start up to where Accelerate would be made: the plugins are there then."""
    asked = Asked(
        batch=24, micro_batch=4, accumulate=3, clip=clip, precision="auto", activation_checkpointing=False, timeout=60
    )
    try:
        with patch("accelerate.Accelerator", lambda **given: SimpleNamespace(num_processes=launch.world(), **given)):
            started: Any = launch.start(asked, "none", Path())
    except Refusal as error:
        return {"code": error.code, "message": error.message}
    except Exception as error:
        return {"code": None, "message": repr(error)}
    return started.deepspeed_plugin.deepspeed_config


def main(output: Path, configs: Path) -> None:
    found = {"launch file": end_of()}
    with patch.object(launch, "launcher_words", list):
        for name, config in json.loads(configs.read_text()).items():
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = json.dumps(config)
            found[name] = end_of(None if name == "no clip" else 0.5)
            os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # of the launch file's own section, which excludes it
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
