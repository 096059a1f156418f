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

from ssl_vit import config, recipes
from ssl_vit.data import manifest
from ssl_vit.recipes import Finetune, Pretrain
from tests import tiny_runs
from tests.conftest import TINY, draw_squares
from tests.starts import Start, call

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # as Python has it where it starts one of them
HERE = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
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


def test_the_three_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """folder -> shards, here -> `accelerate launch` of both trainings, as they stand there but for their sizes."""
    draw_squares(linked(tmp_path) / "images")
    wanted = r"^(?:python tools/make_shards|accelerate launch tools/(?:pretrain|finetune)).*$"
    first, *lines = re.findall(wanted, (ROOT / "README.md").read_text(), re.M)[:3]
    monkeypatch.chdir(tmp_path)
    made = call("make_shards", shlex.split(first)[2:])
    assert made.code == 0
    assert "samples, 3 classes, 1 shards" in made.said
    short = [*TINY, "steps=1", "micro_batch=none", "log_every=1", "optim.warmup_steps=0", "tracker=none"]
    assert len(lines) == 2
    for line in lines:
        done = shell(" ".join([line, *short]), tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mpp_vit_b16" / "encoder").is_dir()
    results = json.loads((tmp_path / "runs" / "finetune_vit_b16" / "results.json").read_text())
    assert results["samples"] == manifest.load(tmp_path / "shards" / "val").samples > 0


@pytest.mark.ranks
def test_two_processes_take_the_batches_of_one(shards: Path, tmp_path: Path):
    assert call("pretrain", training(shards, tmp_path / "one")).code == 0
    two = Start(training(shards, tmp_path / "two"), tmp_path / "logs", 2)
    assert two.wait() == [0, 0], two.said()
    first, second = tiny_runs.rows(tmp_path / "one"), tiny_runs.rows(tmp_path / "two")
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
    assert [row["samples_digest"] for row in tiny_runs.rows(tmp_path / "two")] == [
        row["samples_digest"] for row in first
    ]


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
    assert len(tiny_runs.rows(run)) == step - 1  # the last is owed


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


@pytest.mark.parametrize(("page", "least"), [("README.md", 4), ("docs/benchmarks.md", 1)])
def test_the_training_commands_parse(page: str, least: int):
    """Backslashes join lines; every key=value of a training command is a key of its tool."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = re.findall(r"tools/(pretrain|finetune)\.py ([^\n`]*)", text)
    commands = [(tool, rest) for tool, rest in found if "recipe=NAME" not in rest]
    assert len(commands) >= least
    for tool, rest in commands:
        arguments = [word for word in rest.split("#")[0].split() if "=" in word and "..." not in word]
        config.parse({"pretrain": Pretrain, "finetune": Finetune}[tool], arguments, recipes.FOLDER)


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
