"""The command lines: help, refusals and exit codes of every tool in process; a few real ones through a shell."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl_vit.data import manifest
from tests.conftest import TINY, draw_squares
from tests.starts import call

ROOT = Path(__file__).parent.parent
HERE = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
TORCHRUN = "python -m torch.distributed.run --nproc_per_node 2 --standalone"
KEYS = {  # of every tool a key that its help has; the demo is the other tools' commands
    "analyze": "data",
    "benchmark step": "round_steps",
    "evaluate": "methods",
    "export": "format",
    "finetune": "optim.momentum",
    "fit_clusters": "clusters",
    "index_shards": "shards",
    "make_shards": "val_fraction",
    "predict": "input",
    "pretrain": "head.ratio",
    "runs": "compare",
    "verify_shards": "full",
}


def shell(line: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Type a line into a shell in which the environment is activated."""
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=HERE, capture_output=True, text=True, timeout=300)


def linked(folder: Path) -> Path:
    """A folder in which a person may type the commands of this project, and that keeps what they write."""
    for name in ("tools", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training(shards: Path, run: Path) -> list[str]:
    data = [f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}"]
    return [*TINY, *data, "steps=12", "log_every=4", "save_every=6", "tracker=none"]


def test_every_tool_is_listed():
    programs = {path.stem for path in ROOT.glob("tools/*.py") if "sys.exit(" in path.read_text()}
    assert programs == {tool.split()[0] for tool in KEYS} | {"demo"}


@pytest.mark.parametrize("tool", KEYS)
def test_help_names_the_keys_and_an_unknown_one_is_refused(tool: str):
    name, *words = tool.split()
    shown = call(name, [*words, "--help"])
    assert shown.code == 0
    assert re.search(rf"^  {re.escape(KEYS[tool])}  +\(", shown.said, re.M)
    ended = call(name, [*words, "jump=1"])
    assert (ended.code, len(ended.said.splitlines())) == (64, 1)
    assert ended.line.startswith(f"{name}.py: ")
    assert "unknown key jump" in ended.line


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("make_shards input=/nowhere output=RUN", 65, "make_shards.py: /nowhere: no such folder"),
        ("make_shards input=/tmp", 64, "output: it must be given"),
        ("pretrain recipe=mpp_demo optim.lrr=1", 64, "unknown key optim.lrr; did you mean optim.lr?"),
        ("pretrain recipe=mpp_demo data.image_size=30", 64, "cannot be cut into patches of 8"),
        ("finetune data.train=/nowhere data.val=/nowhere run=RUN", 65, "/nowhere: no such folder"),
        ("evaluate encoder=/nowhere run=RUN", 65, "/nowhere"),
        ("benchmark jump", 64, "no benchmark 'jump'"),
    ],
)
def test_bad_input_ends_in_one_line_and_the_right_code(line: str, code: int, message: str, tmp_path: Path):
    tool, *words = line.replace("RUN", str(tmp_path / "run")).split()
    ended = call(tool, words)
    assert ended.code == code
    assert message in ended.said
    assert len(ended.said.strip().splitlines()) == 1


def test_a_shell_sees_the_code_and_one_line_of_errors():
    done = shell("python tools/pretrain.py recipe=mpp_demo optim.lrr=1; echo code=$?")
    assert done.stdout == "code=64\n"
    assert done.stderr == "pretrain.py: unknown key optim.lrr; did you mean optim.lr?\n"


