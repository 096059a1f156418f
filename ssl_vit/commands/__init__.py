"""The command lines, one module each: its docstring is its help, `Config` its keys, `run(config)` its exit code.

`ssl-vit NAME key=value ...` (or `python -m ssl_vit NAME ...`) and `tools/NAME.py key=value ...` are the same.
"""

import ast
import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ssl_vit import config, errors
from ssl_vit.errors import ExitCode, ExitError

COMMANDS = ("make_shards", "index_shards", "verify_shards", "fit_clusters", "pretrain", "finetune")
COMMANDS += ("evaluate", "analyze", "predict", "export", "runs")


def main(command: Any) -> NoReturn:
    """Run a command module with this process's arguments, and end the process."""
    errors.run_main(partial(call, command))


def call(command: Any, arguments: list[str]) -> int:
    """Print a command's help, or run it; returns the exit code."""
    if config.wants_help(arguments):
        print(f"{command.__doc__.rstrip()}\n\n{config.format_help(command.Config)}")
        return 0
    return command.run(config.parse(command.Config, arguments))


def cli() -> NoReturn:
    """The one command line for all of them: `ssl-vit NAME key=value ...`."""
    errors.run_main(_dispatch)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or config.wants_help(arguments[:1]):
        print("Usage: ssl-vit NAME key=value ...    (ssl-vit NAME --help lists the keys)\n")
        print("\n".join(f"  {name:<15}{_summary(name)}" for name in COMMANDS))
        return 0
    name = arguments[0].replace("-", "_")
    if name not in COMMANDS:
        raise ExitError(ExitCode.USAGE, f"no command {arguments[0]}; there are {', '.join(COMMANDS)}")
    sys.argv = [f"ssl-vit {name}", *arguments[1:]]  # closing lines name the command
    return call(importlib.import_module(f"{__name__}.{name}"), arguments[1:])


def _summary(name: str) -> str:
    """What a command does, from its file: importing all of them would take seconds."""
    docstring = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text())) or ""
    return docstring.partition(":")[0]
