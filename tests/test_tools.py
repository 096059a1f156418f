"""The real command lines, few and full: each start of a process costs seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import TINY

ROOT = Path(__file__).parent.parent
QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}


def tool(*words: str, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=cwd, env=QUIET | (environment or {}), capture_output=True, text=True, timeout=300
    )


def two_processes(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    return tool(*launcher, *words, environment=environment)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training(shards: Path, run: Path) -> list[str]:
    data = [f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}"]
    return [*TINY, *data, "steps=12", "log_every=4", "save_every=6", "tracker=none"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["make_shards", "input=/nowhere", "output=/tmp/x"], 65, "make_shards.py: /nowhere: no such folder"),
        (["make_shards", "input=/tmp"], 64, "output: it must be given"),
        (["pretrain", "recipe=mpp_demo", "optim.lrr=1"], 64, "unknown key optim.lrr; did you mean optim.lr?"),
        (["pretrain", "recipe=mpp_demo", "data.image_size=30"], 64, "cannot be cut into patches of 8"),
        (
            ["finetune", "run=/tmp/ssl_vit-none", "data.train=/nowhere", "data.val=/nowhere"],
            65,
            "/nowhere: no such folder",
        ),
        (["benchmark", "jump"], 64, "no benchmark 'jump'"),
    ],
)
def test_bad_input_ends_in_one_line_and_the_right_code(words, code, message):
    done = tool(f"tools/{words[0]}.py", *words[1:])
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_make_shards_and_every_help(squares: Path, tmp_path: Path):
    done = tool("tools/make_shards.py", f"input={squares}", f"output={tmp_path / 'out'}", "val_fraction=0.25")
    assert done.returncode == 0, done.stderr
    assert "samples, 3 classes, 1 shards" in done.stdout
    for name, key in {"make_shards": "val_fraction", "pretrain": "head.ratio", "finetune": "optim.momentum"}.items():
        shown = tool(f"tools/{name}.py", "--help")
        assert shown.returncode == 0
        assert f"  {key}  (" in shown.stdout


def test_two_processes_take_the_batches_of_one(shards: Path, tmp_path: Path):
    one = tool("tools/pretrain.py", *training(shards, tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    two = two_processes("tools/pretrain.py", *training(shards, tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    first, second = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in first] == [row["step"] for row in second] == [4, 8, 12]
    for a, b in zip(first, second, strict=True):
        assert a["samples_digest"] == b["samples_digest"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert first[-1]["val_samples"] == second[-1]["val_samples"]
    assert first[-1]["val_loss"] == pytest.approx(second[-1]["val_loss"], rel=1e-4)
    # two processes go on where one stopped, and the other way round
    for step in (tmp_path / "two" / "checkpoints").glob("step-00000012"):
        step.rename(tmp_path / "gone")
    again = tool("tools/pretrain.py", *training(shards, tmp_path / "two"))
    assert again.returncode == 0, again.stderr
    assert [row["samples_digest"] for row in rows(tmp_path / "two")] == [row["samples_digest"] for row in first]


def test_processes_that_accelerate_does_not_see_are_refused(shards: Path, tmp_path: Path):
    done = two_processes("tools/pretrain.py", *training(shards, tmp_path), ACCELERATE_USE_CPU="0")
    assert done.returncode != 0
    assert "2 processes were started but accelerate sees 1: set ACCELERATE_USE_CPU=1" in done.stderr


def test_a_signal_saves_and_the_same_command_goes_on(shards: Path, tmp_path: Path):
    words = [*training(shards, tmp_path / "run"), "steps=100000", "log_every=1", "save_every=100000", "data.workers=1"]
    process = subprocess.Popen(
        [sys.executable, "tools/pretrain.py", *words], cwd=ROOT, env=QUIET, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    end = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert end["code"] == 75
    step = end["step"]
    assert f"pretrain.py: stopped at step {step} of 100000; the same command goes on" in said
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"latest", f"step-{step:08d}"}
    assert len(rows(tmp_path / "run")) == step - 1  # the last is owed


def test_training_ends_with_its_launcher(shards: Path, tmp_path: Path):
    """accelerate's launcher forwards no signal: without care the training would go on as an orphan."""
    run = tmp_path / "run"
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "tools/pretrain.py"]
    words = [*training(shards, run), "steps=100000", "log_every=1", "save_every=100000", "data.workers=1"]
    process = subprocess.Popen([*launcher, *words], cwd=ROOT, env=QUIET, stderr=subprocess.DEVNULL)
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    deadline = time.monotonic() + 30
    while not (run / "exit.json").exists():
        assert time.monotonic() < deadline, "the training went on without its launcher"
        time.sleep(0.1)
    end = json.loads((run / "exit.json").read_text())
    assert end["code"] == 75
    assert (run / "checkpoints" / f"step-{end['step']:08d}").is_dir()


def test_the_demo_in_short(tmp_path: Path):
    """folder -> shards -> accelerate launch pretrain -> finetune twice -> one table, as `make demo` runs it."""
    for name in ("tools", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = tool("tools/demo.py", "steps=4", "log_every=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("\npretraining") :]
    for word in ("masked loss", "by label frequency", "uniform", "pretrained", "from scratch", "images/s"):
        assert word in table
    run = tmp_path / "runs" / "demo"
    assert (run / "pretrain" / "reconstruction.png").exists()
    assert list((run / "pretrain" / "tensorboard").glob("events.*"))
    assert json.loads((run / "finetune" / "results.json").read_text())["samples"] > 300
