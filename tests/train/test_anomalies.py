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
from ssl_vit.errors import ExitCode
from ssl_vit.model import Model
from ssl_vit.rng import sample_seed
from ssl_vit.runtime import Engine, select_engine
from ssl_vit.train import checkpoint
from tests import tiny_runs
from tests.machines import unsteady_loss
from tests.train.scenarios import KILLED, Scenario, Stage, case, parametrize_scenarios

BAD_STEPS = range(15, 18)  # three steps in a row; the newest checkpoint before them is that of step 14
LEFT_OUT_BATCHES = [14, 15, 16]  # their batches, counted from 0


def make_plan(shards: Path) -> Plan:
    """The order of the samples that the run has to keep."""
    sizes = [shard.samples for shard in manifest.load(shards / "train").shards]
    return Plan(sizes, seed=0, batch=tiny_runs.BATCH, lanes=Data().lanes, window=Data().shuffle_window)


def digest(shards: Path, batches: list[int]) -> str:
    """What a row says of the samples of these batches."""
    seeds = [sample_seed(0, *pair) for batch in batches for pair in make_plan(shards).batch(batch)]
    return f"{sum(seeds) % 2**64:016x}"


def read_numerics(stage: Stage) -> list[tuple[int, int]]:
    """Step and batch of the lines of numerics.jsonl, each of which names the samples that the plan has in its batch."""
    lines = [json.loads(line) for line in (stage.run / "numerics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["samples"] == [[*map(int, pair)] for pair in make_plan(stage.shards).batch(line["batch"])]
    return [(line["step"], line["batch"]) for line in lines]


SKIPS = [case(1, 0, "nan", default=True), case(2, 1, "nan", default=True), case(2, 0, "inf")]


@pytest.mark.parametrize(("world", "rank", "action"), SKIPS)
def test_a_bad_step_is_skipped_by_all_ranks(stage: Stage, world: int, rank: int, action: str):
    """Once, and twice in a row: weights and moments keep every bit, the steps are counted, their samples noted."""
    run, fault = stage.run, f"{action}:point=loss:rank={rank}:step=5,{action}:point=loss:rank={rank}:step=8-9"
    stage.play(Scenario((0,) * world, fault, args=("steps=9", "save_every=1", "keep=99")))
    assert 5 not in tiny_runs.checkpoint_steps(run)  # it waits until it is clear whether the run goes back
    before, after = (checkpoint.load(run / "checkpoints" / f"step-{step:08d}") for step in (7, 9))
    for part in ("model", "optimizer"):
        assert before[part].keys() == after[part].keys()
        assert all(torch.equal(before[part][name], value) for name, value in after[part].items())
    assert [row["skipped_updates"] for row in tiny_runs.metric_rows(run)] == [0, 1, 2]
    assert read_numerics(stage) == [(5, 4), (8, 7), (9, 8)]
    assert tiny_runs.lost_samples(run, stage.shards, 9) == 0


def run_without_bad_batches(stage: Stage, world: int) -> Path:
    """A run that leaves the batches out because its checkpoint says so."""
    clean_stage = stage.sibling("never")
    if world == 1:
        clean_stage.stop("loss:step=15")
    else:
        clean_stage.play(Scenario((ExitCode.PREEMPTED,) * world, "term:point=save.mid:step=14"))
    parts = checkpoint.load(tiny_runs.last_checkpoint(clean_stage.run))
    parts["train"]["anomalies"] |= {"skipped": LEFT_OUT_BATCHES, "rollbacks": 1}
    checkpoint.save(clean_stage.run / "checkpoints", 14, parts, 3, world)
    clean_stage.finish(world)
    return clean_stage.run


def assert_rolled_back(stage: Stage, output: str) -> None:
    """It was said, and the bad steps are noted with their samples."""
    assert f"back to the newest checkpoint, on without batches {LEFT_OUT_BATCHES}" in output
    assert read_numerics(stage) == list(zip(BAD_STEPS, LEFT_OUT_BATCHES, strict=True))


def bad_steps(world: int) -> str:
    return f"nan:point=loss:rank={world - 1}:step={BAD_STEPS[0]}-{BAD_STEPS[-1]}"


def test_three_bad_steps_go_back(stage: Stage):
    """To the newest checkpoint, and on as a run that never saw their batches; the default tier's as a real process."""
    start = stage.start(1, bad_steps(1))
    assert start.wait() == [0], start.output()
    assert_rolled_back(stage, start.output())
    stage.assert_same_run(run_without_bad_batches(stage, 1))
    rows = {row["step"]: row for row in tiny_runs.metric_rows(stage.run)}
    assert [rows[step]["samples_seen"] for step in (12, 15, 30)] == [12 * 8, 18 * 8, 33 * 8]  # what is left out counts
    assert rows[15]["samples_digest"] == digest(stage.shards, [12, 13, 17])
    assert rows[18]["samples_digest"] == digest(stage.shards, [18, 19, 20])


@pytest.mark.parametrize("world", [case(1), pytest.param(2, marks=pytest.mark.long)])
def test_a_run_that_went_back_and_is_killed_goes_on(stage: Stage, world: int):
    """Soon after it, and later; bad data are bad again, as long as they are there."""
    cases = {"killed soon": (19, bad_steps(world)), "killed": (25, ""), "back": (99, "")}
    reference = run_without_bad_batches(stage, world)
    for name, (step, second_fault) in cases.items():
        run_stage = stage.sibling(name.replace(" ", "-"))
        fault = f"{bad_steps(world)},kill:point=update:step={step}"
        outcome = run_stage.begin(Scenario((0,) * world, fault))
        assert outcome.codes == [0] * world if name == "back" else KILLED in outcome.codes, outcome.output
        assert_rolled_back(run_stage, outcome.output)
        run_stage.play(Scenario((0,) * world, second_fault))
        run_stage.assert_same_run(reference)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp2"])
def test_every_engine_goes_back(stage: Stage, engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """And takes the batches that DDP takes then, with its losses to rounding."""
    monkeypatch.setattr(os, "environ", {})
    select_engine(engine)
    engine_environment: dict[str, Any] = os.environ | {"DS_ACCELERATOR": "cpu"}
    monkeypatch.undo()
    for name, environment in (("ddp", {}), (engine, engine_environment)):
        start = stage.sibling(name).start(2, bad_steps(2), **environment)
        assert start.wait(120) == [0, 0], start.output()
        assert f"back to the newest checkpoint, on without batches {LEFT_OUT_BATCHES}" in start.output()
    for ddp_row, engine_row in zip(
        *(tiny_runs.metric_rows(stage.sibling(name).run) for name in ("ddp", engine)), strict=True
    ):
        assert ddp_row["samples_digest"] == engine_row["samples_digest"]
        assert engine_row["loss"] == pytest.approx(ddp_row["loss"], rel=1e-4)


@pytest.mark.parametrize("world", [1, case(2)])
def test_a_third_rollback_is_refused(stage: Stage, world: int):
    """With 65 and all samples of the bad steps on disk; the last good checkpoint stays."""
    fault = f"nan:point=loss:rank={world - 1}:step={BAD_STEPS[0]}-99"
    patterns = ("back to the newest checkpoint",)
    outcome = stage.play(Scenario((ExitCode.DATA,) * world, fault, "numerics.jsonl", patterns=patterns, saved=14))
    assert outcome.output.count("back to the newest checkpoint") == 2
    assert [batch for _, batch in read_numerics(stage)] == list(range(14, 23))
    assert tiny_runs.checkpoint_steps(stage.run) == [7, 14]
    assert all(
        value.isfinite().all() for value in checkpoint.trained_weights(tiny_runs.last_checkpoint(stage.run)).values()
    )


@pytest.mark.parametrize(("world", "policy"), [(1, "warn"), case(2, "rollback")])
def test_a_loss_that_jumps(stage: Stage, world: int, policy: str):
    """Is said and noted, and under on_loss_spike=rollback undone and left out; no other step is."""
    num_skipped = int(policy == "rollback")
    fault = f"spike:point=loss:rank={world - 1}:step=40"
    outcome = stage.play(Scenario((0,) * world, fault, args=("steps=45", f"on_loss_spike={policy}")))
    assert outcome.output.count("sigma") == 1
    assert read_numerics(stage) == [(40, 39)]
    assert ("back to the newest checkpoint" in outcome.output) == bool(num_skipped)
    last_row = tiny_runs.metric_rows(stage.run)[-1]
    assert (last_row["samples_seen"], last_row["skipped_updates"]) == ((45 + num_skipped) * tiny_runs.BATCH, 0)


def flip_scenario(found_step: int, victim: int, *overrides: str, world: int = 2, **kwargs: Any) -> Scenario:
    """A weight of one rank that is flipped after step 10, and what it is called when it is found."""
    fault = f"flip:point=weights:rank={victim}:step=11"
    line = rf"(?=.*step {found_step}\b)(?=.*rank {victim} on )(?=.* tensors)(?=.*encoder)"
    patterns = ("pretrain.py: step",)  # and of what is not finite
    return Scenario((ExitCode.INTEGRITY,) * world, fault, line, patterns=patterns, saved=7, args=overrides, **kwargs)


FLIPS = {
    "at the next comparison": flip_scenario(12, 1, "replica_check_every=3", tier="default"),
    "before the next checkpoint": flip_scenario(14, 1, "replica_check_every=100", resumed=True),
    "of three ranks": flip_scenario(12, 0, "replica_check_every=4", "batch=9", world=3),
}


@parametrize_scenarios(FLIPS)
def test_a_flipped_weight_is_found(scenario: Scenario, stage: Stage):
    """At the next comparison, or before the next checkpoint; of three ranks the one that differs is named."""
    outcome = stage.play(scenario)
    assert next(iter(checkpoint.trained_weights(tiny_runs.last_checkpoint(outcome.run)))).startswith("encoder.")
    if not scenario.resumed:
        assert tiny_runs.checkpoint_steps(stage.run) == [7]
        if "default" not in scenario.tier:
            stage.finish(len(scenario.codes), *scenario.args)


UNSTEADY = "verify_step: the loss differs between two passes over one batch"


@pytest.mark.parametrize("world", [1, case(2)])
def test_a_step_that_cannot_be_repeated_is_refused(stage: Stage, world: int, monkeypatch: pytest.MonkeyPatch):
    """Before anything is trained; where it can, looking leaves no trace."""
    overrides = ("verify_step=true",)
    assert "two passes over one batch gave the same bits" in stage.finish(world, *overrides)
    stage.assert_same_run(stage.tiny_run(world))
    monkeypatch.setattr(Model, "forward", Model.forward)  # what comes back
    unsteady_loss() if world == 1 else None
    prepare = None if world == 1 else unsteady_loss
    stage.sibling("bad").play(
        Scenario((ExitCode.INTEGRITY,) * world, "", UNSTEADY, saved=0, args=overrides, prepare=prepare)
    )
