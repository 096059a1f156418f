"""A run that is stopped and resumed is the run that never stopped, bit for bit; and what else a run promises."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ssl_vit import config, inject, load_encoder, recipe, session
from ssl_vit.counter import sample_seed
from ssl_vit.data import manifest
from ssl_vit.data.plan import Plan
from ssl_vit.data.samples import Data
from ssl_vit.exits import CANNOT_CREATE, DATA, MISMATCH, PREEMPTED, USAGE, Refusal
from ssl_vit.heads.mean_color import MeanColorHead
from ssl_vit.recipe import Finetune, Pretrain
from ssl_vit.train import loop, pace
from ssl_vit.train.run import Run
from tests.conftest import TINY, draw_squares
from tests.runs import differing, results, told
from tests.train.engines import fresh, rows

DROPOUT = "encoder.dropout=0.1"


class StopAfter:
    """Stands in for the signals: asks to stop once `steps` steps were taken."""

    def __init__(self, steps: int):
        self.left = steps

    def agreed(self, now: bool = False) -> bool:
        self.left -= not now
        return self.left == 0

    def close(self) -> None:
        pass


def stopped(step: int, train: Callable[..., int], *given: Any) -> None:
    """Train until a signal comes after so many steps."""
    with patch.object(loop, "StopSignal", lambda _: StopAfter(step)), pytest.raises(Refusal) as end:
        train(*given)
    assert end.value.code == PREEMPTED


def refused(code: int, match: str, start: Callable[..., object], *given: Any) -> None:
    """A start ends with this code, and with one line that matches."""
    with pytest.raises(Refusal, match=match) as end:
        start(*given)
    assert end.value.code == code
    assert "\n" not in end.value.message


def start(kind: type[Pretrain] | type[Finetune], shards: Path, run: Path, given: list[str]) -> int:
    data = [f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}", "tracker=none"]
    return session.run(config.parse(kind, [*TINY, *data, *given], recipe.FOLDER))


def pretrain(shards: Path, run: Path, *arguments: str) -> int:
    given = ["steps=10", "log_every=3", "save_every=4", "optim.warmup_steps=2", *arguments]
    return start(Pretrain, shards, run, given)


def finetune(shards: Path, run: Path, *arguments: str) -> int:
    given = ["steps=40", "optim.lr=0.1", "data.flip=false", "data.crop_area=0.5,1", *arguments]
    return start(Finetune, shards, run, given)


def assert_same_run(a: Path, b: Path) -> None:
    """Checkpoint, metrics (but for speeds) and export are the same bits."""
    assert differing(results(a), results(b)) == {}


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps, with dropout, that was never stopped."""
    run = tmp_path_factory.mktemp("straight")
    assert pretrain(shards, run, DROPOUT) == 0
    fresh()
    return run


@pytest.mark.parametrize("stop", [1, 5, 8, *(pytest.param(n, marks=pytest.mark.process) for n in (2, 3, 4, 6, 7, 9))])
def test_stop_at_any_step_and_resume(shards: Path, straight: Path, tmp_path: Path, stop: int):
    stopped(stop, pretrain, shards, tmp_path, DROPOUT)
    assert told(tmp_path)["code"] == PREEMPTED
    assert pretrain(shards, tmp_path, DROPOUT, "data.workers=1" if stop == 5 else "data.workers=0") == 0
    assert_same_run(straight, tmp_path)
    assert told(tmp_path) | {"time": ""} == {"code": 0, "step": 10, "reason": "done", "rank": 0, "time": ""}


def test_a_kill_between_checkpoints_loses_only_the_steps_since(
    shards: Path, straight: Path, tmp_path: Path, monkeypatch
):
    """Nothing is saved on the way out, and a row of metrics was cut in the middle."""

    def die(place: str, step: int = 0, value: Any = None) -> Any:
        if (place, step) == ("row", 9):
            raise SystemExit(137)
        return value

    monkeypatch.setattr(inject, "arm", lambda text: None)
    monkeypatch.setattr(inject, "point", die)
    with pytest.raises(SystemExit):
        pretrain(shards, tmp_path, DROPOUT)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    monkeypatch.undo()
    pretrain(shards, tmp_path, DROPOUT)
    assert_same_run(straight, tmp_path)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(shards: Path, straight: Path, tmp_path: Path):
    stopped(9, pretrain, shards, tmp_path, DROPOUT)
    (tmp_path / "checkpoints" / "step-00000009" / "model.safetensors").write_bytes(b"")
    pretrain(shards, tmp_path, DROPOUT)
    assert_same_run(straight, tmp_path)


