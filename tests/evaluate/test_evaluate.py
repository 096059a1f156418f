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
from ssl_vit.data.dataset import Data, SampleDataset
from ssl_vit.encoders.weights import load_encoder
from ssl_vit.errors import ExitError
from ssl_vit.evaluate import features, few_shot
from tests import evaluate_cases
from tests.processes import Start, call_tool

READOUTS = ("mean", "class")
CLASSES = ("a", "b_c", "d-E")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of images that say little about their class, so that scores are mixed, and run/encoder."""
    folder = tmp_path_factory.mktemp("evaluate")
    evaluate_cases.write_shards(
        folder, evaluate_cases.image_names(dict.fromkeys(CLASSES, 14), dict.fromkeys(CLASSES, 9)), shard_samples=11
    )
    evaluate_cases.export_tiny_encoder(folder / "run")
    return folder


def evaluate_args(mixed: Path, run: Path, *extra_args: str) -> list[str]:
    return [*evaluate_cases.evaluate_args(mixed, run, knn__k="7", few_shot__shots="1,5", random="true"), *extra_args]


def compute_readouts(mixed: Path, split: str, untrained: Any = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Both read-outs of a split and its labels, an image at a time."""
    encoder = untrained or load_encoder(mixed / "run")
    source = manifest.load(mixed / "shards" / split)
    samples = SampleDataset(source, Data(image_size=16, workers=0), seed=0, training=False)
    batches = [samples.batch([(0, i)])[0] for i in range(source.samples)]
    with torch.no_grad():
        tokens = np.stack([encoder(batch["image"])[0].numpy() for batch in batches])
    return {"mean": tokens[:, 1:].mean(1), "class": tokens[:, 0]}, np.array([int(batch["label"]) for batch in batches])


def expected_results(mixed: Path, readout: str, untrained: Any) -> dict[str, Any]:
    """Top-1 by a loop over pairs, by np.linalg.solve on the same draws, by scikit-learn."""
    (train, labels), (test, truth) = (compute_readouts(mixed, split, untrained) for split in ("train", "val"))
    x, y = train[readout], test[readout]
    results: dict[str, Any] = {
        "knn": (evaluate_cases.reference_knn(x, labels, y, 3, 7, 0.07).argmax(1) == truth).mean()
    }
    for shots in (1, 5):
        ids = [few_shot.sample_support(torch.tensor(labels), 3, shots, seed).numpy() for seed in range(3)]
        scores = [
            evaluate_cases.reference_few_shot(x[i], labels[i], y, 3, 1024.0, dual=True).argmax(1) == truth for i in ids
        ]
        results[f"few_shot_{shots}"] = [float(correct.mean()) for correct in scores]
    mean, std = x.mean(0), x.std(0) + 1e-5
    solver = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-9, max_iter=5000)
    solver.fit((x - mean).astype(np.float64) / std, labels)
    results["linear"] = float(np.mean(solver.predict((y - mean).astype(np.float64) / std) == truth))
    return results


@pytest.fixture(scope="module")
def run(mixed: Path) -> Path:
    """One evaluation with everything."""
    evaluate_cases.run_tool("evaluate", evaluate_args(mixed, mixed / "done"), mixed)
    return mixed / "done"


def find_row(results: dict[str, Any], *names: str, case: str = "") -> dict[str, Any]:
    """The row of an encoder, a read-out and a method."""
    (row,) = [r for r in results["rows"] if (r["who"], r["readout"], r["method"]) == names and case in r["case"]]
    return row


@pytest.mark.parametrize("who", ["pretrained", "random"])
@pytest.mark.parametrize("readout", READOUTS)
def test_every_number_is_its_oracles(mixed: Path, run: Path, who: str, readout: str):
    """Of 27 images none may be judged otherwise; the untrained encoder is that of the seed."""
    results, encoder_config = evaluate_cases.read_results(run), load_encoder(mixed / "run").config
    torch.manual_seed(0)
    expected = expected_results(mixed, readout, encoder_config.build().eval() if who == "random" else None)
    assert find_row(results, who, readout, "knn")["top1"] == pytest.approx(expected["knn"])
    assert find_row(results, who, readout, "linear")["top1"] == pytest.approx(expected["linear"])
    for shots in (1, 5):
        few_shot_row = find_row(results, who, readout, "few_shot", case=f"={shots}")
        assert few_shot_row["draws"] == pytest.approx(expected[f"few_shot_{shots}"])
        assert few_shot_row["top1"] == pytest.approx(np.mean(few_shot_row["draws"]))
        assert few_shot_row["top1_sd"] == pytest.approx(np.std(few_shot_row["draws"], ddof=1))
    assert results["samples"] == 27
    low, high = find_row(results, who, readout, "knn")["top1_interval"]
    assert 0 <= low <= expected["knn"] <= high <= 1


