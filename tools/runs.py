"""How runs stand, their checkpoints and their curves: tools/runs.py run=FOLDER [compare=RUN,RUN] [checkpoints=true]

`run` is a run folder, or a folder of runs of any depth, or several. First comes a table of all runs, then the keys in
which their recipes differ. Where it is one run, or with checkpoints=true, every file of every checkpoint is compared
with its digest, and what the same command would do is said; exit code 76 where there are checkpoints and none
verifies. compare=A,B draws the curves of these runs in one picture. Nothing but that picture is written.
"""

import io
import os
import shutil
import sys
from pathlib import Path

from ssl_vit import config, errors
from ssl_vit.commands.runs import Runs, report_runs


def main(arguments: list[str]) -> int:
    if config.wants_help(arguments):
        lines = iter([f"{__doc__}\n\n{config.format_help(Runs)}"])
    else:
        is_terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if is_terminal else None
        lines = report_runs(
            config.parse(Runs, arguments, Path("recipes")), width, is_terminal and not os.environ.get("NO_COLOR")
        )
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:  # of `| head`, which has seen enough; what is still waiting goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder may have any name
    sys.exit(errors.run_main(main))
