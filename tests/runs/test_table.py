"""tools/runs.py shows runs side by side, and of one what the next start of it finds; it changes nothing.

What it says is what the runs' files say, however odd those are.
"""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ssl_vit import commands, config
from ssl_vit.commands import runs as command
from ssl_vit.commands.runs import report_runs
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.recipes import Finetune, Pretrain
from ssl_vit.runs import status, table
from ssl_vit.train import checkpoint
from ssl_vit.train.run_folder import Run
from tests.conftest import build_once
from tests.processes import Start, call_tool
from tests.tiny_runs import run_args
from tests.train.engines import rows

ROOT = Path(__file__).parents[2]
STEPS = (2, 4, 6, 8)
KILLED_ARGS = ("steps=20", "save_every=2", "keep=9", "data.workers=0")
EXIT_REASONS = {0: "done", 65: "the loss is not a number", 70: "out of memory", 75: "stopped by SIGTERM"}
RECIPE_ARGS = (
    "steps=40",
    "encoder.width=16",
    "encoder.depth=2",
    "encoder.heads=2",
    "encoder.patch=4",
    "data.train=shards",
)


def write_recipe(folder: Path, *args: str, schema: Any = Pretrain) -> Path:
    """A run folder with the recipe of these words."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = config.parse(schema, [*RECIPE_ARGS, f"run={folder}", *args])
    (folder / "recipe.yaml").write_text(config.dump(recipe))
    return folder


def write_metrics(folder: Path, steps: range, seed: int, name: str = "val_loss") -> list[dict[str, Any]]:
    """Rows of metrics as training writes them, each fourth with an evaluation; also returned."""
    rng = random.Random(seed)
    logged_rows = []
    for step in steps:
        row: dict[str, Any] = {"step": step, "loss": rng.uniform(1, 6), "images_per_second": rng.uniform(50, 5000)}
        row |= {"unigram_entropy": 4.8, "uniform": math.log(512), "neighbor_loss": 3.5, "accuracy": rng.random()}
        if step % 4 == 0:
            row |= {name: rng.uniform(0, 1), "val_accuracy": rng.random(), "val_samples": 733}
            row |= {"val_unigram_entropy": 4.7, "val_uniform": math.log(512)}
        logged_rows.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged_rows))
    return logged_rows


def write_exit(folder: Path, code: int, step: int = 0) -> None:
    (folder / "exit.json").write_text(json.dumps({"code": code, "step": step, "reason": EXIT_REASONS[code], "rank": 0}))


def write_results(folder: Path, **results: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))


def list_runs(*runs: Path, **options: Any) -> list[dict[str, Any]]:
    """The JSON document."""
    (text,) = report_runs(command.Config(run=tuple(map(str, runs)), json=True, **options))
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def read_run(folder: Path) -> dict[str, Any]:
    return next(run for run in list_runs(folder) if run["path"] == str(folder))


def text_lines(*runs: Path, width: int | None = None, color: bool = False, **options: Any) -> list[str]:
    return list(report_runs(command.Config(run=tuple(map(str, runs)), **options), width, color))


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size, path.read_bytes()) for path in files}


def split_cells(line: str) -> list[str]:
    """Of a line of a table; columns are at least two blanks apart, and cells hold no two."""
    return re.split(r"\s{2,}", line.strip())


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Pretrainings that are done, failed, killed; a fine-tuning with its parts; an evaluation."""
    root = tmp_path / "runs"
    write_metrics(write_recipe(root / "done", "seed=1"), range(1, 41), 1)
    write_exit(root / "done", 0, 40)
    write_metrics(write_recipe(root / "failed", "head.kind=patch_colors", "optim.lr=0.5"), range(1, 18), 2, "knn_top1")
    write_exit(root / "failed", 65, 17)
    write_metrics(write_recipe(root / "killed", "head.ratio=0.3"), range(1, 3), 3)
    tuned = write_recipe(root / "tuned", "sweep.lr=0.1,0.3", "seeds=2", schema=Finetune)
    write_results(tuned, top1=0.7, top1_sd=0.01, samples=733, seeds=[])
    write_exit(tuned, 0)
    for seed in (2, 10):
        part = write_recipe(tuned / f"seed-{seed}", f"seed={seed}", schema=Finetune)
        write_metrics(part, range(1, 41), 9, "val_top1")
        write_results(part, top1=0.5 + seed / 100, step=40)
    trial = write_recipe(tuned / "sweep" / "lr-0.1", "data.holdout=0.1", schema=Finetune)
    write_results(trial, top1=0.9, protocol={"data.holdout": 0.1})
    evaluations = [{"who": source, "method": method, "top1": top1} for source, method, top1 in EVALUATIONS]
    write_results(root / "judged", encoder="runs/done", rows=evaluations)
    return root


