"""tools/evaluate.py as a command: every protocol's number is its oracle's; comparisons of runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ssl_vit.data import manifest
from ssl_vit.data.samples import Data, Samples
from ssl_vit.encoders.weights import load_encoder
from ssl_vit.evaluate import few_shot
from tests import frozen, twins
from tests.starts import call

METHODS = ["knn.k=7", "few_shot.shots=1,5", "linear.l2=0.01", "metrics.bootstrap=50", "data.workers=0"]
READOUTS = ("mean", "class")
CLASSES = ("a", "b_c", "d-E")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of images that say little about their class, so that scores are mixed, and run/encoder."""
    folder = tmp_path_factory.mktemp("evaluate")
    frozen.shards(folder, frozen.files(dict.fromkeys(CLASSES, 14), dict.fromkeys(CLASSES, 9)), shard_samples=11)
    frozen.encoder(folder / "run")
    return folder


def words(given: Path, run: Path, *more: str) -> list[str]:
    data = [f"data.train={given}/shards/train", f"data.val={given}/shards/val"]
    return [f"encoder={given}/run", *data, f"run={run}", *METHODS, *more]


def features(given: Path, split: str, untrained: Any = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Both read-outs of a split and its labels, an image at a time."""
    encoder = untrained or load_encoder(given / "run")
    source = manifest.load(given / "shards" / split)
    samples = Samples(source, Data(image_size=16, workers=0), seed=0, training=False)
    rows, labels = [], []
    for i in range(source.samples):
        one, _ = samples.batch([(0, i)])
        with torch.no_grad():
            rows.append(encoder(one["image"])[0].numpy())
        labels.append(int(one["label"]))
    tokens = np.stack(rows)
    return {"mean": tokens[:, 1:].mean(1), "class": tokens[:, 0]}, np.array(labels)


def oracle(given: Path, readout: str, untrained: Any) -> dict[str, Any]:
    """Top-1 by a loop over pairs, by np.linalg.solve on the same draws, by scikit-learn."""
    (train, labels), (test, truth) = (features(given, split, untrained) for split in ("train", "val"))
    x, y = train[readout], test[readout]
    found: dict[str, Any] = {"knn": (twins.knn(x, labels, y, 3, 7, 0.07).argmax(1) == truth).mean()}
    for shots in (1, 5):
        ids = [few_shot.support(torch.tensor(labels), 3, shots, seed).numpy() for seed in range(3)]
        scores = [twins.few_shot(x[i], labels[i], y, 3, 1024.0, dual=True).argmax(1) == truth for i in ids]
        found[f"few_shot_{shots}"] = [float(one.mean()) for one in scores]
    mean, std = x.mean(0), x.std(0) + 1e-5
    solver = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-9, max_iter=5000)
    solver.fit((x - mean).astype(np.float64) / std, labels)
    found["linear"] = float(np.mean(solver.predict((y - mean).astype(np.float64) / std) == truth))
    return found


@pytest.fixture(scope="module")
def run(given: Path) -> Path:
    """One evaluation with everything."""
    frozen.run_tool("evaluate", words(given, given / "done"), given)
    return given / "done"


def row(found: dict[str, Any], *names: str, case: str = "") -> dict[str, Any]:
    """The row of an encoder, a read-out and a method."""
    (one,) = [r for r in found["rows"] if (r["who"], r["readout"], r["method"]) == names and case in r["case"]]
    return one


@pytest.mark.parametrize("who", ["pretrained", "random"])
@pytest.mark.parametrize("readout", READOUTS)
def test_every_number_is_its_oracles(given: Path, run: Path, who: str, readout: str):
    """Of 27 images none may be judged otherwise; the untrained encoder is that of the seed."""
    found, untrained = frozen.results(run), None
    if who == "random":
        config = load_encoder(given / "run").config
        torch.manual_seed(0)
        untrained = config.build().eval()
    want = oracle(given, readout, untrained)
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


def test_results_and_page_tell_what_is_needed_to_repeat_them(given: Path, run: Path):
    found, page = frozen.results(run), (run / "report.md").read_text()
    assert len(found["rows"]) == 2 * 2 * (1 + 1 + 2)
    assert len({row["top1"] for row in found["rows"]}) >= 6, "else the oracles would show little"
    for split in ("train", "val"):
        assert found["digests"][f"data.{split}"] == manifest.load(given / "shards" / split).identity
    assert len(found["digests"]["encoder"]) == 64
    assert found["protocol"]["knn"] == {"k": 7, "temperature": 0.07}
    assert found["protocol"]["few_shot"]["l2"] == 1024
    assert f"encoder={given}/run" in found["command"]
    for word in (found["command"], found["digests"]["encoder"], found["digests"]["data.val"], "random", "few_shot"):
        assert word in page
    assert f"{100 * row(found, 'pretrained', 'mean', 'knn')['top1']:.2f}" in page
    assert "<table>" in (run / "report.html").read_text()


def test_any_layer_is_judged(given: Path, tmp_path: Path):
    more = ["features.layers=1,2", "features.readouts=class", "random=false", "methods=few_shot"]
    frozen.run_tool("evaluate", words(given, tmp_path / "run", *more), tmp_path)
    found = frozen.results(tmp_path / "run")["rows"]
    assert [(one["layer"], one["readout"]) for one in found] == [(1, "class")] * 2 + [(2, "class")] * 2
    assert [one["draws"] for one in found[:2]] != [one["draws"] for one in found[2:]]


def test_runs_stand_side_by_side_and_keep_their_reports(given: Path, run: Path, tmp_path: Path):
    one = ["features.readouts=mean", "random=false", "methods=knn"]
    frozen.run_tool("evaluate", words(given, tmp_path / "a|b", *one), tmp_path)
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
    for bad in (f"{tmp_path}/nowhere", f"{given}/run"):
        said = frozen.refused("evaluate", [f"compare={run},{bad}", f"run={tmp_path}/table"], tmp_path)
        assert "results" in said
    shutil.copytree(run, tmp_path / "one")  # `run` is runs/evaluate unless said otherwise, where a report may lie
    call("evaluate", [f"compare={tmp_path}/one,{run}", f"run={tmp_path}/one"])
    assert (tmp_path / "one" / "report.md").read_text() == (run / "report.md").read_text()


@pytest.mark.parametrize(
    "key", ["data.subset=0.5", "data.hold_out=0.3", "metrics.label_sets=real.json", "metrics.class_map=map.json"]
)
def test_no_key_is_taken_and_does_nothing(given: Path, run: Path, key: str, tmp_path: Path):
    """Either the numbers are others, or the key is refused."""
    if call("evaluate", words(given, tmp_path / "run", key, "random=false")).code == 0:
        mine = [one for one in frozen.results(run)["rows"] if one["who"] == "pretrained"]
        assert frozen.results(tmp_path / "run")["rows"] != mine
