"""Numbers that are not finite, that jump or differ between ranks: what is skipped, undone, refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.data import manifest
from ssl_vit.data.dataset import Data
from ssl_vit.data.plan import Plan
from ssl_vit.errors import DATA, INTEGRITY, PREEMPTED
from ssl_vit.model import Model
from ssl_vit.rng import sample_seed
from ssl_vit.runtime import Engine, choose
from ssl_vit.train import checkpoint
from tests import tiny_runs
from tests.odd import unsteady
from tests.train.scenarios import KILLED, Scenario, Stage, case, each

BAD = range(15, 18)  # three steps in a row; the newest checkpoint before them is that of step 14
LEFT_OUT = [14, 15, 16]  # their batches, counted from 0


def plan(shards: Path) -> Plan:
    """The order of the samples that the run has to keep."""
    sizes = [shard.samples for shard in manifest.load(shards / "train").shards]
    return Plan(sizes, seed=0, batch=tiny_runs.BATCH, lanes=Data().lanes, window=Data().window)


def digest(shards: Path, batches: list[int]) -> str:
    """What a row says of the samples of these batches."""
    seeds = [sample_seed(0, *pair) for batch in batches for pair in plan(shards).batch(batch)]
    return f"{sum(seeds) % 2**64:016x}"


def noted(stage: Stage) -> list[tuple[int, int]]:
    """Step and batch of the lines of numerics.jsonl, each of which names the samples that the plan has in its batch."""
    lines = [json.loads(line) for line in (stage.run / "numerics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["samples"] == [[*map(int, pair)] for pair in plan(stage.shards).batch(line["batch"])]
    return [(line["step"], line["batch"]) for line in lines]


SKIPS = [case(1, 0, "nan", default=True), case(2, 1, "nan", default=True), case(2, 0, "inf")]


@pytest.mark.parametrize(("world", "rank", "action"), SKIPS)
def test_a_bad_step_is_skipped_by_all_ranks(stage: Stage, world: int, rank: int, action: str):
    """Once, and twice in a row: weights and moments keep every bit, the steps are counted, their samples noted."""
    run, fault = stage.run, f"{action}:point=loss:rank={rank}:step=5,{action}:point=loss:rank={rank}:step=8-9"
    stage.play(Scenario((0,) * world, fault, words=("steps=9", "save_every=1", "keep=99")))
    assert 5 not in tiny_runs.saved(run)  # it waits until it is clear whether the run goes back
    before, after = (checkpoint.load(run / "checkpoints" / f"step-{step:08d}")[:2] for step in (7, 9))
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert [row["skipped_updates"] for row in tiny_runs.rows(run)] == [0, 1, 2]
    assert noted(stage) == [(5, 4), (8, 7), (9, 8)]
    assert tiny_runs.lost_samples(run, stage.shards, 9) == 0


def never_saw_them(stage: Stage, world: int) -> Path:
    """A run that leaves the batches out because its checkpoint says so."""
    never = stage.at("never")
    if world == 1:
        never.stop("loss:step=15")
    else:
        never.play(Scenario((PREEMPTED,) * world, "term:point=save.mid:step=14"))
    model, optimizer, state = checkpoint.load(tiny_runs.last(never.run))
    state |= {"left_out": LEFT_OUT, "rollbacks": 1}
    checkpoint.save(never.run / "checkpoints", 14, 3, model, optimizer, state, world)
    never.finish(world)
    return never.run


def assert_went_back(stage: Stage, said: str) -> None:
    """It was said, and the bad steps are noted with their samples."""
    assert f"back to the newest checkpoint, on without batches {LEFT_OUT}" in said
    assert noted(stage) == list(zip(BAD, LEFT_OUT, strict=True))


def bad_steps(world: int) -> str:
    return f"nan:point=loss:rank={world - 1}:step={BAD[0]}-{BAD[-1]}"


def test_three_bad_steps_go_back(stage: Stage):
    """To the newest checkpoint, and on as a run that never saw their batches; the default tier's as a real process."""
    start = stage.start(1, bad_steps(1))
    assert start.wait() == [0], start.said()
    assert_went_back(stage, start.said())
    stage.as_in_peace(never_saw_them(stage, 1))
    rows = {row["step"]: row for row in tiny_runs.rows(stage.run)}
    assert [rows[step]["samples_seen"] for step in (12, 15, 30)] == [12 * 8, 18 * 8, 33 * 8]  # what is left out counts
    assert rows[15]["samples_digest"] == digest(stage.shards, [12, 13, 17])
    assert rows[18]["samples_digest"] == digest(stage.shards, [18, 19, 20])