EVALUATIONS = [("pretrained", "knn", 0.8), ("pretrained", "linear", 0.6), ("pretrained", "linear", 0.65)]
EVALUATIONS += [("untrained", "linear", 0.99)]
RUN_NAMES = ["done", "failed", "judged", "killed", "tuned", "tuned/seed-2", "tuned/seed-10", "tuned/sweep/lr-0.1"]


def test_all_runs_are_found_and_nothing_that_is_none(runs: Path):
    """Below any folder, in the order in which people count, through links once; not in what a run wrote itself."""
    deep_run = runs.joinpath(*["deeper"] * status.MAX_DEPTH)
    hidden_names = ("checkpoints/step-00000002", "before-20260101T000000", "encoder", ".cache")
    for folder in (*(runs / "done" / name for name in hidden_names), deep_run, deep_run / "too-deep"):
        write_recipe(folder)
    (runs / "killed" / "again").symlink_to(runs)
    (runs / "done-too").symlink_to(runs / "done")
    (runs / "notes").mkdir()
    names = [run["run"] for run in list_runs(runs)]
    assert names == [str(deep_run.relative_to(runs)), *RUN_NAMES]
    assert table.run_names([runs / "a" / "run", runs / "b" / "run"]) == ["a/run", "b/run"]  # as short as they can be
    assert [run["run"] for run in list_runs(runs / "tuned")] == RUN_NAMES[4:]
    (runs.parent / "link").symlink_to(runs)
    assert len(list_runs(runs / "done", runs / "tuned", runs.parent / "link", runs)) == len(names)


def test_checkpoints_are_those_of_one_run_and_its_parts(runs: Path):
    begin_text = "no checkpoint: the same command begins at step 0"
    whole_text, trial_text = (
        "the same command goes on where its parts stand",
        "the same command takes its result as it is",
    )
    assert [run["resume"] for run in list_runs(runs / "tuned")] == [whole_text, begin_text, begin_text, trial_text]
    assert not any("resume" in run for run in list_runs(runs))
    assert [run["run"] for run in list_runs(runs, checkpoints=True) if "resume" not in run] == ["judged"]


def test_the_table_says_what_the_rows_say(runs: Path):
    """Computed from the files with plain loops."""
    for run in list_runs(runs):
        if not (runs / run["run"] / "metrics.jsonl").exists():
            assert (run["step"], run["loss"], run["images_per_second"]) == (None, None, None)
            continue
        logged_rows = rows(runs / run["run"])
        assert run["step"] == logged_rows[-1]["step"] == len(logged_rows)
        assert run["steps"] == 40
        assert run["loss"] == logged_rows[-1]["loss"]
        assert run["images_per_second"] == statistics.median(row["images_per_second"] for row in logged_rows[-10:])
        for score in run["scores"]:
            values = [row.get(score["metric"]) for row in logged_rows]
            if "step" in score:
                best = (min if "loss" in score["metric"] else max)(value for value in values if value is not None)
                assert (score["value"], score["step"]) == (best, 1 + values.index(best))
    metrics = ["val_loss", "knn_top1", "linear top1", None, *["top1"] * 3, "held-out top1"]
    best = {run["run"]: run["best"] and run["best"]["metric"] for run in list_runs(runs)}
    assert best == dict(zip(RUN_NAMES, metrics, strict=True))
    assert read_run(runs / "judged")["best"]["value"] == 0.65
    cells_by_run = {row[0]: row for row in map(split_cells, text_lines(runs)[1 : 1 + len(RUN_NAMES)])}
    logged_rows = rows(runs / "failed")
    values = [row.get("knn_top1", -1) for row in logged_rows]
    best = f"knn_top1 {100 * max(values):.2f}% @{1 + values.index(max(values))}"
    speed = f"{read_run(runs / 'failed')['images_per_second']:,.0f}"
    expected = ["failed", "failed", "17 of 40", f"{logged_rows[-1]['loss']:#.4g}", best, speed]
    assert cells_by_run["failed"] == [*expected, "patch_colors ViT-16x2x2x64/4", "the loss is not a number (65)"]
    assert cells_by_run["tuned"][:5] == ["tuned", "finished", "-", "-", "top1 70.00% ± 1.00"]
    assert cells_by_run["judged"][6] == "evaluation of done"


