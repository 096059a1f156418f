"""tools/runs.py shows runs side by side, and of one what the next start of it finds; it changes nothing.

What it says is what the runs' files say, however odd those are.
"""

import itertools
import json
import math
import os
import random
import re
import runpy
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

from ssl_vit import config, recipes
from ssl_vit.commands.runs import Runs, report
from ssl_vit.errors import DATA, INTEGRITY, USAGE, Refusal
from ssl_vit.recipes import Finetune, Pretrain
from ssl_vit.runs import status, table
from ssl_vit.train import checkpoint
from ssl_vit.train.run_folder import Run
from tests.conftest import once
from tests.starts import Start, call
from tests.tiny_runs import words
from tests.train.engines import rows

ROOT = Path(__file__).parents[2]
STEPS = (2, 4, 6, 8)
KILLED = ("steps=20", "save_every=2", "keep=9", "data.workers=0")
ENDS = {0: "done", 65: "the loss is not a number", 70: "out of memory", 75: "stopped by SIGTERM"}
MORE = ("steps=40", "encoder.width=16", "encoder.depth=2", "encoder.heads=2", "encoder.patch=4", "data.train=shards")


def written(folder: Path, *words: str, schema: Any = Pretrain) -> Path:
    """A run folder with the recipe of these words."""
    folder.mkdir(parents=True, exist_ok=True)
    made = config.parse(schema, [*MORE, f"run={folder}", *words], recipes.FOLDER)
    (folder / "recipe.yaml").write_text(config.dump(made))
    return folder


def logged(folder: Path, steps: range, seed: int, name: str = "val_loss") -> list[dict[str, Any]]:
    """Rows of metrics as training writes them, each fourth with an evaluation; also returned."""
    draw = random.Random(seed)
    made = []
    for step in steps:
        row: dict[str, Any] = {"step": step, "loss": draw.uniform(1, 6), "images_per_second": draw.uniform(50, 5000)}
        row |= {"unigram_entropy": 4.8, "uniform": math.log(512), "neighbour_loss": 3.5, "accuracy": draw.random()}
        if step % 4 == 0:
            row |= {name: draw.uniform(0, 1), "val_accuracy": draw.random(), "val_samples": 733}
            row |= {"val_unigram_entropy": 4.7, "val_uniform": math.log(512)}
        made.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return made


def ended(folder: Path, code: int, step: int = 0) -> None:
    (folder / "exit.json").write_text(json.dumps({"code": code, "step": step, "reason": ENDS[code], "rank": 0}))


def resulted(folder: Path, **given: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(given))


def found(*runs: Path, **more: Any) -> list[dict[str, Any]]:
    """The JSON document."""
    (text,) = report(Runs(run=tuple(map(str, runs)), json=True, **more))
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def one(folder: Path) -> dict[str, Any]:
    return next(run for run in found(folder) if run["path"] == str(folder))


def lines(*runs: Path, width: int | None = None, color: bool = False, **more: Any) -> list[str]:
    return list(report(Runs(run=tuple(map(str, runs)), **more), width, color))


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size, path.read_bytes()) for path in files}