@pytest.mark.parametrize("world", [case(1), pytest.param(2, marks=pytest.mark.long)])
def test_a_run_that_went_back_and_is_killed_goes_on(stage: Stage, world: int):
    """Soon after it, and later; bad data are bad again, as long as they are there."""
    begun = {"killed soon": (19, bad_steps(world)), "killed": (25, ""), "back": (99, "")}
    peace = never_saw_them(stage, world)
    for name, (step, again) in begun.items():
        one = stage.at(name.replace(" ", "-"))
        fault = f"{bad_steps(world)},kill:point=update:step={step}"
        played = one.begin(Scenario((0,) * world, fault))
        assert played.codes == [0] * world if name == "back" else KILLED in played.codes, played.said
        assert_went_back(one, played.said)
        one.play(Scenario((0,) * world, again))
        one.as_in_peace(peace)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp2"])
def test_every_engine_goes_back(stage: Stage, engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """And takes the batches that DDP takes then, with its losses to rounding."""
    monkeypatch.setattr(os, "environ", {})
    choose(engine)
    asked: dict[str, Any] = os.environ | {"DS_ACCELERATOR": "cpu"}
    monkeypatch.undo()
    for name, environment in (("ddp", {}), (engine, asked)):
        start = stage.at(name).start(2, bad_steps(2), **environment)
        assert start.wait(120) == [0, 0], start.said()
        assert f"back to the newest checkpoint, on without batches {LEFT_OUT}" in start.said()
    for mine, theirs in zip(*(tiny_runs.rows(stage.at(name).run) for name in ("ddp", engine)), strict=True):
        assert mine["samples_digest"] == theirs["samples_digest"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)


@pytest.mark.parametrize("world", [1, case(2)])
def test_a_third_rollback_is_refused(stage: Stage, world: int):
    """With 65 and all samples of the bad steps on disk; the last good checkpoint stays."""
    fault = f"nan:point=loss:rank={world - 1}:step={BAD[0]}-99"
    says = ("back to the newest checkpoint",)
    played = stage.play(Scenario((DATA,) * world, fault, "numerics.jsonl", says=says, saved=14))
    assert played.said.count("back to the newest checkpoint") == 2
    assert [batch for _, batch in noted(stage)] == list(range(14, 23))
    assert tiny_runs.saved(stage.run) == [7, 14]
    assert all(value.isfinite().all() for value in checkpoint.weights(tiny_runs.last(stage.run)).values())


@pytest.mark.parametrize(("world", "policy"), [(1, "warn"), case(2, "rollback")])
def test_a_loss_that_jumps(stage: Stage, world: int, policy: str):
    """Is said and noted, and under spike=rollback undone and left out; no other step is."""
    skipped = int(policy == "rollback")
    fault = f"spike:point=loss:rank={world - 1}:step=40"
    played = stage.play(Scenario((0,) * world, fault, words=("steps=45", f"spike={policy}")))
    assert played.said.count("sigma") == 1
    assert noted(stage) == [(40, 39)]
    assert ("back to the newest checkpoint" in played.said) == bool(skipped)
    last = tiny_runs.rows(stage.run)[-1]
    assert (last["samples_seen"], last["skipped_updates"]) == ((45 + skipped) * tiny_runs.BATCH, 0)


def flipped(found: int, victim: int, *words: str, world: int = 2, **more: Any) -> Scenario:
    """A weight of one rank that is flipped after step 10, and what it is called when it is found."""
    fault = f"flip:point=weights:rank={victim}:step=11"
    line = rf"(?=.*step {found}\b)(?=.*rank {victim} on )(?=.* tensors)(?=.*encoder)"
    says = ("pretrain.py: step",)  # and of what is not finite
    return Scenario((INTEGRITY,) * world, fault, line, says=says, saved=7, words=words, **more)


FLIPS = {
    "at the next comparison": flipped(12, 1, "check_every=3", tier="default"),
    "before the next checkpoint": flipped(14, 1, "check_every=100", resumed=True),
    "of three ranks": flipped(12, 0, "check_every=4", "batch=9", world=3),
}


@each(FLIPS)
def test_a_flipped_weight_is_found(scenario: Scenario, stage: Stage):
    """At the next comparison, or before the next checkpoint; of three ranks the one that differs is named."""
    played = stage.play(scenario)
    assert next(iter(checkpoint.weights(tiny_runs.last(played.run)))).startswith("encoder.")
    if not scenario.resumed:
        assert tiny_runs.saved(stage.run) == [7]
        if "default" not in scenario.tier:
            stage.finish(len(scenario.codes), *scenario.words)


UNSTEADY = "verify_step: the loss differs between two passes over one batch"


@pytest.mark.parametrize("world", [1, case(2)])
def test_a_step_that_cannot_be_repeated_is_refused(stage: Stage, world: int, monkeypatch: pytest.MonkeyPatch):
    """Before anything is trained; where it can, looking leaves no trace."""
    more = ("verify_step=true",)
    assert "two passes over one batch gave the same bits" in stage.finish(world, *more)
    stage.as_in_peace(stage.tiny_run(world))
    monkeypatch.setattr(Model, "forward", Model.forward)  # what comes back
    unsteady() if world == 1 else None
    prepare = None if world == 1 else unsteady
    stage.at("bad").play(Scenario((INTEGRITY,) * world, "", UNSTEADY, saved=0, words=more, prepare=prepare))