def test_how_a_run_stands(tmp_path: Path):
    run = write_recipe(tmp_path / "run")
    assert (read_run(run)["state"], read_run(run)["step"]) == ("killed", None)
    write_metrics(run, range(1, 5), 0)
    write_results(run, step=3)  # of an end with fewer steps
    assert read_run(run)["state"] == "killed"
    write_metrics(run, range(1, 41), 0)
    assert read_run(run)["state"] == "finished"
    (run / "results.json").unlink()
    states = {
        0: ("finished", ""),
        65: ("failed", f"{EXIT_REASONS[65]} (65)"),
        70: ("failed", f"{EXIT_REASONS[70]} (70)"),
    }
    for code, expected in (states | {75: ("preempted", EXIT_REASONS[75])}).items():
        write_exit(run, code, 47)
        shown_run = read_run(run)
        assert (shown_run["state"], shown_run["why"]) == expected
        assert shown_run["step"] == 47  # a checkpoint may be younger than the last row
    (run / "exit.json").write_text('{"code": 78, "reason": "run=runs/x: was started with other keys"}')
    assert read_run(run)["why"] == "was started with other keys (78)"


def test_a_part_stands_as_its_fine_tuning_does(runs: Path):
    """Parts have no exit.json: their results say that they are done, and the whole says the rest."""
    for part in (runs / "tuned", runs / "tuned" / "seed-2"):
        (part / "results.json").unlink()
    for code, state in ((0, "killed"), (75, "preempted"), (65, "failed")):
        write_exit(runs / "tuned", code)
        assert [read_run(runs / "tuned" / name)["state"] for name in ("seed-2", "seed-10")] == [state, "finished"]
    write_results(runs / "tuned" / "sweep" / "lr-0.1", top1=0, diverged="at step 3")
    (trial,) = (run for run in list_runs(runs) if run["run"].endswith("lr-0.1"))
    assert (trial["state"], trial["why"]) == ("failed", "at step 3")
    nested = write_recipe(runs / "done" / "other")  # in a run's folder, and no part of it
    write_exit(runs / "done", 75)
    assert read_run(nested)["state"] == "killed"


def test_a_run_that_is_held_is_running(tmp_path: Path):
    folder = tmp_path / "held"
    locked_run = Run(folder)
    locked_run.acquire(config.parse(Pretrain, [*RECIPE_ARGS, f"run={folder}"]))
    try:
        assert read_run(folder)["state"] == "running"
        assert re.search(f"pid {os.getpid()} .*{socket.gethostname()}$", read_run(folder)["why"])
        assert f"in use by pid {os.getpid()}" in "".join(text_lines(folder))
        os.utime(folder / ".lock", (0, 0))  # its holder cannot touch it; the lock is there
        assert read_run(folder)["state"] == "running"
    finally:
        locked_run.release()
    assert read_run(folder)["state"] == "killed"
    assert "in use" not in "".join(text_lines(folder))
    (folder / ".lock").write_text("pid 12 since yesterday on another-machine\n")
    assert (read_run(folder)["state"], read_run(folder)["why"]) == (
        "running",
        "pid 12 since yesterday on another-machine",
    )
    os.utime(folder / ".lock", (0, time.time() - 7300))
    assert (read_run(folder)["state"], read_run(folder)["why"][-17:]) == ("killed", "e, silent for 2 h")


