"""List runs and their checkpoints, and say what the same command would do: tools/runs.py run=FOLDER [verify=false]

`run` is a run folder, or a folder of runs. Every file is compared with its digest; nothing is changed. Exit code 76
where a run has checkpoints and none verifies.
"""

import sys
from pathlib import Path

from ssl_vit import config, exits
from ssl_vit.runs import Runs, report


def main(arguments: list[str]) -> int:
    if config.usage(arguments):
        print(f"{__doc__}\n\n{config.describe(Runs)}")
        return 0
    for line in report(config.parse(Runs, arguments, Path("recipes"))):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(exits.run(main))
