"""tools/evaluate.py as a command: every protocol's number is its oracle's; comparisons of runs.

And where something is wrong, extreme, damaged, killed or shared: a line and a code, or the numbers.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ssl_vit import config
from ssl_vit.commands import evaluate as command
from ssl_vit.data import manifest
from ssl_vit.data.dataset import Data, Samples
from ssl_vit.encoders.weights import load_encoder
from ssl_vit.errors import Refusal
from ssl_vit.evaluate import features, few_shot
from ssl_vit.recipes import FOLDER
from tests import frozen
from tests.starts import Start, call

READOUTS = ("mean", "class")
CLASSES = ("a", "b_c", "d-E")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of images that say little about their class, so that scores are mixed, and run/encoder."""
    folder = tmp_path_factory.mktemp("evaluate")
    frozen.shards(folder, frozen.files(dict.fromkeys(CLASSES, 14), dict.fromkeys(CLASSES, 9)), shard_samples=11)
    frozen.encoder(folder / "run")
    return folder


def words(mixed: Path, run: Path, *more: str) -> list[str]:
    return [*frozen.words(mixed, run, knn__k="7", few_shot__shots="1,5", random="true"), *more]


def read_outs(mixed: Path, split: str, untrained: Any = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Both read-outs of a split and its labels, an image at a time."""
    encoder = untrained or load_encoder(mixed / "run")
    source = manifest.load(mixed / "shards" / split)
    samples = Samples(source, Data(image_size=16, workers=0), seed=0, training=False)
    read = [samples.batch([(0, i)])[0] for i in range(source.samples)]
    with torch.no_grad():
        tokens = np.stack([encoder(one["image"])[0].numpy() for one in read])
    return {"mean": tokens[:, 1:].mean(1), "class": tokens[:, 0]}, np.array([int(one["label"]) for one in read])


def oracle(mixed: Path, readout: str, untrained: Any) -> dict[str, Any]:
    """Top-1 by a loop over pairs, by np.linalg.solve on the same draws, by scikit-learn."""
    (train, labels), (test, truth) = (read_outs(mixed, split, untrained) for split in ("train", "val"))
    x, y = train[readout], test[readout]
    found: dict[str, Any] = {"knn": (frozen.plain_knn(x, labels, y, 3, 7, 0.07).argmax(1) == truth).mean()}
    for shots in (1, 5):
        ids = [few_shot.support(torch.tensor(labels), 3, shots, seed).numpy() for seed in range(3)]
        scores = [frozen.plain_few_shot(x[i], labels[i], y, 3, 1024.0, dual=True).argmax(1) == truth for i in ids]
        found[f"few_shot_{shots}"] = [float(one.mean()) for one in scores]
    mean, std = x.mean(0), x.std(0) + 1e-5
    solver = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-9, max_iter=5000)
    solver.fit((x - mean).astype(np.float64) / std, labels)
    found["linear"] = float(np.mean(solver.predict((y - mean).astype(np.float64) / std) == truth))
    return found


@pytest.fixture(scope="module")
def run(mixed: Path) -> Path:
    """One evaluation with everything."""
    frozen.run_tool("evaluate", words(mixed, mixed / "done"), mixed)
    return mixed / "done"


def row(found: dict[str, Any], *names: str, case: str = "") -> dict[str, Any]:
    """The row of an encoder, a read-out and a method."""
    (one,) = [r for r in found["rows"] if (r["who"], r["readout"], r["method"]) == names and case in r["case"]]
    return one


@pytest.mark.parametrize("who", ["pretrained", "random"])
@pytest.mark.parametrize("readout", READOUTS)
def test_every_number_is_its_oracles(mixed: Path, run: Path, who: str, readout: str):
    """Of 27 images none may be judged otherwise; the untrained encoder is that of the seed."""
    found, shape = frozen.results(run), load_encoder(mixed / "run").config
    torch.manual_seed(0)
    want = oracle(mixed, readout, shape.build().eval() if who == "random" else None)
    assert row(found, who, readout, "knn")["top1"] == pytest.approx(want["knn"])
    assert row(found, who, readout, "linear")["top1"] == pytest.approx(want["linear"])
    for shots in (1, 5):
        one = row(found, who, readout, "few_shot", case=f"={shots}")
        assert one["draws"] == pytest.approx(want[f"few_shot_{shots}"])
        assert one["top1"] == pytest.approx(np.mean(one["draws"]))
        assert one["top1_sd"] == pytest.approx(np.std(one["draws"], ddof=1))
    assert found["samples"] == 27
    low, high = row(found, who, readout, "knn")["top1_interval"]
    assert 0 <= low <= want["knn"] <= high <= 1


def test_results_and_page_tell_what_is_needed_to_repeat_them(mixed: Path, run: Path):
    found, page = frozen.results(run), (run / "report.md").read_text()
    assert len(found["rows"]) == 2 * 2 * (1 + 1 + 2)
    assert len({row["top1"] for row in found["rows"]}) >= 6, "else the oracles would show little"
    for split in ("train", "val"):
        assert found["digests"][f"data.{split}"] == manifest.load(mixed / "shards" / split).identity
    assert len(found["digests"]["encoder"]) == 64
    assert found["protocol"]["knn"] == {"k": 7, "temperature": 0.07}
    assert found["protocol"]["few_shot"]["l2"] == 1024
    assert f"encoder={mixed}/run" in found["command"]
    for word in (found["command"], found["digests"]["encoder"], found["digests"]["data.val"], "random", "few_shot"):
        assert word in page
    assert f"{100 * row(found, 'pretrained', 'mean', 'knn')['top1']:.2f}" in page
    assert "<table>" in (run / "report.html").read_text()


def test_any_layer_is_judged(mixed: Path, tmp_path: Path):
    more = ["features.layers=1,2", "features.readouts=class", "random=false", "methods=few_shot"]
    frozen.run_tool("evaluate", words(mixed, tmp_path / "run", *more), tmp_path)
    found = frozen.results(tmp_path / "run")["rows"]
    assert [(one["layer"], one["readout"]) for one in found] == [(1, "class")] * 2 + [(2, "class")] * 2
    assert [one["draws"] for one in found[:2]] != [one["draws"] for one in found[2:]]


def test_runs_stand_side_by_side_and_keep_their_reports(mixed: Path, run: Path, tmp_path: Path):
    one = ["features.readouts=mean", "random=false", "methods=knn"]
    frozen.run_tool("evaluate", words(mixed, tmp_path / "a|b", *one), tmp_path)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "results.json").write_text(json.dumps({"top1": 0.625, "top1_sd": 0.01, "samples": 27}))
    runs = f"compare={run},{tmp_path}/a|b,{tmp_path}/tuned"
    said = frozen.run_tool("evaluate", [runs, f"run={tmp_path}/table"], tmp_path)
    lines = [line for line in said.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5}
    assert len(lines) == 2 + 16 + 1
    mine = f"{100 * row(frozen.results(run), 'pretrained', 'mean', 'knn')['top1']:.2f}"
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    assert [mine, mine, "-"] in cells
    assert ["-", "-", "62.50 ± 1.00"] in cells
    assert "62.50 ± 1.00" in (tmp_path / "table" / "report.html").read_text()
    for bad in (f"{tmp_path}/nowhere", f"{mixed}/run"):
        said = frozen.refused("evaluate", [f"compare={run},{bad}", f"run={tmp_path}/table"], tmp_path)
        assert "results" in said
    shutil.copytree(run, tmp_path / "one")  # `run` is runs/evaluate unless said otherwise, where a report may lie
    call("evaluate", [f"compare={tmp_path}/one,{run}", f"run={tmp_path}/one"])
    assert (tmp_path / "one" / "report.md").read_text() == (run / "report.md").read_text()


@pytest.mark.parametrize(
    "key", ["data.subset=0.5", "data.hold_out=0.3", "metrics.label_sets=real.json", "metrics.class_map=map.json"]
)
def test_no_key_is_taken_and_does_nothing(mixed: Path, run: Path, key: str, tmp_path: Path):
    """Either the numbers are others, or the key is refused."""
    if call("evaluate", words(mixed, tmp_path / "run", key, "random=false")).code == 0:
        mine = [one for one in frozen.results(run)["rows"] if one["who"] == "pretrained"]
        assert frozen.results(tmp_path / "run")["rows"] != mine


# --- faults

RANKS = [pytest.mark.process, pytest.mark.ranks]


def evaluate(given: Path, folder: Path, world: int = 1, **changed: str) -> str:
    """Evaluate into folder/run; what it says."""
    return frozen.run_tool("evaluate", frozen.words(given, folder / "run", **changed), folder, world)


def refused(given: Path, folder: Path, code: int | None = None, **changed: str) -> str:
    """The line with which that is refused; there are no results then."""
    said = frozen.refused("evaluate", frozen.words(given, folder / "run", **changed), folder, code)
    assert not (folder / "run" / "results.json").exists()
    return said


def on(made: Path) -> dict[str, Any]:
    return {"data__train": f"{made}/train", "data__val": f"{made}/val"}


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.ranks), pytest.param(3, marks=RANKS)])
def test_processes_give_the_same_numbers_as_one(given: Path, straight: dict, tmp_path: Path, world: int):
    evaluate(given, tmp_path, world)
    assert frozen.numbers(tmp_path / "run") == straight


def test_the_same_command_again_uses_the_cache_and_makes_a_damaged_one_anew(given: Path, straight, tmp_path: Path):
    evaluate(given, tmp_path)
    whole = frozen.stamps(tmp_path / "run" / "features", "*.npy")
    assert whole
    evaluate(given, tmp_path)
    assert frozen.stamps(tmp_path / "run" / "features", "*.npy") == whole
    assert frozen.numbers(tmp_path / "run") == straight
    for path in whole:
        np.save(path, np.load(path)[::-1].copy())
    evaluate(given, tmp_path)
    assert frozen.numbers(tmp_path / "run") == straight


def killed_in_its_features() -> None:
    """Have the process killed when the first draft of a cache is begun."""
    whole = features.extract

    def cut(*asked: Any) -> Iterator[Any]:
        yield next(whole(*asked))
        os.kill(os.getpid(), signal.SIGKILL)

    features.extract = cut


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=RANKS)])
def test_a_kill_while_features_are_made_costs_nothing_but_time(given: Path, straight: dict, tmp_path: Path, world: int):
    words = frozen.words(given, tmp_path / "run")
    start = Start(words, tmp_path / "logs", world, prepare=killed_in_its_features, tool="evaluate")
    assert start.wait() == [-9] * world, start.said()
    assert any((tmp_path / "run" / "features").glob(".*.tmp"))
    assert not (tmp_path / "run" / "results.json").exists()
    evaluate(given, tmp_path, world)
    assert frozen.numbers(tmp_path / "run") == straight


@pytest.mark.process
def test_two_at_a_time_may_share_a_cache(given: Path, straight: dict, tmp_path: Path):
    asked = [frozen.words(given, tmp_path / f"run{i}", features__cache=f"{tmp_path}/cache") for i in (0, 1)]
    both = [Start(words, tmp_path / "logs", tool="evaluate") for words in asked]
    for i, start in enumerate(both):
        assert start.wait(120) == [0], start.said()
        assert frozen.numbers(tmp_path / f"run{i}") == straight


def test_an_image_that_cannot_be_read_is_told_and_counts_again_when_mended(given: Path, straight, tmp_path: Path):
    damaged = frozen.damaged(given / "shards", tmp_path / "shards")
    assert "leaves out sample 1" in evaluate(given, tmp_path, **on(tmp_path / "shards"))
    found = frozen.results(tmp_path / "run")
    assert frozen.find(found["rows"], "samples") == 7
    assert found["samples"] == 7
    assert frozen.find(found, "bad_samples") in (1, {"train": 0, "val": 1})
    shutil.copy(given / "shards" / "val" / "000000.tar", damaged)
    evaluate(given, tmp_path, **on(tmp_path / "shards"))
    assert frozen.numbers(tmp_path / "run") == straight


def test_after_an_outage_nothing_half_is_kept(given: Path, straight: dict, tmp_path: Path, monkeypatch):
    """A source that stays away ends the evaluation; what was read until then is no split."""
    recipe = config.parse(command.Evaluate, frozen.words(given, tmp_path / "run"), FOLDER)
    whole = Samples.read
    with monkeypatch.context() as patched:
        patched.setattr(Samples, "read", lambda own, sample: (_away if sample == 5 else whole)(own, sample))
        with pytest.raises(Refusal, match="stays away"):
            command.run(recipe)
    evaluate(given, tmp_path)
    assert frozen.numbers(tmp_path / "run") == straight


def _away(samples: Samples, sample: int) -> tuple[bytes, int]:
    raise Refusal(74, "the source stays away")


def away_for_one() -> None:
    """Rank 1's source stays away."""
    if os.environ["RANK"] == "1":
        Samples.read = _away  # type: ignore[method-assign]


@pytest.mark.process
@pytest.mark.ranks
def test_an_outage_of_one_process_ends_both(given: Path, tmp_path: Path):
    """Started by hand or by Slurm, no launcher ends the other."""
    start = Start(frozen.words(given, tmp_path / "run"), tmp_path / "logs", 2, prepare=away_for_one, tool="evaluate")
    assert start.wait(60) == [74, 74], start.said()
    assert not list((tmp_path / "run" / "features").glob("[0-9a-f]*"))


def test_what_is_missing_or_unlike_is_named(given: Path, tmp_path: Path):
    other = frozen.shards(tmp_path / "other", frozen.files({"a": 2, "x": 2}, {"a": 2, "x": 2}))
    lacking = frozen.shards(tmp_path / "lacking", frozen.files({"a": 3, "c": 3}, {"a": 2, "bee": 2, "c": 2}))
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    for code, changed, word in [
        (64, {"encoder": ""}, "encoder"),
        (65, {"encoder": f"{tmp_path}/junk"}, "junk"),
        (64, {"data__train": ""}, "data.train"),
        (65, {"data__val": f"{tmp_path}/nowhere"}, "nowhere"),
        (65, {"data__val": f"{other}/val"}, "class"),
        (65, on(lacking), "bee"),
        (64, {"data__image_size": "18"}, "patches"),
        (64, {"features__layers": "3"}, "blocks are 1 to 2"),
        (64, {"features__readouts": "max"}, "features.readouts"),
        (64, {"methods": "knn,lineer"}, "linear"),
        (64, {"knn__k": "0"}, "knn.k"),
        (65, {"few_shot__shots": "25,50", "methods": "few_shot"}, "few_shot"),
        *((64, {"few_shot__shots": shots}, "few_shot.shots") for shots in ("0", "1,0")),
    ]:
        said = refused(given, tmp_path, code, **changed)
        assert word in said, (changed, said)


def test_labels_outside_the_classes_are_counted(given: Path, tmp_path: Path):
    for split in ("train", "val"):
        shutil.copytree(given / "shards" / split, tmp_path / split)
        content = json.loads((tmp_path / split / "manifest.json").read_text()) | {"classes": ["a", "b"]}
        (tmp_path / split / "manifest.json").write_text(json.dumps(content))
    assert re.search("train.*6 |6 .*train", refused(given, tmp_path, **on(tmp_path)))


def test_an_encoder_of_other_channels_or_of_nan_is_refused(given: Path, tmp_path: Path):
    grey = frozen.encoder(tmp_path / "grey", channels=1)
    assert "channels" in refused(given, tmp_path, encoder=str(grey))
    for value in (float("nan"), float("inf")):
        spoil = partial(lambda value, made: torch.nn.init.constant_(made.blocks[1].mlp.fc2.bias, value), value)
        said = refused(given, tmp_path, encoder=str(frozen.encoder(tmp_path / "sick", spoil)))
        assert "sick" in said or "NaN" in said or "finite" in said


def test_features_that_never_change_or_one_image_a_class_are_no_error(given: Path, tmp_path: Path):
    """A dead encoder has the same features of every image; of one image a class all is made that can be."""
    dead = frozen.encoder(tmp_path / "dead", lambda made: [torch.nn.init.zeros_(p) for p in made.parameters()])
    evaluate(given, tmp_path, encoder=str(dead))
    assert frozen.results(tmp_path / "run")
    made = frozen.shards(tmp_path, frozen.files({"a": 1, "b": 1}, {"a": 1, "b": 1}))
    said = evaluate(given, tmp_path / "few", knn__k="20", **on(made))
    left_out = [line for line in said.splitlines() if line.startswith("few_shot.shots")]
    assert len(left_out) == 2 * 1, "a line for each read-out: 2 shots are left out"
    assert frozen.find(frozen.results(tmp_path / "few" / "run"), "samples") == 2
