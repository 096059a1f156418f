"""The command lines: help, refusals and exit codes of every tool in process; a few real ones through a shell.

The README is finished, its commands are keys of the tools, and what it points at is there.
"""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl_vit import config
from ssl_vit.data import manifest
from ssl_vit.recipes import Finetune, Pretrain
from tests import tiny_runs
from tests.conftest import TINY, draw_squares
from tests.processes import Start, call_tool

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # as Python has it where it starts one of them
SHELL_ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
TOOL_KEYS = {  # of every tool a key that its help has; the demo is the other tools' commands
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


def run_shell(line: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Type a line into a shell in which the environment is activated."""
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=SHELL_ENV, capture_output=True, text=True, timeout=300)


def link_project(folder: Path) -> Path:
    """A folder in which a person may type the commands of this project, and that keeps what they write."""
    for name in ("tools", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def training_args(shards: Path, run: Path) -> list[str]:
    data = [f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}"]
    return [*TINY, *data, "steps=12", "log_every=4", "save_every=6", "tracker=none"]


def test_every_tool_is_listed():
    programs = {path.stem for path in ROOT.glob("tools/*.py") if '"__main__"' in path.read_text()}
    assert programs == {tool.split()[0] for tool in TOOL_KEYS} | {"demo"}


@pytest.mark.parametrize("tool", TOOL_KEYS)
def test_help_names_the_keys_and_an_unknown_one_is_refused(tool: str):
    name, *args = tool.split()
    help_result = call_tool(name, [*args, "--help"])
    assert help_result.code == 0
    assert re.search(rf"^  {re.escape(TOOL_KEYS[tool])}  +\(", help_result.output, re.M)
    result = call_tool(name, [*args, "jump=1"])
    assert (result.code, len(result.output.splitlines())) == (64, 1)
    assert result.last_line.startswith(f"{name}.py: ")
    assert "unknown key jump" in result.last_line


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("make_shards input=/nowhere output=RUN", 65, "make_shards.py: /nowhere: no such folder"),
        ("make_shards input=/tmp", 64, "output: it must be given"),
        ("pretrain recipe=mpp_demo optim.lrr=1", 64, "unknown key optim.lrr; did you mean optim.lr?"),
        ("pretrain recipe=mpp_demo data.image_size=30", 64, "cannot be cut into patches of 8"),
        ("benchmark jump", 64, "no benchmark 'jump'"),
    ],
)
def test_bad_input_ends_in_one_line_and_the_right_code(line: str, code: int, message: str, tmp_path: Path):
    tool, *args = line.replace("RUN", str(tmp_path / "run")).split()
    result = call_tool(tool, args)
    assert result.code == code
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_shell_sees_the_code_and_one_line_of_errors():
    process = run_shell("python tools/pretrain.py recipe=mpp_demo optim.lrr=1; echo code=$?")
    assert process.stdout == "code=64\n"
    assert process.stderr == "pretrain.py: unknown key optim.lrr; did you mean optim.lr?\n"


def test_the_three_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """folder -> shards, here -> `accelerate launch` of both trainings, as they stand there but for their sizes."""
    draw_squares(link_project(tmp_path) / "images")
    pattern = r"^(?:python tools/make_shards|accelerate launch tools/(?:pretrain|finetune)).*$"
    first, *lines = re.findall(pattern, (ROOT / "README.md").read_text(), re.M)[:3]
    monkeypatch.chdir(tmp_path)
    result = call_tool("make_shards", shlex.split(first)[2:])
    assert result.code == 0
    assert "samples, 3 classes, 1 shards" in result.output
    short_args = [*TINY, "steps=1", "micro_batch=none", "log_every=1", "optim.warmup_steps=0", "tracker=none"]
    assert len(lines) == 2
    for line in lines:
        process = run_shell(" ".join([line, *short_args]), tmp_path)
        assert process.returncode == 0, process.stderr
    assert (tmp_path / "runs" / "mpp_vit_b16" / "encoder").is_dir()
    results = json.loads((tmp_path / "runs" / "finetune_vit_b16" / "results.json").read_text())
    assert results["samples"] == manifest.load(tmp_path / "shards" / "val").samples > 0


@pytest.mark.ranks
def test_two_processes_take_the_batches_of_one(shards: Path, tmp_path: Path):
    assert call_tool("pretrain", training_args(shards, tmp_path / "one")).code == 0
    processes = Start(training_args(shards, tmp_path / "two"), tmp_path / "logs", 2)
    assert processes.wait() == [0, 0], processes.output()
    single_rows, double_rows = tiny_runs.metric_rows(tmp_path / "one"), tiny_runs.metric_rows(tmp_path / "two")
    assert [row["step"] for row in single_rows] == [row["step"] for row in double_rows] == [4, 8, 12]
    for a, b in zip(single_rows, double_rows, strict=True):
        assert a["samples_digest"] == b["samples_digest"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert single_rows[-1]["val_samples"] == double_rows[-1]["val_samples"]
    assert single_rows[-1]["val_loss"] == pytest.approx(double_rows[-1]["val_loss"], rel=1e-4)
    # two processes go on where one stopped, and the other way round
    for step in (tmp_path / "two" / "checkpoints").glob("step-00000012"):
        step.rename(tmp_path / "gone")
    resumed = call_tool("pretrain", training_args(shards, tmp_path / "two"))
    assert resumed.code == 0, resumed.output
    assert [row["samples_digest"] for row in tiny_runs.metric_rows(tmp_path / "two")] == [
        row["samples_digest"] for row in single_rows
    ]


@pytest.mark.process
def test_training_ends_with_its_launcher_and_saves_first(shards: Path, tmp_path: Path):
    """accelerate's launcher forwards no signal: without care the training would go on as an orphan."""
    run = tmp_path / "run"
    args = [*training_args(shards, run), "steps=100000", "log_every=1", "save_every=100000", "data.workers=1"]
    command = ["accelerate", "launch", "tools/pretrain.py", *args]
    process = subprocess.Popen(command, cwd=ROOT, env=SHELL_ENV, stderr=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)  # the training's words too: it holds the same pipe until it has ended
    exit_info = json.loads((run / "exit.json").read_text())
    assert exit_info["code"] == 75
    step = exit_info["step"]
    assert f"pretrain.py: stopped at step {step} of 100000; the same command goes on" in errors
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", f"step-{step:08d}"}
    assert len(tiny_runs.metric_rows(run)) == step - 1  # the last is owed


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.process)], ids=["here", "processes"])
def test_the_demo_in_short(
    real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """folder -> shards -> accelerate launch pretrain -> finetune twice -> one table, as `make demo` runs it.

    Without processes of its own each command runs in this one, on squares in the place of its pictures.
    """
    demo_dir, calls = tmp_path / "runs" / "demo", []
    if real:
        process = run_shell("python tools/demo.py steps=4 log_every=2", link_project(tmp_path))
        assert process.returncode == 0, process.stderr
        output = process.stdout
    else:

        def run(command: list[str]) -> subprocess.CompletedProcess:
            index = next(number for number, argument in enumerate(command) if argument.startswith("tools/"))
            calls.append(" ".join([*(["launch"] if "launch" in command else []), Path(command[index]).stem]))
            return subprocess.CompletedProcess(command, call_tool(Path(command[index]).stem, command[index + 1 :]).code)

        draw_squares(demo_dir / "images", side=32)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(subprocess, "run", run)
        main = runpy.run_path(str(ROOT / "tools" / "demo.py"))["main"]
        assert main(["steps=2", "log_every=1", "data.workers=0"]) == 0
        assert calls == ["make_shards", "launch pretrain", "launch finetune", "launch finetune", "analyze"]
        output = capsys.readouterr().out
        with pytest.raises(SystemExit) as error:
            main(["optim.lrr=1"])
        assert (error.value.code, calls[5:]) == (64, ["make_shards", "launch pretrain"])
    table = output[output.index("\npretraining") :]
    for text in ("masked loss", "by label frequency", "uniform", "pretrained", "from scratch", "images/s"):
        assert text in table
    assert (demo_dir / "pretrain" / "reconstruction.png").exists()
    assert list((demo_dir / "pretrain" / "tensorboard").glob("events.*"))
    assert (json.loads((demo_dir / "finetune" / "results.json").read_text())["samples"] > 300) == real
    assert (demo_dir / "inside" / "report.html").exists()


@pytest.mark.parametrize(("page", "least"), [("README.md", 4), ("docs/benchmarks.md", 1)])
def test_the_training_commands_parse(page: str, least: int):
    """Backslashes join lines; every key=value of a training command is a key of its tool."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    matches = re.findall(r"tools/(pretrain|finetune)\.py ([^\n`]*)", text)
    commands = [(tool, arguments) for tool, arguments in matches if "recipe=NAME" not in arguments]
    assert len(commands) >= least
    for tool, args in commands:
        args = [word for word in args.split("#")[0].split() if "=" in word and "..." not in word]
        config.parse({"pretrain": Pretrain, "finetune": Finetune}[tool], args)


def test_links_lead_somewhere_no_blank_is_left_and_the_list_of_parts_is_complete():
    for page in (ROOT / "README.md", ROOT / "RESULTS.md"):
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (page.parent / target).exists(), target
        assert not re.findall(r"\b[A-Z]+_[A-Z]+\b(?!=)", re.sub(r"`[^`]*`|```.*?```", "", text, flags=re.S))
    parts = [part for part in (ROOT / "ssl_vit").iterdir() if part.suffix == ".py" or (part / "__init__.py").exists()]
    for part in [*ROOT.glob("tools/*.py"), *parts]:
        name = part.name if part.suffix else f"{part.name}/"
        assert f"  {name} " in (ROOT / "README.md").read_text() or name.startswith("__"), name