def test_what_a_run_leaves_behind(straight: Path):
    assert [row["step"] for row in rows(straight)] == [3, 6, 9, 10]
    first = rows(straight)[0]
    assert {"step", "loss", "lr", "images_per_second", "accuracy", "unigram_entropy", "grad_norm"} <= first.keys()
    assert first["samples_seen"] == 24
    assert "val_loss" in rows(straight)[-1]
    assert (straight / "reconstruction.png").stat().st_size > 0
    assert sorted(path.name for path in (straight / "checkpoints").glob("[!l]*")) == ["step-00000008", "step-00000010"]
    result = json.loads((straight / "results.json").read_text())
    assert result["samples"] > 0
    assert result["protocol"]["steps"] == 10


def test_a_run_takes_the_samples_of_the_plan(shards: Path, straight: Path):
    """The digest of the first row is that of the plan's first three batches."""
    data = manifest.load(shards / "train")
    plan = Plan([shard.samples for shard in data.shards], seed=0, batch=8, lanes=Data().lanes, window=Data().window)
    seeds = [sample_seed(0, epoch, sample) for step in range(3) for epoch, sample in plan.batch(step)]
    assert rows(straight)[0]["samples_digest"] == f"{sum(seeds) % 2**64:016x}"


def test_the_finished_command_again_changes_nothing(shards: Path, straight: Path):
    before = rows(straight), results(straight)
    assert pretrain(shards, straight, DROPOUT) == 0
    assert (rows(straight), results(straight)) == before