def cells(line: str) -> list[str]:
    """Of a line of a table; columns are at least two blanks apart, and cells hold no two."""
    return re.split(r"\s{2,}", line.strip())


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Pretrainings that are done, failed, killed; a fine-tuning with its parts; an evaluation."""
    root = tmp_path / "runs"
    logged(written(root / "done", "seed=1"), range(1, 41), 1)
    ended(root / "done", 0, 40)
    logged(written(root / "failed", "head.kind=patch_colors", "optim.lr=0.5"), range(1, 18), 2, "knn_top1")
    ended(root / "failed", 65, 17)
    logged(written(root / "killed", "head.ratio=0.3"), range(1, 3), 3)
    tuned = written(root / "tuned", "sweep.lr=0.1,0.3", "seeds=2", schema=Finetune)
    resulted(tuned, top1=0.7, top1_sd=0.01, samples=733, seeds=[])
    ended(tuned, 0)
    for seed in (2, 10):
        part = written(tuned / f"seed-{seed}", f"seed={seed}", schema=Finetune)
        logged(part, range(1, 41), 9, "val_top1")
        resulted(part, top1=0.5 + seed / 100, step=40)
    trial = written(tuned / "sweep" / "lr-0.1", "data.hold_out=0.1", schema=Finetune)
    resulted(trial, top1=0.9, protocol={"data.hold_out": 0.1})
    judged = [{"who": who, "method": m, "top1": t} for who, m, t in JUDGED]
    resulted(root / "judged", encoder="runs/done", rows=judged)
    return root


JUDGED = [("pretrained", "knn", 0.8), ("pretrained", "linear", 0.6), ("pretrained", "linear", 0.65)]
JUDGED += [("untrained", "linear", 0.99)]
ALL = ["done", "failed", "judged", "killed", "tuned", "tuned/seed-2", "tuned/seed-10", "tuned/sweep/lr-0.1"]


def test_all_runs_are_found_and_nothing_that_is_none(runs: Path):
    """Below any folder, in the order in which people count, through links once; not in what a run wrote itself."""
    deep = runs.joinpath(*["deeper"] * status.DEPTH)
    hidden = ("checkpoints/step-00000002", "before-20260101T000000", "encoder", ".cache")
    for folder in (*(runs / "done" / name for name in hidden), deep, deep / "too-deep"):
        written(folder)
    (runs / "killed" / "again").symlink_to(runs)
    (runs / "done-too").symlink_to(runs / "done")
    (runs / "notes").mkdir()
    names = [run["run"] for run in found(runs)]
    assert names == [str(deep.relative_to(runs)), *ALL]
    assert table.names([runs / "a" / "run", runs / "b" / "run"]) == ["a/run", "b/run"]  # as short as they can be
    assert [run["run"] for run in found(runs / "tuned")] == ALL[4:]
    (runs.parent / "link").symlink_to(runs)
    assert len(found(runs / "done", runs / "tuned", runs.parent / "link", runs)) == len(names)


def test_checkpoints_are_those_of_one_run_and_its_parts(runs: Path):
    begin = "no checkpoint: the same command begins at step 0"
    whole, trial = "the same command goes on where its parts stand", "the same command takes its result as it is"
    assert [run["resume"] for run in found(runs / "tuned")] == [whole, begin, begin, trial]
    assert not any("resume" in run for run in found(runs))
    assert [run["run"] for run in found(runs, checkpoints=True) if "resume" not in run] == ["judged"]


def test_the_table_says_what_the_rows_say(runs: Path):
    """Computed from the files with plain loops."""
    for run in found(runs):
        if not (runs / run["run"] / "metrics.jsonl").exists():
            assert (run["step"], run["loss"], run["images_per_second"]) == (None, None, None)
            continue
        made = rows(runs / run["run"])
        assert run["step"] == made[-1]["step"] == len(made)
        assert run["steps"] == 40
        assert run["loss"] == made[-1]["loss"]
        assert run["images_per_second"] == statistics.median(row["images_per_second"] for row in made[-10:])
        for score in run["scores"]:
            values = [row.get(score["metric"]) for row in made]
            if "step" in score:
                best = (min if "loss" in score["metric"] else max)(value for value in values if value is not None)
                assert (score["value"], score["step"]) == (best, 1 + values.index(best))
    metrics = ["val_loss", "knn_top1", "linear top1", None, *["top1"] * 3, "held-out top1"]
    best = {run["run"]: run["best"] and run["best"]["metric"] for run in found(runs)}
    assert best == dict(zip(ALL, metrics, strict=True))
    assert one(runs / "judged")["best"]["value"] == 0.65
    table = {row[0]: row for row in map(cells, lines(runs)[1 : 1 + len(ALL)])}
    made = rows(runs / "failed")
    values = [row.get("knn_top1", -1) for row in made]
    best = f"knn_top1 {100 * max(values):.2f}% @{1 + values.index(max(values))}"
    speed = f"{one(runs / 'failed')['images_per_second']:,.0f}"
    said = ["failed", "failed", "17 of 40", f"{made[-1]['loss']:#.4g}", best, speed]
    assert table["failed"] == [*said, "patch_colors ViT-16x2x2x64/4", "the loss is not a number (65)"]
    assert table["tuned"][:5] == ["tuned", "finished", "-", "-", "top1 70.00% ± 1.00"]
    assert table["judged"][6] == "evaluation of done"


def test_how_a_run_stands(tmp_path: Path):
    run = written(tmp_path / "run")
    assert (one(run)["state"], one(run)["step"]) == ("killed", None)
    logged(run, range(1, 5), 0)
    resulted(run, step=3)  # of an end with fewer steps
    assert one(run)["state"] == "killed"
    logged(run, range(1, 41), 0)
    assert one(run)["state"] == "finished"
    (run / "results.json").unlink()
    states = {0: ("finished", ""), 65: ("failed", f"{ENDS[65]} (65)"), 70: ("failed", f"{ENDS[70]} (70)")}
    for code, said in (states | {75: ("preempted", ENDS[75])}).items():
        ended(run, code, 47)
        shown = one(run)
        assert (shown["state"], shown["why"]) == said
        assert shown["step"] == 47  # a checkpoint may be younger than the last row
    (run / "exit.json").write_text('{"code": 78, "reason": "run=runs/x: was started with other keys"}')
    assert one(run)["why"] == "was started with other keys (78)"


def test_a_part_stands_as_its_fine_tuning_does(runs: Path):
    """Parts have no exit.json: their results say that they are done, and the whole says the rest."""
    for part in (runs / "tuned", runs / "tuned" / "seed-2"):
        (part / "results.json").unlink()
    for code, state in ((0, "killed"), (75, "preempted"), (65, "failed")):
        ended(runs / "tuned", code)
        assert [one(runs / "tuned" / name)["state"] for name in ("seed-2", "seed-10")] == [state, "finished"]
    resulted(runs / "tuned" / "sweep" / "lr-0.1", top1=0, diverged="at step 3")
    (trial,) = (run for run in found(runs) if run["run"].endswith("lr-0.1"))
    assert (trial["state"], trial["why"]) == ("failed", "at step 3")
    nested = written(runs / "done" / "other")  # in a run's folder, and no part of it
    ended(runs / "done", 75)
    assert one(nested)["state"] == "killed"


def test_a_run_that_is_held_is_running(tmp_path: Path):
    folder = tmp_path / "held"
    holder = Run(folder)
    holder.claim(config.parse(Pretrain, [*MORE, f"run={folder}"], recipes.FOLDER))
    try:
        assert one(folder)["state"] == "running"
        assert re.search(f"pid {os.getpid()} .*{socket.gethostname()}$", one(folder)["why"])
        assert f"in use by pid {os.getpid()}" in "".join(lines(folder))
        os.utime(folder / ".lock", (0, 0))  # its holder cannot touch it; the lock is there
        assert one(folder)["state"] == "running"
    finally:
        holder.release()
    assert one(folder)["state"] == "killed"
    assert "in use" not in "".join(lines(folder))
    (folder / ".lock").write_text("pid 12 since yesterday on another-machine\n")
    assert (one(folder)["state"], one(folder)["why"]) == ("running", "pid 12 since yesterday on another-machine")
    os.utime(folder / ".lock", (0, time.time() - 7300))
    assert (one(folder)["state"], one(folder)["why"][-17:]) == ("killed", "e, silent for 2 h")


def test_the_keys_that_differ_are_all_of_them_and_no_other(runs: Path):
    """Of each kind, by comparing every pair of recipes; a key that an older version did not have has its default."""
    path = runs / "killed" / "recipe.yaml"
    path.write_text(path.read_text().replace("average: null\n", "").replace("spike: warn\n", ""))

    def flat(tree: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {name: tree}
        below = [flat(one, f"{name}.{part}".strip(".")) for part, one in tree.items()]
        return {key: value for part in below for key, value in part.items()}

    known = {run["run"]: run["differing"] for run in found(runs)}
    for group in (("done", "failed", "killed"), ALL[4:]):
        texts = {name: yaml.safe_load((runs / name / "recipe.yaml").read_text()) for name in group}
        trees = {name: {"average": None, "spike": "warn"} | flat(tree) for name, tree in texts.items()}
        names = {key for tree in trees.values() for key in tree} - {"run"}
        wanted = {k for k in names for a in group for b in group if trees[a].get(k) != trees[b].get(k)}
        assert {"average", "spike"}.isdisjoint(wanted)
        for name in group:
            assert set(known[name]) == wanted
            for key, value in known[name].items():
                want = trees[name].get(key)
                text = ",".join(map(str, want)) if isinstance(want, list) else want
                assert value == text or yaml.safe_load(value) == want, key
    assert known["judged"] == {}
    assert known["done"]["head.kind"] == "mean_color"
    assert known["failed"]["head.bits"] is None


def test_what_there_is_more_of_goes_down(runs: Path):
    """Runs, or keys; long values are cut, in JSON they are not."""
    long = "/a" + "/very" * 20 + "/end"
    written(runs / "done", f"data.train={long}")
    (done, *_) = found(runs)
    text = lines(runs, checkpoints=False)
    start = text.index("3 runs of pretraining, the keys that differ:")
    assert cells(text[start + 1]) == ["run", "done", "failed", "killed"]
    keys = text[start + 2 : text.index("", start)]
    assert [cells(line)[0] for line in keys] == list(done["differing"])
    (train,) = (cells(line) for line in keys if line.startswith("data.train"))
    assert train == ["data.train", long[:18] + ".." + long[-20:], "shards", "shards"]
    assert done["differing"]["data.train"] == long
    alike = [written(runs.parent / "alike" / f"{i}", f"seed={i}") for i in range(4)]
    text = lines(alike[0].parent)
    assert [cells(line) for line in text[-5:]] == [["run", "seed"], *([f"{i}", f"{i}"] for i in range(4))]
    for name in ("a", "b"):
        shutil.copytree(alike[0], runs.parent / "same" / name)
    assert lines(runs.parent / "same")[-1] == "2 runs of pretraining: no key differs"


def test_a_terminal_has_colours_and_an_edge_and_a_pipe_has_neither(runs: Path):
    bare = lines(runs)
    assert not any("\033" in line for line in bare)
    assert max(map(len, bare)) > 100
    colored = lines(runs, color=True)
    assert [re.sub(r"\033\[\d*m", "", line) for line in colored] == bare
    both = zip(bare[1:9], colored[1:9], strict=True)
    states = {cells(line)[1]: re.findall(r"\033\[(\d+)m\S+\033\[0m", drawn) for line, drawn in both}
    assert states == {"finished": ["32"], "failed": ["31"], "killed": ["31"]}
    cut = lines(runs, width=50)
    why = ["failed: the loss is not a number (65)", "killed: ended without a word"]  # else nobody could read it
    assert cut[9:11] == why
    assert not set(why) & set(bare + lines(runs, width=500))
    del cut[9:11]
    assert cut == [line if len(line) <= 50 else line[:48] + ".." for line in bare]


def test_the_command_asks_what_it_writes_to(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """JSON is alone on stdout; colours and an edge are for a terminal, the first unless NO_COLOR is set."""
    main = runpy.run_path(str(ROOT / "tools" / "runs.py"))["main"]
    assert main([f"run={runs}", "json=true"]) == 0
    out, err = capsys.readouterr()
    assert (len(json.loads(out)), err) == (len(ALL), "")
    monkeypatch.setenv("COLUMNS", "70")
    for shown, no_color in ((False, ""), (True, ""), (True, "1")):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys.stdout, "isatty", lambda shown=shown: shown)
        assert main([f"run={runs}"]) == 0
        out = capsys.readouterr().out
        assert ("\033[" in out) == (shown and not no_color)
        assert (len(re.sub(r"\033\[\d*m", "", out).splitlines()[0]) == 70) == shown


def append(run: Path, text: str, name: str = "metrics.jsonl") -> None:
    with (run / name).open("a") as file:
        file.write(text)


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else under the name of a run's file."""
    return lambda run: ((run / name).unlink(missing_ok=True), make(run / name))