def test_results_and_page_tell_what_is_needed_to_repeat_them(mixed: Path, run: Path):
    results, page = evaluate_cases.read_results(run), (run / "report.md").read_text()
    assert len(results["rows"]) == 2 * 2 * (1 + 1 + 2)
    assert len({row["top1"] for row in results["rows"]}) >= 6, "else the oracles would show little"
    for split in ("train", "val"):
        assert results["digests"][f"data.{split}"] == manifest.load(mixed / "shards" / split).identity
    assert len(results["digests"]["encoder"]) == 64
    assert results["protocol"]["knn"] == {"k": 7, "temperature": 0.07}
    assert results["protocol"]["few_shot"]["l2"] == 1024
    assert f"encoder={mixed}/run" in results["command"]
    for word in (
        results["command"],
        results["digests"]["encoder"],
        results["digests"]["data.val"],
        "random",
        "few_shot",
    ):
        assert word in page
    assert f"{100 * find_row(results, 'pretrained', 'mean', 'knn')['top1']:.2f}" in page
    assert "<table>" in (run / "report.html").read_text()


def test_any_layer_is_judged(mixed: Path, tmp_path: Path):
    args = ["features.layers=1,2", "features.readouts=class", "random=false", "methods=few_shot"]
    evaluate_cases.run_tool("evaluate", evaluate_args(mixed, tmp_path / "run", *args), tmp_path)
    rows = evaluate_cases.read_results(tmp_path / "run")["rows"]
    assert [(row["layer"], row["readout"]) for row in rows] == [(1, "class")] * 2 + [(2, "class")] * 2
    assert [row["draws"] for row in rows[:2]] != [row["draws"] for row in rows[2:]]


def test_runs_stand_side_by_side_and_keep_their_reports(mixed: Path, run: Path, tmp_path: Path):
    args = ["features.readouts=mean", "random=false", "methods=knn"]
    evaluate_cases.run_tool("evaluate", evaluate_args(mixed, tmp_path / "a|b", *args), tmp_path)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "results.json").write_text(json.dumps({"top1": 0.625, "top1_sd": 0.01, "samples": 27}))
    runs = f"compare={run},{tmp_path}/a|b,{tmp_path}/tuned"
    output = evaluate_cases.run_tool("evaluate", [runs, f"run={tmp_path}/table"], tmp_path)
    lines = [line for line in output.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5}
    assert len(lines) == 2 + 16 + 1
    top1 = f"{100 * find_row(evaluate_cases.read_results(run), 'pretrained', 'mean', 'knn')['top1']:.2f}"
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    assert [top1, top1, "-"] in cells
    assert ["-", "-", "62.50 ± 1.00"] in cells
    assert "62.50 ± 1.00" in (tmp_path / "table" / "report.html").read_text()
    for bad_run in (f"{tmp_path}/nowhere", f"{mixed}/run"):
        output = evaluate_cases.refusal_line(
            "evaluate", [f"compare={run},{bad_run}", f"run={tmp_path}/table"], tmp_path
        )
        assert "results" in output
    shutil.copytree(run, tmp_path / "one")  # `run` is runs/evaluate unless said otherwise, where a report may lie
    call_tool("evaluate", [f"compare={tmp_path}/one,{run}", f"run={tmp_path}/one"])
    assert (tmp_path / "one" / "report.md").read_text() == (run / "report.md").read_text()


@pytest.mark.parametrize(
    "key", ["data.subset=0.5", "data.holdout=0.3", "metrics.label_sets=real.json", "metrics.class_map=map.json"]
)
def test_no_key_is_taken_and_does_nothing(mixed: Path, run: Path, key: str, tmp_path: Path):
    """Either the numbers are others, or the key is refused."""
    if call_tool("evaluate", evaluate_args(mixed, tmp_path / "run", key, "random=false")).code == 0:
        rows = [row for row in evaluate_cases.read_results(run)["rows"] if row["who"] == "pretrained"]
        assert evaluate_cases.read_results(tmp_path / "run")["rows"] != rows


# --- faults

RANKS = [pytest.mark.process, pytest.mark.ranks]


def evaluate(source: Path, folder: Path, world: int = 1, **overrides: str) -> str:
    """Evaluate into folder/run; what it says."""
    return evaluate_cases.run_tool(
        "evaluate", evaluate_cases.evaluate_args(source, folder / "run", **overrides), folder, world
    )