def test_micro_batches_add_up_to_the_batch(shards: Path, tmp_path: Path):
    """The same global batches; losses, norms and weights equal to rounding."""
    for name, micro in {"one": "8", "four": "2"}.items():
        pretrain(shards, tmp_path / name, f"micro_batch={micro}")
    one, four = rows(tmp_path / "one"), rows(tmp_path / "four")
    for a, b in zip(one, four, strict=True):
        assert a["samples_digest"] == b["samples_digest"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_recipe_of_a_run_is_kept(shards: Path, tmp_path: Path):
    pretrain(shards, tmp_path, "steps=2")
    changes = r"optim\.lr: 0\.001 -> 0\.5; steps|steps: 2 -> 3; optim\.lr: 0\.001 -> 0\.5"
    refused(MISMATCH, changes, pretrain, shards, tmp_path, "steps=3", "optim.lr=0.5")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["steps"] == 2
    assert pretrain(shards, tmp_path, "steps=2", "log_every=1", "keep=1") == 0  # these may change


def test_a_start_that_failed_before_the_first_step_binds_nothing(shards: Path, tmp_path: Path):
    refused(DATA, "no such folder", pretrain, shards, tmp_path, "data.train=/nowhere", "steps=3")
    assert told(tmp_path)["code"] == DATA
    assert pretrain(shards, tmp_path, "steps=2") == 0


def test_the_processes_must_divide_the_batch():
    made = config.parse(Pretrain, ["batch=6"], recipe.FOLDER)
    refused(USAGE, "cannot be shared by 4 processes; these can: 1, 2, 3, 6", pace.shared, made, 0, 4)
    assert pace.shared(made, 1, 3).micro_batch == 2


def test_a_folder_in_use_is_refused(shards: Path, tmp_path: Path):
    holder = Run(tmp_path)
    holder.claim(config.parse(Pretrain, [], recipe.FOLDER))
    refused(CANNOT_CREATE, "in use by pid", pretrain, shards, tmp_path)
    assert not (tmp_path / "exit.json").exists()  # that is the holder's to write
    holder.release()


def test_other_data_in_the_same_run_is_refused(shards: Path, tmp_path: Path):
    pretrain(shards, tmp_path, "steps=2")
    refused(MISMATCH, "other data", pretrain, shards, tmp_path, "steps=2", f"data.train={shards}/val")


def test_bad_numbers_are_skipped_and_endless_ones_stop_the_run(shards: Path, tmp_path: Path, monkeypatch):
    """One bad loss leaves weights and optimizer alone and is counted; where going back does not help the run ends."""
    forward, calls = MeanColorHead.forward, []

    def poisoned(self, encoder, batch):
        output = forward(self, encoder, batch)
        if self.training:
            calls.append(1)
        bad = self.training and (len(calls) == 2 or len(calls) > 6)
        return output._replace(loss=output.loss * float("nan")) if bad else output

    monkeypatch.setattr(MeanColorHead, "forward", poisoned)
    refused(DATA, "not finite in 3 steps in a row up to 7, after 2 rollbacks", pretrain, shards, tmp_path)
    assert [row["skipped_updates"] for row in rows(tmp_path)] == [1, 2]
    weights = load_file(tmp_path / "checkpoints" / "step-00000004" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_finetuning_learns_colours_and_counts_each_sample_once(shards: Path, straight: Path, tmp_path: Path):
    finetune(shards, tmp_path, f"init={straight}", "encoder.pool=mean")
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["samples"] == json.loads((shards / "val" / "manifest.json").read_text())["samples"]
    assert result["top1"] > 0.9
    assert result["top5"] == 1.0
    assert load_encoder(tmp_path).pool == "mean"


def test_finetuning_starts_from_the_encoder_at_a_higher_resolution(shards: Path, straight: Path, tmp_path: Path):
    arguments = [f"init={straight}", "data.image_size=24", "optim.lr=0", "steps=1", "encoder.dropout=0"]
    finetune(shards, tmp_path, *arguments)
    before, after = load_encoder(straight), load_encoder(tmp_path)
    assert after.grid == (6, 6)
    assert torch.equal(before.blocks[1].mlp.fc1.weight, after.blocks[1].mlp.fc1.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data.image_size=18"], USAGE, "data.image_size=18: an image of 18 x 18 cannot be cut into patches of 4"),
        (["data.train=none"], USAGE, "data.train: it must be given"),
        (["data.train=/nowhere"], DATA, "/nowhere: no such folder"),
        (["micro_batch=3"], USAGE, "micro_batch=3 does not divide"),
        (["init=/nowhere"], DATA, "/nowhere: no such run"),
        (["run=/proc/x"], CANNOT_CREATE, "run=/proc/x"),
        (["head.ratio=0.01"], USAGE, "head.ratio=0.01 of 16 patches corrupts none"),
        (["encoder.channels=1"], USAGE, "encoder.channels=1: images are read as RGB"),
        (["run="], USAGE, "run: ''"),
    ],
)
def test_bad_input_is_one_line(shards: Path, tmp_path: Path, arguments, code, message):
    refused(code, re.escape(message), pretrain, shards, tmp_path, *arguments)


def test_an_architecture_that_contradicts_its_source_is_refused(shards: Path, straight: Path, tmp_path: Path):
    refused(USAGE, r"give encoder\.depth=2, or none", finetune, shards, tmp_path, f"init={straight}", "encoder.depth=3")


def test_a_folder_of_images_is_converted_first(squares: Path, tmp_path: Path):
    pretrain(tmp_path, tmp_path / "runs" / "r", f"data.train={squares}", "data.val=none", "steps=1")
    assert len(list((tmp_path / "runs" / "shards").glob("*/manifest.json"))) == 1


def test_a_folder_of_splits_gives_each_its_own(shards: Path, tmp_path: Path):
    """data.train takes train, data.val takes val; the same for folders of images with splits."""
    images = tmp_path / "images"
    for split in ("train", "test"):
        draw_squares(images / split, count=3)
    for name, folder in {"shards": shards, "images": images}.items():
        pretrain(shards, tmp_path / "runs" / name, f"data.train={folder}", f"data.val={folder}", "steps=1")
    assert rows(tmp_path / "runs" / "images")[-1]["val_samples"] == 9


def test_tars_without_a_manifest_are_refused(tmp_path: Path):
    (tmp_path / "000000.tar").write_bytes(b"\0" * 1024)
    words = [f"data.train={tmp_path}", "data.val=none"]
    refused(DATA, r"has tars but no manifest\.json", pretrain, tmp_path, tmp_path / "r", *words)


def test_a_dry_run_says_what_it_would_do_and_trains_nothing(shards: Path, tmp_path: Path, capsys):
    assert pretrain(shards, tmp_path, "dry_run=true") == 0
    said = capsys.readouterr().out
    for text in ("parameters      encoder 7,", "FLOPs an image", "10 steps of 8 images", "head:\n  kind: mean_color"):
        assert text in said
    assert {path.name for path in tmp_path.iterdir()} == {"dry_run.png", "dry_run.json"}
