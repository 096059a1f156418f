"""A conversion's processes: none outlives it, and two conversions at once do not meet."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pictures import write_pictures

from ssl_vit.data import manifest, shards


def orphans(marker: str) -> list[int]:
    """Processes whose command line names the marker."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_a_conversion(tmp_path: Path, number: signal.Signals):
    write_pictures(tmp_path / "in", [f"{i:03d}.png" for i in range(300)])
    tool, output = Path(shards.__file__).parents[2] / "tools" / "make_shards.py", tmp_path / "out"
    words = [f"input={tmp_path / 'in'}", f"output={output}", "shard_samples=1", "workers=2", "quiet=true"]
    process = subprocess.Popen([sys.executable, str(tool), *words], stderr=subprocess.DEVNULL)
    while not list(output.glob("*.tar")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == {signal.SIGKILL: -9}.get(number, 75)
    deadline = time.monotonic() + 10
    while orphans(str(output)):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.1)
    assert len(list(output.glob("*.tar"))) < 300


def test_two_conversions_at_once_share_the_work(tmp_path: Path):
    write_pictures(tmp_path / "in", [f"{i:03d}.png" for i in range(40)])
    tool = Path(shards.__file__).parents[2] / "tools" / "make_shards.py"
    words = [f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "shard_samples=2", "workers=1", "quiet=true"]
    both = [subprocess.Popen([sys.executable, str(tool), *words]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert manifest.load(tmp_path / "out").samples == 40