def test_the_keys_that_differ_are_all_of_them_and_no_other(runs: Path):
    """Of each kind, by comparing every pair of recipes; a key that an older version did not have has its default."""
    path = runs / "killed" / "recipe.yaml"
    path.write_text(path.read_text().replace("ema_decay: null\n", "").replace("on_loss_spike: warn\n", ""))

    def flat(tree: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {name: tree}
        parts = [flat(value, f"{name}.{part}".strip(".")) for part, value in tree.items()]
        return {key: value for part in parts for key, value in part.items()}

    differing = {run["run"]: run["differing"] for run in list_runs(runs)}
    for group in (("done", "failed", "killed"), RUN_NAMES[4:]):
        texts = {name: yaml.safe_load((runs / name / "recipe.yaml").read_text()) for name in group}
        trees = {name: {"ema_decay": None, "on_loss_spike": "warn"} | flat(tree) for name, tree in texts.items()}
        names = {key for tree in trees.values() for key in tree} - {"run"}
        expected = {k for k in names for a in group for b in group if trees[a].get(k) != trees[b].get(k)}
        assert {"ema_decay", "on_loss_spike"}.isdisjoint(expected)
        for name in group:
            assert set(differing[name]) == expected
            for key, value in differing[name].items():
                expected_value = trees[name].get(key)
                text = ",".join(map(str, expected_value)) if isinstance(expected_value, list) else expected_value
                assert value == text or yaml.safe_load(value) == expected_value, key
    assert differing["judged"] == {}
    assert differing["done"]["head.kind"] == "mean_color"
    assert differing["failed"]["head.bits"] is None


def test_what_there_is_more_of_goes_down(runs: Path):
    """Runs, or keys; long values are cut, in JSON they are not."""
    long_path = "/a" + "/very" * 20 + "/end"
    write_recipe(runs / "done", f"data.train={long_path}")
    (done_run, *_) = list_runs(runs)
    text = text_lines(runs, checkpoints=False)
    start = text.index("3 runs of pretraining, the keys that differ:")
    assert split_cells(text[start + 1]) == ["run", "done", "failed", "killed"]
    keys = text[start + 2 : text.index("", start)]
    assert [split_cells(line)[0] for line in keys] == list(done_run["differing"])
    (data_row,) = (split_cells(line) for line in keys if line.startswith("data.train"))
    assert data_row == ["data.train", long_path[:18] + ".." + long_path[-20:], "shards", "shards"]
    assert done_run["differing"]["data.train"] == long_path
    similar_runs = [write_recipe(runs.parent / "alike" / f"{i}", f"seed={i}") for i in range(4)]
    text = text_lines(similar_runs[0].parent)
    assert [split_cells(line) for line in text[-5:]] == [["run", "seed"], *([f"{i}", f"{i}"] for i in range(4))]
    for name in ("a", "b"):
        shutil.copytree(similar_runs[0], runs.parent / "same" / name)
    assert text_lines(runs.parent / "same")[-1] == "2 runs of pretraining: no key differs"


def test_a_terminal_has_colors_and_an_edge_and_a_pipe_has_neither(runs: Path):
    plain = text_lines(runs)
    assert not any("\033" in line for line in plain)
    assert max(map(len, plain)) > 100
    colored = text_lines(runs, color=True)
    assert [re.sub(r"\033\[\d*m", "", line) for line in colored] == plain
    pairs = zip(plain[1:9], colored[1:9], strict=True)
    states = {
        split_cells(line)[1]: re.findall(r"\033\[(\d+)m\S+\033\[0m", colored_line) for line, colored_line in pairs
    }
    assert states == {"finished": ["32"], "failed": ["31"], "killed": ["31"]}
    narrow = text_lines(runs, width=50)
    reasons = ["failed: the loss is not a number (65)", "killed: ended without a word"]  # else nobody could read it
    assert narrow[9:11] == reasons
    assert not set(reasons) & set(plain + text_lines(runs, width=500))
    del narrow[9:11]
    assert narrow == [line if len(line) <= 50 else line[:48] + ".." for line in plain]


def test_the_command_asks_what_it_writes_to(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """JSON is alone on stdout; colors and an edge are for a terminal, the first unless NO_COLOR is set."""
    assert commands.call(command, [f"run={runs}", "json=true"]) == 0
    out, err = capsys.readouterr()
    assert (len(json.loads(out)), err) == (len(RUN_NAMES), "")
    monkeypatch.setenv("COLUMNS", "70")
    for is_tty, no_color in ((False, ""), (True, ""), (True, "1")):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_tty=is_tty: is_tty)
        assert commands.call(command, [f"run={runs}"]) == 0
        out = capsys.readouterr().out
        assert ("\033[" in out) == (is_tty and not no_color)
        assert (len(re.sub(r"\033\[\d*m", "", out).splitlines()[0]) == 70) == is_tty


def append_text(run: Path, text: str, name: str = "metrics.jsonl") -> None:
    with (run / name).open("a") as file:
        file.write(text)


def replace_file(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else under the name of a run's file."""
    return lambda run: ((run / name).unlink(missing_ok=True), make(run / name))


def replace_content(name: str, content: str | bytes) -> Callable[[Path], object]:
    return replace_file(name, lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content))


ODD_RUNS: dict[str, Callable[[Path], object]] = {
    "a torn row": lambda run: append_text(run, '{"step": 99, "loss": 1.'),
    "rows of another": lambda run: append_text(run, '[1]\n"x"\n{"step": "x"}\n{}\n12\n\n'),
    "bytes": lambda run: (run / "metrics.jsonl").write_bytes(bytes(range(256)) + (run / "metrics.jsonl").read_bytes()),
    "a deep row": lambda run: append_text(run, "[" * 100_000 + "\n"),
    "metrics are a folder": replace_file("metrics.jsonl", Path.mkdir),
    "metrics are a pipe": replace_file("metrics.jsonl", os.mkfifo),
    "nulls": lambda run: append_text(run, '{"step": 41, "loss": null, "images_per_second": null, "val_loss": null}\n'),
    "NaN, words": lambda run: append_text(
        run, '{"step": 41, "loss": NaN, "val_loss": -Infinity, "images_per_second": "x"}\n'
    ),
    "huge": lambda run: append_text(run, f'{{"step": 41, "loss": 1{"0" * 400}, "val_loss": true}}\n'),
    "no recipe": lambda run: (run / "recipe.yaml").unlink(),
    "another's recipe": replace_content("recipe.yaml", "encoder: x\nhead: [1]\nsteps: {a: 1}\n1: 2\n"),
    "a pretraining of another version": lambda run: append_text(run, "gone: 1\n", "recipe.yaml"),
    "a huge recipe": replace_content("recipe.yaml", f"steps: {'9' * 5000}\n"),
    "a binary recipe": replace_content("recipe.yaml", bytes(range(256))),
    "a recipe that is a pipe": replace_file("recipe.yaml", os.mkfifo),
    "exit.json of another": replace_content("exit.json", '{"code": "x", "step": [], "reason": {}}'),
    "exit.json with signs": replace_content("exit.json", '{"code": 70, "reason": "\\u001b[2J\\n\\ud800"}'),
    "exit.json is binary": replace_content("exit.json", bytes(range(256))),
    "results of another": replace_content("results.json", '{"rows": [1, {}], "top1": "x", "protocol": 1}'),
    "a lock that is a folder": replace_file(".lock", Path.mkdir),
    "a lock of bytes": replace_content(".lock", b"\xff\xfe"),
    "an odd name": lambda run: run.rename(run.parent / os.fsdecode(b"a \x1b[31m\n\xff name  of it")),
    "nothing but exit.json": lambda run: [p.unlink() for p in run.iterdir() if p.name != "exit.json"],
}


@pytest.mark.parametrize("kind", ODD_RUNS)
def test_odd_runs_are_shown_and_the_others_as_before(runs: Path, kind: str):
    """Nothing on the disk is changed; lines are plain, and the JSON is JSON."""
    for name in ("failed", "tuned", "judged"):
        shutil.rmtree(runs / name)
    (killed_before,) = (run for run in list_runs(runs) if run["run"] == "killed")
    ODD_RUNS[kind](runs / "done")
    files, documents, output = snapshot(runs), list_runs(runs), text_lines(runs)
    assert snapshot(runs) == files
    odd_run, killed_run = sorted(documents, key=lambda run: run["run"] == "killed")
    assert killed_run | {"differing": 0} == killed_before | {"differing": 0}
    assert all(line.isprintable() for line in output)
    assert all(output[1:3])
    if kind in ("a torn row", "rows of another", "bytes", "a deep row"):
        assert (odd_run["step"], odd_run["loss_is_nan"]) == (40, False)
    if kind in ("nulls", "NaN, words"):
        assert (odd_run["step"], odd_run["loss"], odd_run["loss_is_nan"]) == (41, None, True)
        assert odd_run["best"]["step"] <= 40
        assert " nan " in output[1]
    if kind == "a pretraining of another version":
        assert (odd_run["recipe"], odd_run["steps"]) == ("mean_color vit", 40)


def test_ten_thousand_rows_are_not_all_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those with an evaluation are, and the last few."""
    run, parsed = write_recipe(tmp_path / "long"), []
    for step in range(1, 10_001):
        row = {"step": step, "loss": 2.0, "accuracy": 0.5, "images_per_second": 70.0}
        append_text(run, json.dumps(row | ({"val_loss": 1.0} if step % 1000 == 0 else {})) + "\n")
    monkeypatch.setattr(status, "_row", lambda line, parse=status._row: parsed.append(line) or parse(line))
    assert read_run(run)["best"] == {"metric": "val_loss", "value": 1.0, "step": 1000}
    assert len(parsed) < 30


def test_the_curves_are_the_rows(runs: Path):
    """As many lines as runs have rows of it, and a dashed one for each baseline."""
    rows_by_run = {name: status.read_rows(runs / name) for name in ("done", "failed", "killed")}
    figure = table.draw_curves(rows_by_run)
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["loss", "accuracy", "val accuracy", "images per second"]  # val_loss is of one run alone
    baselines = {"neighbor loss 3.5": 3.5, "unigram entropy 4.8": 4.8, "uniform 6.24": math.log(512)}
    for title, axes in panels.items():
        name = title.replace(" ", "_")
        curves = [line for line in axes.lines if line.get_linestyle() == "-"]
        expected = [[(row["step"], row[name]) for row in rows if name in row] for rows in rows_by_run.values()]
        assert [line.get_xydata().tolist() for line in curves] == [[*map(list, rows)] for rows in expected if rows]
        assert len({line.get_color() for line in curves}) == len(curves) == (2 if name == "val_accuracy" else 3)
        baseline_values = sorted(line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--")
        assert baseline_values == [*baselines.values()] * (name == "loss")
        assert {text.get_text() for text in axes.texts} == (set(baselines) if baseline_values else set())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(rows_by_run)
    colors = [line.get_color() for line in legend.get_lines()]
    assert colors == [line.get_color() for line in panels["loss"].lines[:3]]
    single_panels = {axes.get_title(): axes for axes in table.draw_curves({"done": rows_by_run["done"]}).axes}
    assert [line.get_ydata()[0] for line in single_panels["val loss"].lines[1:]] == [math.log(512), 4.7]


def test_a_gap_stays_a_gap_and_many_runs_have_many_colors(tmp_path: Path):
    rows = [{"step": step, "loss": None if step == 2 else 1.0} for step in (1, 2, 3)]
    for count in (1, 10, 11, 20, 21, 60):
        figure = table.draw_curves({f"_run {'x' * 60}{i}": rows for i in range(count)})
        curves = figure.axes[0].lines
        assert len({tuple(np.round(line.get_color(), 6)) for line in curves}) == count
        assert np.isnan(curves[0].get_ydata()).tolist() == [False, True, False]
        assert len({text.get_text() for text in figure.legends[0].get_texts()}) == count
    with pytest.raises(ExitError, match="share none") as end:
        table.draw_curves({"a": [{"step": 1}], "b": [{"step": 2, "loss": 1.0}]})
    assert end.value.code == ExitCode.DATA


def test_compare_writes_a_picture_and_the_table_of_these_runs(runs: Path, monkeypatch: pytest.MonkeyPatch):
    """By names below run=, or paths; a fine-tuning's curves are those of its parts, as it says."""
    monkeypatch.chdir(runs.parent)
    files = snapshot(runs)
    text = text_lines(Path("runs"), compare=("done", "runs/failed", "tuned"), checkpoints=None)
    assert [split_cells(line)[0] for line in text[1:4]] == ["done", "failed", "tuned"]
    assert text[-1] == "curves: compare.png"
    assert text[-2].endswith("runs/tuned/seed-2, runs/tuned/seed-10")
    with Image.open(runs.parent / "compare.png") as image:
        image.load()
        assert image.width > 1000
        assert 500 < image.height < 2000
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 20
    documents = list_runs(runs, compare=("done", "killed"), output="other.png")
    assert [run["run"] for run in documents] == ["done", "killed"]
    assert (runs.parent / "other.png").stat().st_size > 10_000
    assert snapshot(runs) == files


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ({"run": "nowhere"}, ExitCode.USAGE, "nowhere"),
        ({"run": "folder.png"}, ExitCode.USAGE, "folder.png"),  # there is no run in it
        (
            {"compare": ("done", "dome")},
            ExitCode.USAGE,
            "compare=dome: no run, by path or below run=.*there are done, failed",
        ),
        ({"compare": ("done",), "output": "no/x.png"}, ExitCode.USAGE, "output=no/x.png: there is no folder no"),
        ({"compare": ("done",), "output": "x.jpg"}, ExitCode.USAGE, "output=x.jpg: give the name of a picture"),
        ({"compare": ("done",), "output": "folder.png"}, ExitCode.USAGE, "output=folder.png: give the name"),
        ({"output": "x.png"}, ExitCode.USAGE, "output: is where compare= draws"),
        ({"compare": ("judged",)}, ExitCode.DATA, "judged: no row of metrics"),
        (
            {"compare": ("tuned",)},
            ExitCode.DATA,
            "tuned: no row of metrics to draw; its parts have: .*seed-2, .*seed-10",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(runs: Path, given, code, message, monkeypatch):
    monkeypatch.chdir(runs.parent)
    (runs.parent / "folder.png").mkdir()
    with pytest.raises(ExitError, match=message) as end:
        text_lines(runs.parent / given.pop("run", "runs"), **given)
    assert end.value.code == code
    assert "\n" not in end.value.message
    assert sorted(path.name for path in runs.parent.iterdir()) == ["folder.png", "runs"]


def test_the_command_ends_quietly_where_nobody_reads_on(runs: Path):
    """As before `| head`: no traceback, and no exit code that stands for something else."""
    command = [sys.executable, str(ROOT / "tools" / "runs.py"), f"run={runs}", "checkpoints=true"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}  # what waits is flushed at the end
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=runs) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


def test_the_recipe_that_a_command_named_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Kept in the first line of recipe.yaml, which stays the same recipe."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "recipe=some/where/mpp_flowers.yaml", "steps=2"])
    for name in ("named", "unnamed"):
        locked_run = Run(tmp_path / name)
        locked_run.acquire(config.parse(Pretrain, [*RECIPE_ARGS, f"run={tmp_path / name}"]))
        locked_run.release()
        monkeypatch.setattr(sys, "argv", ["pytest"])
    named_run, unnamed_run = list_runs(tmp_path)
    assert named_run["recipe"] == f"mpp_flowers {unnamed_run['recipe']}"
    assert named_run["differing"] == unnamed_run["differing"] == {}
    named_text, unnamed_text = [(tmp_path / name / "recipe.yaml").read_text() for name in ("named", "unnamed")]
    assert named_text.startswith("# recipe: some/where/mpp_flowers.yaml\n")
    assert yaml.safe_load(named_text) | {"run": ""} == yaml.safe_load(unnamed_text) | {"run": ""}


# checkpoints: what the next start of a run finds


@pytest.fixture
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A run with four checkpoints that was killed in its ninth step."""

    def make(folder: Path) -> None:
        start = Start(run_args(shards, folder / "run", *KILLED_ARGS), folder / "logs", 1, "kill:point=update:step=9")
        assert start.wait() == [-signal.SIGKILL], start.output()

    return shutil.copytree(build_once(tmp_path_factory, "killed", make) / "run", tmp_path / "runs" / "one")


def checkpoint_lines(folder: Path, verify: bool = True, checkpoints: bool | None = None) -> tuple[list[str], int]:
    """The lines on checkpoints, which follow the table, and the code."""
    output, code = [], 0
    try:
        output.extend(report_runs(command.Config(run=(str(folder),), verify=verify, checkpoints=checkpoints)))
    except ExitError as end:
        output, code = [*output, end.message], end.code
    return after_table(output, folder), code


def after_table(lines: list[str], folder: Path) -> list[str]:
    """From the first line that opens with a path of a run; blank ones left out."""
    return list(itertools.dropwhile(lambda line: not line.startswith(str(folder)), filter(None, lines)))


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def damage_checkpoint(run: Path, step: int) -> None:
    os.truncate(checkpoint_path(run, step) / "optimizer.safetensors", 100)


def test_the_command_lists_what_is_there_and_changes_nothing(run: Path):
    """As a command says it; newest first, with step, size, age and what is wrong."""
    damage_checkpoint(run, 6)
    files = snapshot(run)
    code, output = call_tool("runs", [f"run={run.parent}"])
    assert code == 0, output
    assert output.split("\n")[0].split() == ["run", "state", "step", "loss", "best", "images/s", "recipe", "why"]
    lines = after_table(output.splitlines(), run)
    assert lines[0].startswith(f"{run}  ")
    assert "killed" in lines[0]
    assert [int(line.split()[0]) for line in lines[1:5]] == [8, 6, 4, 2]
    size = sum(path.stat().st_size for path in checkpoint_path(run, 8).iterdir())
    assert f"{size / 1e3:.1f} kB" in lines[1]
    assert re.search(r"\d+ s old  verified$", lines[1])
    assert lines[2].endswith("damaged: optimizer.safetensors differs from its digest")
    assert lines[5] == "  the same command goes on from step 8 of 20"
    assert snapshot(run) == files
    assert not list(run.rglob("*corrupt*"))


@pytest.mark.parametrize("count", range(5))
def test_what_it_says_is_what_a_start_finds(run: Path, tmp_path: Path, count: int):
    """Of every set of so many damaged checkpoints."""
    for i, damaged_steps in enumerate(itertools.combinations(STEPS, count)):
        run_copy = shutil.copytree(run, tmp_path / f"{i}")
        for step in damaged_steps:
            damage_checkpoint(run_copy, step)
        lines, code = checkpoint_lines(run_copy)
        if len(damaged_steps) == len(STEPS):
            with pytest.raises(ExitError) as end:
                checkpoint.newest_valid(run_copy / "checkpoints")
            assert code == end.value.code == ExitCode.INTEGRITY
            assert "the same command refuses (76)" in lines[-2]
            assert str(run_copy) in lines[-1]
        else:
            step = max({*STEPS} - {*damaged_steps})
            assert (code, checkpoint.newest_valid(run_copy / "checkpoints")) == (0, checkpoint_path(run_copy, step))
            assert f"goes on from step {step} of 20" in lines[-1]
            backups = {path.name.split(".")[0] for path in (run_copy / "checkpoints").glob("*corrupt*")}
            assert set(re.findall(r"step-\d+", lines[-1])) == backups
        repeated, _ = checkpoint_lines(run_copy)  # with what was put aside
        assert sum("put aside as damaged" in line for line in repeated) == len(list(run_copy.rglob("*corrupt*")))


def test_a_checkpoint_of_another_version_is_not_gone_past(run: Path):
    path = checkpoint_path(run, 8) / "MANIFEST.json"
    content = json.loads(path.read_text())
    del content["digest"]
    path.write_text(checkpoint._encode_manifest(content | {"version": 99}))
    messages, _ = checkpoint_lines(run)
    assert "version 99" in messages[1]
    with pytest.raises(ExitError):
        checkpoint.newest_valid(run / "checkpoints")  # by a start, as is said
    assert ("goes on" in messages[5], "76" in messages[5]) == (False, True)


def test_of_several_runs_checkpoints_are_read_where_that_is_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch):
    """Those of many runs are terabytes; then 76 is said as of one."""
    damaged_run = shutil.copytree(run, run.parent / "two")
    for step in STEPS:
        damage_checkpoint(damaged_run, step)
    assert checkpoint_lines(run.parent, checkpoints=True)[1] == checkpoint_lines(damaged_run)[1] == ExitCode.INTEGRITY
    monkeypatch.setattr(checkpoint, "find_corruption", lambda _: pytest.fail("a checkpoint was read"))
    assert checkpoint_lines(run.parent) == ([], 0)
    assert checkpoint_lines(damaged_run, checkpoints=False) == ([], 0)
    with pytest.raises(pytest.fail.Exception):
        checkpoint_lines(run)
    messages, code = checkpoint_lines(damaged_run, verify=False)
    assert (code, sum(line.endswith("not verified") for line in messages)) == (0, 4)


LISTED_RUNS: dict[str, Callable[[Path], object]] = {
    "exit.json is deep": replace_content("exit.json", "[" * 100_000),
    "recipe.yaml is a loop": replace_content("recipe.yaml", "steps: &a [*a]\n"),
    "steps are no number": replace_content("recipe.yaml", "steps: many\n"),
    "a name that is none": lambda run: (run / "checkpoints" / "step-x.corrupt-y").mkdir(),
    "a file": lambda run: checkpoint_path(run, 10).touch(),
    "a pipe": lambda run: os.mkfifo(checkpoint_path(run, 10)),
    "a link to itself": lambda run: checkpoint_path(run, 10).symlink_to("step-00000010"),
    "a link out": lambda run: checkpoint_path(run, 10).symlink_to("/etc"),
    "no checkpoints folder": lambda run: shutil.rmtree(run / "checkpoints"),
    "a checkpoints file": lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()),
}


@pytest.mark.parametrize("kind", LISTED_RUNS)
def test_odd_run_folders_are_listed_too(run: Path, kind: str):
    """And the others beside them."""
    good_run = shutil.copytree(run, run.parent / "two")
    LISTED_RUNS[kind](run)
    lines, code = checkpoint_lines(run.parent, checkpoints=True)
    assert code == 0
    assert [sum(line.startswith(f"{run_folder}  ") for line in lines) for run_folder in (run, good_run)] == [1, 1]
    assert lines[-1] == "  the same command goes on from step 8 of 20"