def expect_refusal(source: Path, folder: Path, code: int | None = None, **overrides: str) -> str:
    """The line with which that is refused; there are no results then."""
    message = evaluate_cases.refusal_line(
        "evaluate", evaluate_cases.evaluate_args(source, folder / "run", **overrides), folder, code
    )
    assert not (folder / "run" / "results.json").exists()
    return message


def data_args(shards: Path) -> dict[str, Any]:
    return {"data__train": f"{shards}/train", "data__val": f"{shards}/val"}


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.ranks), pytest.param(3, marks=RANKS)])
def test_processes_give_the_same_numbers_as_one(given: Path, straight: dict, tmp_path: Path, world: int):
    evaluate(given, tmp_path, world)
    assert evaluate_cases.measured_results(tmp_path / "run") == straight


def test_the_same_command_again_uses_the_cache_and_makes_a_damaged_one_anew(given: Path, straight, tmp_path: Path):
    evaluate(given, tmp_path)
    stamps = evaluate_cases.modified_times(tmp_path / "run" / "features", "*.npy")
    assert stamps
    evaluate(given, tmp_path)
    assert evaluate_cases.modified_times(tmp_path / "run" / "features", "*.npy") == stamps
    assert evaluate_cases.measured_results(tmp_path / "run") == straight
    for path in stamps:
        np.save(path, np.load(path)[::-1].copy())
    evaluate(given, tmp_path)
    assert evaluate_cases.measured_results(tmp_path / "run") == straight


def kill_during_extraction() -> None:
    """Have the process killed when the first draft of a cache is begun."""
    original = features.extract_features

    def interrupted(*args: Any) -> Iterator[Any]:
        yield next(original(*args))
        os.kill(os.getpid(), signal.SIGKILL)

    features.extract_features = interrupted


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=RANKS)])
def test_a_kill_while_features_are_made_costs_nothing_but_time(given: Path, straight: dict, tmp_path: Path, world: int):
    args = evaluate_cases.evaluate_args(given, tmp_path / "run")
    start = Start(args, tmp_path / "logs", world, prepare=kill_during_extraction, tool="evaluate")
    assert start.wait() == [-9] * world, start.output()
    assert any((tmp_path / "run" / "features").glob(".*.tmp"))
    assert not (tmp_path / "run" / "results.json").exists()
    evaluate(given, tmp_path, world)
    assert evaluate_cases.measured_results(tmp_path / "run") == straight


@pytest.mark.process
def test_two_at_a_time_may_share_a_cache(given: Path, straight: dict, tmp_path: Path):
    arg_lists = [
        evaluate_cases.evaluate_args(given, tmp_path / f"run{i}", features__cache=f"{tmp_path}/cache") for i in (0, 1)
    ]
    starts = [Start(args, tmp_path / "logs", tool="evaluate") for args in arg_lists]
    for i, start in enumerate(starts):
        assert start.wait(120) == [0], start.output()
        assert evaluate_cases.measured_results(tmp_path / f"run{i}") == straight


def test_an_image_that_cannot_be_read_is_told_and_counts_again_when_mended(given: Path, straight, tmp_path: Path):
    damaged = evaluate_cases.damage_shards(given / "shards", tmp_path / "shards")
    assert "leaves out sample 1" in evaluate(given, tmp_path, **data_args(tmp_path / "shards"))
    results = evaluate_cases.read_results(tmp_path / "run")
    assert evaluate_cases.find_value(results["rows"], "samples") == 7
    assert results["samples"] == 7
    assert evaluate_cases.find_value(results, "bad_samples") in (1, {"train": 0, "val": 1})
    shutil.copy(given / "shards" / "val" / "000000.tar", damaged)
    evaluate(given, tmp_path, **data_args(tmp_path / "shards"))
    assert evaluate_cases.measured_results(tmp_path / "run") == straight


def test_after_an_outage_nothing_half_is_kept(given: Path, straight: dict, tmp_path: Path, monkeypatch):
    """A source that stays away ends the evaluation; what was read until then is no split."""
    recipe = config.parse(command.Config, evaluate_cases.evaluate_args(given, tmp_path / "run"))
    original = SampleDataset.read_sample
    with monkeypatch.context() as patched:
        patched.setattr(
            SampleDataset,
            "read_sample",
            lambda own, sample: (_raise_unavailable if sample == 5 else original)(own, sample),
        )
        with pytest.raises(ExitError, match="stays away"):
            command.run(recipe)
    evaluate(given, tmp_path)
    assert evaluate_cases.measured_results(tmp_path / "run") == straight


