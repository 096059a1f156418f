"""Count the processes that tests start, and print the sum after each run: `pytest ... --starts` lists them by file.

A start is a command or rank: a subprocess, a rank of tests/processes.py, a fork of tests/train/children.py. Loader and
conversion workers, which belong to what started them, are not counted.
"""

import os
import sys
from collections import Counter
from multiprocessing import process
from typing import Any

import pytest

OWNER_PID = os.getpid()  # a fork of this process inherits the hook, but counts nothing
RANK_FUNCTION = "run_tool_process"  # the function that tests/processes.py gives to a rank's process


class StartCounter:
    """A pytest plugin; under pytest-xdist each worker counts its own starts and the controller adds them up."""

    def __init__(self) -> None:
        self.starts: Counter[str] = Counter()  # by file
        self._library_fork = False
        self._original_start = process.BaseProcess.start
        process.BaseProcess.start = self._count_process(self._original_start)  # type: ignore[method-assign]
        sys.addaudithook(self._count_event)

    def _count_start(self) -> None:
        if os.getpid() == OWNER_PID and (test := os.environ.get("PYTEST_CURRENT_TEST")):
            self.starts[test.partition("::")[0]] += 1

    def _count_event(self, event: str, arguments: Any) -> None:
        if event == "subprocess.Popen" or (event == "os.fork" and not self._library_fork):
            self._count_start()

    def _count_process(self, start: Any) -> Any:
        def start_and_count(process: Any) -> None:
            if getattr(process._target, "__name__", "") == RANK_FUNCTION:
                self._count_start()
            self._library_fork = True
            try:
                start(process)
            finally:
                self._library_fork = False

        return start_and_count

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Hand the counts of a worker to the controller."""
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["starts"] = dict(self.starts)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: Any) -> None:
        """Take the counts of a worker that has finished."""
        del error
        self.starts.update(getattr(node, "workeroutput", {}).get("starts", {}))

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        """Print the sum, and with --starts each file's count."""
        terminalreporter.write_line(f"process starts: {self.starts.total()}")
        for file, count in self.starts.most_common() if config.option.starts else ():
            terminalreporter.write_line(f"{count:6} {file}")