def holding(name: str, content: str | bytes) -> Callable[[Path], object]:
    return instead(name, lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content))


ODD: dict[str, Callable[[Path], object]] = {
    "a torn row": lambda run: append(run, '{"step": 99, "loss": 1.'),
    "rows of another": lambda run: append(run, '[1]\n"x"\n{"step": "x"}\n{}\n12\n\n'),
    "bytes": lambda run: (run / "metrics.jsonl").write_bytes(bytes(range(256)) + (run / "metrics.jsonl").read_bytes()),
    "a deep row": lambda run: append(run, "[" * 100_000 + "\n"),
    "metrics are a folder": instead("metrics.jsonl", Path.mkdir),
    "metrics are a pipe": instead("metrics.jsonl", os.mkfifo),
    "nulls": lambda run: append(run, '{"step": 41, "loss": null, "images_per_second": null, "val_loss": null}\n'),
    "NaN, words": lambda run: append(
        run, '{"step": 41, "loss": NaN, "val_loss": -Infinity, "images_per_second": "x"}\n'
    ),
    "huge": lambda run: append(run, f'{{"step": 41, "loss": 1{"0" * 400}, "val_loss": true}}\n'),
    "no recipe": lambda run: (run / "recipe.yaml").unlink(),
    "another's recipe": holding("recipe.yaml", "encoder: x\nhead: [1]\nsteps: {a: 1}\n1: 2\n"),
    "a pretraining of another version": lambda run: append(run, "gone: 1\n", "recipe.yaml"),
    "a huge recipe": holding("recipe.yaml", f"steps: {'9' * 5000}\n"),
    "a binary recipe": holding("recipe.yaml", bytes(range(256))),
    "a recipe that is a pipe": instead("recipe.yaml", os.mkfifo),
    "exit.json of another": holding("exit.json", '{"code": "x", "step": [], "reason": {}}'),
    "exit.json with signs": holding("exit.json", '{"code": 70, "reason": "\\u001b[2J\\n\\ud800"}'),
    "exit.json is binary": holding("exit.json", bytes(range(256))),
    "results of another": holding("results.json", '{"rows": [1, {}], "top1": "x", "protocol": 1}'),
    "a lock that is a folder": instead(".lock", Path.mkdir),
    "a lock of bytes": holding(".lock", b"\xff\xfe"),
    "an odd name": lambda run: run.rename(run.parent / os.fsdecode(b"a \x1b[31m\n\xff name  of it")),
    "nothing but exit.json": lambda run: [p.unlink() for p in run.iterdir() if p.name != "exit.json"],
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_runs_are_shown_and_the_others_as_before(runs: Path, kind: str):
    """Nothing on the disk is changed; lines are plain, and the JSON is JSON."""
    for name in ("failed", "tuned", "judged"):
        shutil.rmtree(runs / name)
    (before,) = (run for run in found(runs) if run["run"] == "killed")
    ODD[kind](runs / "done")
    there, made, text = everything(runs), found(runs), lines(runs)
    assert everything(runs) == there
    odd, other = sorted(made, key=lambda run: run["run"] == "killed")
    assert other | {"differing": 0} == before | {"differing": 0}
    assert all(line.isprintable() for line in text)
    assert all(text[1:3])
    if kind in ("a torn row", "rows of another", "bytes", "a deep row"):
        assert (odd["step"], odd["loss_is_nan"]) == (40, False)
    if kind in ("nulls", "NaN, words"):
        assert (odd["step"], odd["loss"], odd["loss_is_nan"]) == (41, None, True)
        assert odd["best"]["step"] <= 40
        assert " nan " in text[1]
    if kind == "a pretraining of another version":
        assert (odd["recipe"], odd["steps"]) == ("mean_color vit", 40)


def test_ten_thousand_rows_are_not_all_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those with an evaluation are, and the last few."""
    run, seen = written(tmp_path / "long"), []
    for step in range(1, 10_001):
        row = {"step": step, "loss": 2.0, "accuracy": 0.5, "images_per_second": 70.0}
        append(run, json.dumps(row | ({"val_loss": 1.0} if step % 1000 == 0 else {})) + "\n")
    monkeypatch.setattr(status, "_row", lambda line, of=status._row: seen.append(line) or of(line))
    assert one(run)["best"] == {"metric": "val_loss", "value": 1.0, "step": 1000}
    assert len(seen) < 30


def test_the_curves_are_the_rows(runs: Path):
    """As many lines as runs have rows of it, and a dashed one for each baseline."""
    made = {name: status.rows(runs / name) for name in ("done", "failed", "killed")}
    figure = table.drawn(made)
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["loss", "accuracy", "val accuracy", "images per second"]  # val_loss is of one run alone
    baselines = {"neighbour loss 3.5": 3.5, "unigram entropy 4.8": 4.8, "uniform 6.24": math.log(512)}
    for title, axes in panels.items():
        name = title.replace(" ", "_")
        curves = [line for line in axes.lines if line.get_linestyle() == "-"]
        wanted = [[(row["step"], row[name]) for row in rows if name in row] for rows in made.values()]
        assert [line.get_xydata().tolist() for line in curves] == [[*map(list, rows)] for rows in wanted if rows]
        assert len({line.get_color() for line in curves}) == len(curves) == (2 if name == "val_accuracy" else 3)
        dashed = sorted(line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--")
        assert dashed == [*baselines.values()] * (name == "loss")
        assert {text.get_text() for text in axes.texts} == (set(baselines) if dashed else set())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(made)
    colors = [line.get_color() for line in legend.get_lines()]
    assert colors == [line.get_color() for line in panels["loss"].lines[:3]]
    alone = {axes.get_title(): axes for axes in table.drawn({"done": made["done"]}).axes}
    assert [line.get_ydata()[0] for line in alone["val loss"].lines[1:]] == [math.log(512), 4.7]


def test_a_gap_stays_a_gap_and_many_runs_have_many_colours(tmp_path: Path):
    rows = [{"step": step, "loss": None if step == 2 else 1.0} for step in (1, 2, 3)]
    for count in (1, 10, 11, 20, 21, 60):
        figure = table.drawn({f"_run {'x' * 60}{i}": rows for i in range(count)})
        drawn = figure.axes[0].lines
        assert len({tuple(np.round(line.get_color(), 6)) for line in drawn}) == count
        assert np.isnan(drawn[0].get_ydata()).tolist() == [False, True, False]
        assert len({text.get_text() for text in figure.legends[0].get_texts()}) == count
    with pytest.raises(Refusal, match="share none") as end:
        table.drawn({"a": [{"step": 1}], "b": [{"step": 2, "loss": 1.0}]})
    assert end.value.code == DATA


def test_compare_writes_a_picture_and_the_table_of_these_runs(runs: Path, monkeypatch: pytest.MonkeyPatch):
    """By names below run=, or paths; a fine-tuning's curves are those of its parts, as it says."""
    monkeypatch.chdir(runs.parent)
    there = everything(runs)
    text = lines(Path("runs"), compare=("done", "runs/failed", "tuned"), checkpoints=None)
    assert [cells(line)[0] for line in text[1:4]] == ["done", "failed", "tuned"]
    assert text[-1] == "curves: compare.png"
    assert text[-2].endswith("runs/tuned/seed-2, runs/tuned/seed-10")
    with Image.open(runs.parent / "compare.png") as image:
        image.load()
        assert image.width > 1000
        assert 500 < image.height < 2000
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 20
    made = found(runs, compare=("done", "killed"), output="other.png")
    assert [run["run"] for run in made] == ["done", "killed"]
    assert (runs.parent / "other.png").stat().st_size > 10_000
    assert everything(runs) == there


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ({"run": "nowhere"}, USAGE, "nowhere"),
        ({"run": "folder.png"}, USAGE, "folder.png"),  # there is no run in it
        ({"compare": ("done", "dome")}, USAGE, "compare=dome: no run, by path or below run=.*there are done, failed"),
        ({"compare": ("done",), "output": "no/x.png"}, USAGE, "output=no/x.png: there is no folder no"),
        ({"compare": ("done",), "output": "x.jpg"}, USAGE, "output=x.jpg: give the name of a picture"),
        ({"compare": ("done",), "output": "folder.png"}, USAGE, "output=folder.png: give the name"),
        ({"output": "x.png"}, USAGE, "output: is where compare= draws"),
        ({"compare": ("judged",)}, DATA, "judged: no row of metrics"),
        ({"compare": ("tuned",)}, DATA, "tuned: no row of metrics to draw; its parts have: .*seed-2, .*seed-10"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(runs: Path, given, code, message, monkeypatch):
    monkeypatch.chdir(runs.parent)
    (runs.parent / "folder.png").mkdir()
    with pytest.raises(Refusal, match=message) as end:
        lines(runs.parent / given.pop("run", "runs"), **given)
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
        holder = Run(tmp_path / name)
        holder.claim(config.parse(Pretrain, [*MORE, f"run={tmp_path / name}"], recipes.FOLDER))
        holder.release()
        monkeypatch.setattr(sys, "argv", ["pytest"])
    named, unnamed = found(tmp_path)
    assert named["recipe"] == f"mpp_flowers {unnamed['recipe']}"
    assert named["differing"] == unnamed["differing"] == {}
    one, other = [(tmp_path / name / "recipe.yaml").read_text() for name in ("named", "unnamed")]
    assert one.startswith("# recipe: some/where/mpp_flowers.yaml\n")
    assert yaml.safe_load(one) | {"run": ""} == yaml.safe_load(other) | {"run": ""}


# checkpoints: what the next start of a run finds


@pytest.fixture
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A run with four checkpoints that was killed in its ninth step."""

    def make(folder: Path) -> None:
        start = Start(words(shards, folder / "run", *KILLED), folder / "logs", 1, "kill:point=update:step=9")
        assert start.wait() == [-signal.SIGKILL], start.said()

    return shutil.copytree(once(tmp_path_factory, "killed", make) / "run", tmp_path / "runs" / "one")


def told(folder: Path, verify: bool = True, checkpoints: bool | None = None) -> tuple[list[str], int]:
    """The lines on checkpoints, which follow the table, and the code."""
    said, code = [], 0
    try:
        said.extend(report(Runs(run=(str(folder),), verify=verify, checkpoints=checkpoints)))
    except Refusal as end:
        said, code = [*said, end.message], end.code
    return after_table(said, folder), code


def after_table(lines: list[str], folder: Path) -> list[str]:
    """From the first line that opens with a path of a run; blank ones left out."""
    return list(itertools.dropwhile(lambda line: not line.startswith(str(folder)), filter(None, lines)))


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def damage(run: Path, step: int) -> None:
    os.truncate(checkpoint_of(run, step) / "optimizer.safetensors", 100)


def test_the_command_lists_what_is_there_and_changes_nothing(run: Path):
    """As a command says it; newest first, with step, size, age and what is wrong."""
    damage(run, 6)
    before = everything(run)
    code, said = call("runs", [f"run={run.parent}"])
    assert code == 0, said
    assert said.split("\n")[0].split() == ["run", "state", "step", "loss", "best", "images/s", "recipe", "why"]
    lines = after_table(said.splitlines(), run)
    assert lines[0].startswith(f"{run}  ")
    assert "killed" in lines[0]
    assert [int(line.split()[0]) for line in lines[1:5]] == [8, 6, 4, 2]
    size = sum(path.stat().st_size for path in checkpoint_of(run, 8).iterdir())
    assert f"{size / 1e3:.1f} kB" in lines[1]
    assert re.search(r"\d+ s old  verified$", lines[1])
    assert lines[2].endswith("damaged: optimizer.safetensors differs from its digest")
    assert lines[5] == "  the same command goes on from step 8 of 20"
    assert everything(run) == before
    assert not list(run.rglob("*corrupt*"))


@pytest.mark.parametrize("count", range(5))
def test_what_it_says_is_what_a_start_finds(run: Path, tmp_path: Path, count: int):
    """Of every set of so many damaged checkpoints."""
    for i, bad in enumerate(itertools.combinations(STEPS, count)):
        copy = shutil.copytree(run, tmp_path / f"{i}")
        for step in bad:
            damage(copy, step)
        lines, code = told(copy)
        if len(bad) == len(STEPS):
            with pytest.raises(Refusal) as end:
                checkpoint.newest(copy / "checkpoints")
            assert code == end.value.code == INTEGRITY
            assert "the same command refuses (76)" in lines[-2]
            assert str(copy) in lines[-1]
        else:
            step = max({*STEPS} - {*bad})
            assert (code, checkpoint.newest(copy / "checkpoints")) == (0, checkpoint_of(copy, step))
            assert f"goes on from step {step} of 20" in lines[-1]
            aside = {path.name.split(".")[0] for path in (copy / "checkpoints").glob("*corrupt*")}
            assert set(re.findall(r"step-\d+", lines[-1])) == aside
        again, _ = told(copy)  # with what was put aside
        assert sum("put aside as damaged" in line for line in again) == len(list(copy.rglob("*corrupt*")))


def test_a_checkpoint_of_another_version_is_not_gone_past(run: Path):
    path = checkpoint_of(run, 8) / "MANIFEST.json"
    content = json.loads(path.read_text())
    del content["digest"]
    path.write_text(checkpoint._sealed(content | {"version": 99}))
    said, _ = told(run)
    assert "version 99" in said[1]
    with pytest.raises(Refusal):
        checkpoint.newest(run / "checkpoints")  # by a start, as is said
    assert ("goes on" in said[5], "76" in said[5]) == (False, True)


def test_of_several_runs_checkpoints_are_read_where_that_is_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch):
    """Those of many runs are terabytes; then 76 is said as of one."""
    two = shutil.copytree(run, run.parent / "two")
    for step in STEPS:
        damage(two, step)
    assert told(run.parent, checkpoints=True)[1] == told(two)[1] == INTEGRITY
    monkeypatch.setattr(checkpoint, "flaw", lambda _: pytest.fail("a checkpoint was read"))
    assert told(run.parent) == ([], 0)
    assert told(two, checkpoints=False) == ([], 0)
    with pytest.raises(pytest.fail.Exception):
        told(run)
    said, code = told(two, verify=False)
    assert (code, sum(line.endswith("not verified") for line in said)) == (0, 4)


LISTED: dict[str, Callable[[Path], object]] = {
    "exit.json is deep": holding("exit.json", "[" * 100_000),
    "recipe.yaml is a loop": holding("recipe.yaml", "steps: &a [*a]\n"),
    "steps are no number": holding("recipe.yaml", "steps: many\n"),
    "a name that is none": lambda run: (run / "checkpoints" / "step-x.corrupt-y").mkdir(),
    "a file": lambda run: checkpoint_of(run, 10).touch(),
    "a pipe": lambda run: os.mkfifo(checkpoint_of(run, 10)),
    "a link to itself": lambda run: checkpoint_of(run, 10).symlink_to("step-00000010"),
    "a link out": lambda run: checkpoint_of(run, 10).symlink_to("/etc"),
    "no checkpoints folder": lambda run: shutil.rmtree(run / "checkpoints"),
    "a checkpoints file": lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()),
}


@pytest.mark.parametrize("kind", LISTED)
def test_odd_run_folders_are_listed_too(run: Path, kind: str):
    """And the others beside them."""
    good = shutil.copytree(run, run.parent / "two")
    LISTED[kind](run)
    lines, code = told(run.parent, checkpoints=True)
    assert code == 0
    assert [sum(line.startswith(f"{one}  ") for line in lines) for one in (run, good)] == [1, 1]
    assert lines[-1] == "  the same command goes on from step 8 of 20"