def _raise_unavailable(samples: SampleDataset, sample: int) -> tuple[bytes, int]:
    raise ExitError(74, "the source stays away")


def fail_on_rank_1() -> None:
    """Rank 1's source stays away."""
    if os.environ["RANK"] == "1":
        SampleDataset.read_sample = _raise_unavailable  # type: ignore[method-assign]


@pytest.mark.process
@pytest.mark.ranks
def test_an_outage_of_one_process_ends_both(given: Path, tmp_path: Path):
    """Started by hand or by Slurm, no launcher ends the other."""
    start = Start(
        evaluate_cases.evaluate_args(given, tmp_path / "run"),
        tmp_path / "logs",
        2,
        prepare=fail_on_rank_1,
        tool="evaluate",
    )
    assert start.wait(60) == [74, 74], start.output()
    assert not list((tmp_path / "run" / "features").glob("[0-9a-f]*"))


def test_what_is_missing_or_unlike_is_named(given: Path, tmp_path: Path):
    other_shards = evaluate_cases.write_shards(
        tmp_path / "other", evaluate_cases.image_names({"a": 2, "x": 2}, {"a": 2, "x": 2})
    )
    incomplete = evaluate_cases.write_shards(
        tmp_path / "lacking", evaluate_cases.image_names({"a": 3, "c": 3}, {"a": 2, "bee": 2, "c": 2})
    )
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    for code, overrides, expected in [
        (64, {"encoder": ""}, "encoder"),
        (65, {"encoder": f"{tmp_path}/junk"}, "junk"),
        (64, {"data__train": ""}, "data.train"),
        (65, {"data__val": f"{tmp_path}/nowhere"}, "nowhere"),
        (65, {"data__val": f"{other_shards}/val"}, "class"),
        (65, data_args(incomplete), "bee"),
        (64, {"data__image_size": "18"}, "patches"),
        (64, {"features__layers": "3"}, "blocks are 1 to 2"),
        (64, {"features__readouts": "max"}, "features.readouts"),
        (64, {"methods": "knn,lineer"}, "linear"),
        (64, {"knn__k": "0"}, "knn.k"),
        (65, {"few_shot__shots": "25,50", "methods": "few_shot"}, "few_shot"),
        *((64, {"few_shot__shots": shots}, "few_shot.shots") for shots in ("0", "1,0")),
    ]:
        message = expect_refusal(given, tmp_path, code, **overrides)
        assert expected in message, (overrides, message)


def test_labels_outside_the_classes_are_counted(given: Path, tmp_path: Path):
    for split in ("train", "val"):
        shutil.copytree(given / "shards" / split, tmp_path / split)
        content = json.loads((tmp_path / split / "manifest.json").read_text()) | {"classes": ["a", "b"]}
        (tmp_path / split / "manifest.json").write_text(json.dumps(content))
    assert re.search("train.*6 |6 .*train", expect_refusal(given, tmp_path, **data_args(tmp_path)))


def test_an_encoder_of_other_channels_or_of_nan_is_refused(given: Path, tmp_path: Path):
    gray = evaluate_cases.export_tiny_encoder(tmp_path / "gray", channels=1)
    assert "channels" in expect_refusal(given, tmp_path, encoder=str(gray))
    for value in (float("nan"), float("inf")):
        spoil = partial(lambda value, encoder: torch.nn.init.constant_(encoder.blocks[1].mlp.fc2.bias, value), value)
        message = expect_refusal(
            given, tmp_path, encoder=str(evaluate_cases.export_tiny_encoder(tmp_path / "sick", spoil))
        )
        assert "sick" in message or "NaN" in message or "finite" in message


def test_features_that_never_change_or_one_image_a_class_are_no_error(given: Path, tmp_path: Path):
    """A dead encoder has the same features of every image; of one image a class all is made that can be."""
    dead = evaluate_cases.export_tiny_encoder(
        tmp_path / "dead", lambda encoder: [torch.nn.init.zeros_(p) for p in encoder.parameters()]
    )
    evaluate(given, tmp_path, encoder=str(dead))
    assert evaluate_cases.read_results(tmp_path / "run")
    shards = evaluate_cases.write_shards(tmp_path, evaluate_cases.image_names({"a": 1, "b": 1}, {"a": 1, "b": 1}))
    output = evaluate(given, tmp_path / "few", knn__k="20", **data_args(shards))
    left_out = [line for line in output.splitlines() if line.startswith("few_shot.shots")]
    assert len(left_out) == 2 * 1, "a line for each read-out: 2 shots are left out"
    assert evaluate_cases.find_value(evaluate_cases.read_results(tmp_path / "few" / "run"), "samples") == 2