def test_the_three_commands_of_the_readme(tmp_path: Path):
    """folder -> shards -> `accelerate launch` of both trainings, as they stand there but for their sizes."""
    draw_squares(linked(tmp_path) / "images")
    wanted = r"^(?:python tools/make_shards|accelerate launch tools/(?:pretrain|finetune)).*$"
    lines = re.findall(wanted, (ROOT / "README.md").read_text(), re.M)
    short = [*TINY, "steps=2", "micro_batch=none", "log_every=1", "optim.warmup_steps=1", "tracker=none"]
    for line, more in zip(lines[:3], ([], short, short), strict=True):
        done = shell(" ".join([line, *more]), tmp_path)
        assert done.returncode == 0, done.stderr
        if "make_shards" in line:
            assert "samples, 3 classes, 1 shards" in done.stdout
    assert (tmp_path / "runs" / "mpp_vit_b16" / "encoder").is_dir()
    results = json.loads((tmp_path / "runs" / "finetune_vit_b16" / "results.json").read_text())
    assert results["samples"] == manifest.load(tmp_path / "shards" / "val").samples > 0


@pytest.mark.ranks
def test_two_processes_take_the_batches_of_one(shards: Path, tmp_path: Path):
    assert call("pretrain", training(shards, tmp_path / "one")).code == 0
    two = shell(" ".join([TORCHRUN, "tools/pretrain.py", *training(shards, tmp_path / "two")]))
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
    again = call("pretrain", training(shards, tmp_path / "two"))
    assert again.code == 0, again.said
    assert [row["samples_digest"] for row in rows(tmp_path / "two")] == [row["samples_digest"] for row in first]


@pytest.mark.process
def test_training_ends_with_its_launcher_and_saves_first(shards: Path, tmp_path: Path):
    """accelerate's launcher forwards no signal: without care the training would go on as an orphan."""
    run = tmp_path / "run"
    words = [*training(shards, run), "steps=100000", "log_every=1", "save_every=100000", "data.workers=1"]
    line = ["accelerate", "launch", "tools/pretrain.py", *words]
    process = subprocess.Popen(line, cwd=ROOT, env=HERE, stderr=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)  # the training's words too: it holds the same pipe until it has ended
    end = json.loads((run / "exit.json").read_text())
    assert end["code"] == 75
    step = end["step"]
    assert f"pretrain.py: stopped at step {step} of 100000; the same command goes on" in said
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", f"step-{step:08d}"}
    assert len(rows(run)) == step - 1  # the last is owed


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.process)], ids=["here", "processes"])
def test_the_demo_in_short(
    real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """folder -> shards -> accelerate launch pretrain -> finetune twice -> one table, as `make demo` runs it.

    Without processes of its own each command runs in this one, on squares in the place of its pictures.
    """
    demo, asked = tmp_path / "runs" / "demo", []
    if real:
        done = shell("python tools/demo.py steps=4 log_every=2", linked(tmp_path))
        assert done.returncode == 0, done.stderr
        said = done.stdout
    else:

        def run(parts: list[str]) -> subprocess.CompletedProcess:
            at = next(number for number, part in enumerate(parts) if part.startswith("tools/"))
            asked.append(" ".join([*(["launch"] if "launch" in parts else []), Path(parts[at]).stem]))
            return subprocess.CompletedProcess(parts, call(Path(parts[at]).stem, parts[at + 1 :]).code)

        draw_squares(demo / "images", side=32)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(subprocess, "run", run)
        main = runpy.run_path(str(ROOT / "tools" / "demo.py"))["main"]
        assert main(["steps=2", "log_every=1", "data.workers=0"]) == 0
        assert asked == ["make_shards", "launch pretrain", "launch finetune", "launch finetune", "analyze"]
        said = capsys.readouterr().out
        with pytest.raises(SystemExit) as end:
            main(["optim.lrr=1"])
        assert (end.value.code, asked[5:]) == (64, ["make_shards", "launch pretrain"])
    table = said[said.index("\npretraining") :]
    for word in ("masked loss", "by label frequency", "uniform", "pretrained", "from scratch", "images/s"):
        assert word in table
    assert (demo / "pretrain" / "reconstruction.png").exists()
    assert list((demo / "pretrain" / "tensorboard").glob("events.*"))
    assert (json.loads((demo / "finetune" / "results.json").read_text())["samples"] > 300) == real
    assert (demo / "inside" / "report.html").exists()
