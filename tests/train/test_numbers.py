"""Numbers that are not finite, that jump or differ between ranks: what is skipped, undone, refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.cost import Engine
from ssl_vit.counter import sample_seed
from ssl_vit.data import manifest
from ssl_vit.data.plan import Plan
from ssl_vit.data.samples import Data
from ssl_vit.exits import DATA, INTEGRITY, MISMATCH, PREEMPTED, USAGE
from ssl_vit.train import checkpoint
from ssl_vit.train.environment import choose
from ssl_vit.train.optim import learning_rate
from tests import runs
from tests.odd import unsteady
from tests.starts import Start

BAD = range(15, 18)  # three steps in a row; the newest checkpoint before them is that of step 14
LEFT_OUT = [14, 15, 16]  # their batches, counted from 0


def plan(shards: Path) -> Plan:
    """The order of the samples that the run has to keep."""
    sizes = [shard.samples for shard in manifest.load(shards / "train").shards]
    return Plan(sizes, seed=0, batch=runs.BATCH, lanes=Data().lanes, window=Data().window)


def digest(shards: Path, batches: list[int]) -> str:
    """What a row says of the samples of these batches."""
    seeds = [sample_seed(0, *pair) for batch in batches for pair in plan(shards).batch(batch)]
    return f"{sum(seeds) % 2**64:016x}"


def noted(run: Path) -> list[dict[str, Any]]:
    """The lines of numerics.jsonl."""
    return [json.loads(line) for line in (run / "numerics.jsonl").read_text().splitlines()]


def right_keys(shards: Path, lines: list[dict[str, Any]]) -> bool:
    """Whether each line names the samples that the plan has in its batch."""
    return all(
        [tuple(pair) for pair in line["samples"]]
        == [tuple(map(int, pair)) for pair in plan(shards).batch(line["batch"])]
        for line in lines
    )


@pytest.mark.parametrize(("world", "rank", "action"), [(1, 0, "nan"), (2, 1, "nan"), (2, 0, "inf")])
def test_a_bad_step_is_skipped_by_all_ranks(shards: Path, tmp_path: Path, world: int, rank: int, action: str):
    """Once, and twice in a row: weights and moments keep every bit, the steps are counted, their samples noted."""
    run, fault = tmp_path / "run", f"{action}:point=loss:rank={rank}:step=5,{action}:point=loss:rank={rank}:step=8-9"
    start = Start(runs.words(shards, run, "steps=9", "save_every=1", "keep=99"), tmp_path / "logs", world, fault)
    assert start.wait() == [0] * world, start.said()
    for good, bad in ((4, 5), (7, 9)):
        found = [run / "checkpoints" / f"step-{step:08d}" for step in (good, bad)]
        if bad == 5:  # it waits until it is clear whether the run goes back
            assert not found[1].exists()
            continue
        before, after = (checkpoint.load(folder)[:2] for folder in found)
        for old, new in zip(before, after, strict=True):
            assert old.keys() == new.keys()
            assert all(torch.equal(old[name], new[name]) for name in old)
    assert [row["skipped_updates"] for row in runs.rows(run)] == [0, 1, 2]
    assert [(line["step"], line["batch"]) for line in noted(run)] == [(5, 4), (8, 7), (9, 8)]
    assert right_keys(shards, noted(run))
    assert runs.lost_samples(run, shards, 9) == 0


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_three_bad_steps_go_back(shards: Path, tmp_path: Path, world: int):
    """To the newest checkpoint, and on as a run that never saw their batches; also where it is killed after that."""
    fault = f"nan:point=loss:rank={world - 1}:step={BAD[0]}-{BAD[-1]}"
    begun = {
        "back": fault,
        "killed soon": f"{fault},kill:point=update:step=19",
        "killed": f"{fault},kill:point=update:step=25",
    }
    for name, faults in begun.items():
        start = Start(runs.words(shards, tmp_path / name), tmp_path / "logs", world, faults)
        codes = start.wait()
        assert codes == [0] * world if name == "back" else -9 in codes, start.said()
        assert f"back to the newest checkpoint, on without batches {LEFT_OUT}" in start.said()
        lines = noted(tmp_path / name)
        assert [(line["step"], line["batch"]) for line in lines] == list(zip(BAD, LEFT_OUT, strict=True))
        assert right_keys(shards, lines)
    for name, faults in (("killed soon", fault), ("killed", "")):  # bad data are bad again, as long as they are there
        again = Start(runs.words(shards, tmp_path / name), tmp_path / "logs", world, faults)
        assert again.wait() == [0] * world, again.said()

    never = tmp_path / "never"
    start = Start(runs.words(shards, never), tmp_path / "logs", world, "term:point=save.mid:step=14")
    assert start.wait() == [PREEMPTED] * world, start.said()
    model, optimizer, state = checkpoint.load(runs.last(never))
    state |= {"left_out": LEFT_OUT, "rollbacks": 1}
    checkpoint.save(never / "checkpoints", 14, 3, model, optimizer, state, world)
    assert Start(runs.words(shards, never), tmp_path / "logs", world).wait() == [0] * world
    for name in begun:
        assert runs.differing(runs.results(never), runs.results(tmp_path / name)) == {}, name

    rows = {row["step"]: row for row in runs.rows(tmp_path / "back")}
    assert [rows[step]["samples_seen"] for step in (12, 15, 30)] == [12 * 8, 18 * 8, 33 * 8]  # what is left out counts
    assert rows[15]["samples_digest"] == digest(shards, [12, 13, 17])
    assert rows[18]["samples_digest"] == digest(shards, [18, 19, 20])


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp2"])
def test_every_engine_goes_back(shards: Path, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """And takes the batches that DDP takes then, with its losses to rounding."""
    fault = f"nan:point=loss:rank=1:step={BAD[0]}-{BAD[-1]}"
    monkeypatch.setattr(os, "environ", {})
    choose(engine)
    asked: dict[str, Any] = os.environ | {"DS_ACCELERATOR": "cpu"}
    monkeypatch.undo()
    for name, environment in (("ddp", {}), (engine, asked)):
        start = Start(runs.words(shards, tmp_path / name), tmp_path / "logs", 2, fault, **environment)
        assert start.wait(120) == [0, 0], start.said()
        assert f"back to the newest checkpoint, on without batches {LEFT_OUT}" in start.said()
    for mine, theirs in zip(*(runs.rows(tmp_path / name) for name in ("ddp", engine)), strict=True):
        assert mine["samples_digest"] == theirs["samples_digest"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)


def test_a_third_rollback_is_refused(shards: Path, tmp_path: Path):
    """With 65 and all samples of the bad steps on disk; the last good checkpoint stays."""
    run = tmp_path / "run"
    start = Start(runs.words(shards, run), tmp_path / "logs", 2, f"nan:point=loss:rank=1:step={BAD[0]}-99")
    assert start.wait() == [DATA, DATA], start.said()
    assert runs.told(run)["code"] == DATA
    assert "numerics.jsonl" in runs.told(run)["reason"]
    assert start.said().count("back to the newest checkpoint") == 2
    assert [line["batch"] for line in noted(run)] == list(range(14, 23))
    assert right_keys(shards, noted(run))
    assert runs.saved(run) == [7, 14]
    assert checkpoint.flaw(runs.last(run)) is None
    assert all(value.isfinite().all() for value in checkpoint.weights(runs.last(run)).values())


@pytest.mark.parametrize(("world", "policy"), [(1, "warn"), (2, "rollback")])
def test_a_loss_that_jumps(shards: Path, tmp_path: Path, world: int, policy: str):
    """Is said and noted, and under spike=rollback undone and left out; no other step is."""
    run, skipped = tmp_path / "run", int(policy == "rollback")
    words = runs.words(shards, run, "steps=45", f"spike={policy}")
    fault = f"spike:point=loss:rank={world - 1}:step=40"
    start = Start(words, tmp_path / "logs", world, fault)
    assert start.wait() == [0] * world, start.said()
    assert start.said().count("sigma") == 1
    assert [(line["step"], line["batch"]) for line in noted(run)] == [(40, 39)]
    assert right_keys(shards, noted(run))
    assert ("back to the newest checkpoint" in start.said()) == bool(skipped)
    assert runs.rows(run)[-1]["samples_seen"] == (45 + skipped) * runs.BATCH
    assert runs.rows(run)[-1]["skipped_updates"] == 0


@pytest.mark.parametrize(
    ("world", "victim", "more", "found"),
    [(2, 1, "check_every=3", 12), (2, 1, "check_every=100", 14), (3, 0, "check_every=4", 12)],
)
def test_a_flipped_weight_is_found(
    shards: Path, tiny_run: Callable[[int], Path], tmp_path: Path, world: int, victim: int, more: str, found: int
):
    """At the next comparison, or before the next checkpoint; of three ranks the one that differs is named."""
    run, batch = tmp_path / "run", "batch=9" if world == 3 else "batch=8"
    words = runs.words(shards, run, batch, more)
    start = Start(words, tmp_path / "logs", world, f"flip:point=weights:rank={victim}:step=11")
    assert start.wait() == [INTEGRITY] * world, start.said()
    reason = runs.told(run)["reason"]
    first = next(iter(checkpoint.weights(runs.last(run))))
    for text in (
        f"step {found}",
        f"rank {victim} on ",
        " in 1 tensor" if found == 11 else " tensors",
        first.split(".")[0],
    ):
        assert text in reason
    assert runs.saved(run) == [7]
    again = Start(words, tmp_path / "logs", world)
    assert again.wait() == [0] * world, again.said()
    if world == 2:
        assert runs.differing(runs.results(tiny_run(2)), runs.results(run)) == {}


def test_a_step_that_cannot_be_repeated_is_refused(shards: Path, tiny_run: Callable[[int], Path], tmp_path: Path):
    """Before anything is trained; where it can, looking leaves no trace."""
    for world in (1, 2):
        bad = Start(
            runs.words(shards, tmp_path / "bad", "verify_step=true"), tmp_path / "logs", world, prepare=unsteady
        )
        assert bad.wait() == [INTEGRITY] * world, bad.said()
        assert "verify_step: the loss differs between two passes over one batch" in bad.said()
        assert runs.saved(tmp_path / "bad") == []
        run = tmp_path / f"good-{world}"
        good = Start(runs.words(shards, run, "verify_step=true"), tmp_path / "logs", world)
        assert good.wait() == [0] * world, good.said()
        assert "two passes over one batch gave the same bits" in good.said()
        assert runs.differing(runs.results(tiny_run(world)), runs.results(run)) == {}


def test_another_rate_must_be_allowed_and_then_acts(shards: Path, tiny_run: Callable[[int], Path], tmp_path: Path):
    """What a checkpoint holds never brings old rates back in silence, nor new ones: old -> new is said."""
    run, logs = tmp_path / "run", tmp_path / "logs"
    assert Start(runs.words(shards, run), logs, 1, "term:point=save.mid:step=14").wait() == [PREEMPTED]
    refused = Start(runs.words(shards, run, "optim.lr=0.002"), logs)
    assert refused.wait() == [MISMATCH]
    assert "optim.lr: 0.001 -> 0.002" in refused.said()
    assert "allow_change=optim.lr" in refused.said()
    unsafe = Start(runs.words(shards, run, "encoder.width=32", "allow_change=encoder.width"), logs)
    assert unsafe.wait() == [USAGE], unsafe.said()
    assert runs.saved(run) == [7, 14]
    words = ["optim.lr=0.002", "optim.betas=0.8,0.99"]
    allowed = Start(runs.words(shards, run, *words, "allow_change=optim.lr,optim.betas"), logs)
    assert allowed.wait() == [0], allowed.said()
    for line in ("optim.lr: 0.001 -> 0.002", "optim.betas: "):
        assert allowed.said().count(line) == 1
    rates = {row["step"]: row["lr"] for row in runs.rows(run)}
    for step, lr in ((12, 0.001), (15, 0.002), (30, 0.002)):
        assert rates[step] == learning_rate(step - 1, lr, runs.STEPS, 2)
    assert runs.differing(runs.state(tiny_run(1)), runs.state(run))
    assert Start(runs.words(shards, run, *words), logs).wait() == [0]  # it is the run's now
