"""A training whose data is damaged: how much is borne, when all ranks stop together, and what is told and listed."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from ssl_vit import config, errors, recipes
from ssl_vit.data.dataset import MAX_CONSECUTIVE_FAULTS, Fault, Faults, tolerated_faults
from ssl_vit.data.loader import TrainingStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.distributed import Distributed
from ssl_vit.train.anomalies import BadDataGuard
from tests.conftest import TINY
from tests.data.damage import flip_file_bits
from tests.data.pictures import build_shards, write_pictures
from tests.data.servers import assert_refused
from tests.processes import Start, call_tool
from tests.tiny_runs import checkpoint_steps, metric_rows, read_exit


def make_guard(folder: Path, epoch_samples: int = 1000, max_bad: int | None = None) -> tuple[BadDataGuard, Faults]:
    return BadDataGuard(Distributed(), faults := Faults(), folder, epoch_samples, max_bad), faults


def make_fault(number: int, reason: str = "a.tar: it is damaged") -> Fault:
    return Fault(0, 0, number, number + 1, reason)


def read_bad_samples(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"bad_samples-{rank}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("epoch_samples", "most", "allowed"), [(1000, None, 10), (200_000, None, 20), (1000, 0, 0)])
def test_one_bad_sample_too_many_stops(tmp_path: Path, epoch_samples: int, most: int | None, allowed: int):
    assert [tolerated_faults(samples, None) for samples in (1, 1000, 100_000, 200_000, 1_281_167)] == [
        10,
        10,
        10,
        20,
        128,
    ]
    assert [tolerated_faults(1000, most) for most in (0, 3, 10**6)] == [0, 3, 10**6]
    guard, faults = make_guard(tmp_path, epoch_samples, most)
    for number in range(allowed):
        faults.record(4, [make_fault(number)])
        guard.check(4 * number, wait=False)
    guard.check(4 * allowed, wait=True)
    faults.record(4, [make_fault(allowed)])
    message = assert_refused(lambda: guard.check(4 * allowed + 4, wait=False), errors.ExitCode.DATA)
    assert message.startswith(f"too many samples are damaged: {allowed + 1} in this epoch, {allowed} are borne; ")
    assert "bad_samples-*.jsonl" in message
    rows = read_bad_samples(tmp_path)
    assert [row["sample"] for row in rows] == list(range(allowed + 1))
    assert rows[0] == {"epoch": 0, "sample": 0, "substitute": 1, "reason": "a.tar: it is damaged"}


def test_a_hundred_in_a_row_stop_whatever_is_borne(tmp_path: Path):
    guard, faults = make_guard(tmp_path, max_bad=10**6)

    def step(num_bad: int) -> None:
        faults.record(10, [Fault(slot, 0, slot, None, "gone") for slot in range(num_bad)])
        guard.check(0, wait=False)

    for num_bad in 2 * [*9 * [10], 9] + 9 * [10]:  # one good sample among them begins the count anew
        step(num_bad)
    assert f"{MAX_CONSECUTIVE_FAULTS} in a row" in assert_refused(lambda: step(10), errors.ExitCode.DATA)


def test_an_epoch_begins_a_new_count_and_a_resumption_goes_on_with_the_old_one(tmp_path: Path):
    guard, faults = make_guard(tmp_path, epoch_samples=100)
    guard.load_state_dict({"epoch": 2, "num_bad": 30, "num_bad_in_epoch": 8})
    faults.record(4, [make_fault(1), make_fault(2)])
    guard.check(290, wait=False)
    assert (guard.num_bad, guard.num_bad_in_epoch) == (32, 10)
    guard.check(304, wait=False)  # the next epoch
    assert (guard.num_bad, guard.num_bad_in_epoch) == (32, 0)
    faults.record(20, [make_fault(number) for number in range(10)])
    guard.check(350, wait=False)
    faults.record(4, [make_fault(11)])
    assert "11 in this epoch" in assert_refused(lambda: guard.check(354, wait=False), errors.ExitCode.DATA)


def test_a_failure_that_no_substitute_cures_is_told_as_it_is(tmp_path: Path):
    guard, faults = make_guard(tmp_path, max_bad=10**6)
    faults.fatal = errors.ExitError(errors.ExitCode.DISK, "https://nowhere: stays away")
    with pytest.raises(errors.ExitError) as excinfo:
        guard.check(0, wait=False)
    assert (excinfo.value.code, excinfo.value.message) == (errors.ExitCode.DISK, "https://nowhere: stays away")
    assert excinfo.value.shared


def test_few_bad_samples_are_printed_all_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    guard, faults = make_guard(tmp_path, max_bad=100)
    faults.record(50, [make_fault(number) for number in range(40)])
    guard.check(0, wait=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[0] == "bad sample 0, replaced by sample 1: a.tar: it is damaged"
    assert "bad_samples-0.jsonl" in lines[-1]
    assert len(read_bad_samples(tmp_path)) == 40


@pytest.mark.parametrize("name", ["caf\udce9", "x\x1b[2J", "x\nbad sample 7, replaced by sample 8: all is well"])
def test_an_odd_name_neither_ends_the_training_nor_writes_its_log(tmp_path: Path, capsys: Any, name: str):
    guard, faults = make_guard(tmp_path)
    faults.record(4, [make_fault(1, f"a.tar: {name}")])
    guard.check(0, wait=False)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert line.startswith("bad sample 1, replaced by sample 2: a.tar: ")
    assert [row["sample"] for row in read_bad_samples(tmp_path)] == [1]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, set[int]]:
    """60 samples, and the 20 of them that are damaged."""
    folder = tmp_path_factory.mktemp("damaged")
    names = [f"{'ab'[number % 2]}/{number:02d}.png" for number in range(60)]
    manifest = build_shards(write_pictures(folder / "in", names, height=18, width=18), folder / "out", shard_samples=10)
    bad_samples = set(range(1, 60, 3))
    for sample in bad_samples:
        flip_file_bits(manifest.tar(sample // 10), int(manifest.index(sample // 10)[sample % 10]["offset"]) + 20)
    return manifest, bad_samples


@pytest.mark.ranks
@pytest.mark.parametrize("again", [1, pytest.param(2, marks=pytest.mark.process)])
def test_two_processes_stop_together_and_go_on_where_more_is_borne(damaged: Any, tmp_path: Path, again: int):
    manifest, bad_samples = damaged
    run = tmp_path / "run"
    args = [
        *TINY,
        f"data.train={manifest.folder}",
        f"run={run}",
        "steps=7",
        "log_every=1",
        "save_every=2",
        "tracker=none",
    ]
    args += ["data.workers=1"]  # they ignore signals, so they must be told to go, or the exit waits for ever
    stream = TrainingStream(manifest, config.parse(recipes.Pretrain, args).data, seed=0, batch=8)
    num_bad_by_step = [sum(sample in bad_samples for _, sample in stream.plan.batch(step)) for step in range(7)]
    failing_step = next(step for step in range(7) if sum(num_bad_by_step[: step + 1]) > 10) + 1  # in which step

    start = Start(args, tmp_path / "logs", 2)
    assert start.wait() == [errors.ExitCode.DATA] * 2, start.output()
    assert start.orphans == []
    exit_info = read_exit(run)
    assert exit_info["code"] == errors.ExitCode.DATA
    assert exit_info["reason"].startswith(
        f"too many samples are damaged: {sum(num_bad_by_step[:failing_step])} in this epoch, 10 are"
    )
    assert failing_step <= exit_info["step"] <= failing_step + 1
    assert checkpoint_steps(run), "there was none before the fault either"
    assert all(step < failing_step for step in checkpoint_steps(run))
    closing_lines = [line for line in start.output().splitlines() if line.startswith("pretrain.py: ")]
    assert closing_lines == [f"pretrain.py: {exit_info['reason']}"]  # of what is the same on all ranks, one tells
    samples_by_rank = [read_bad_samples(run, rank) for rank in range(2)]
    for rank in range(2):
        messages = [line for line in start.output(rank).splitlines() if line.startswith("bad sample")]
        assert "Traceback" not in start.output(rank)
        assert all(f": {manifest.folder}/0000" in line for line in messages)
        assert samples_by_rank[rank]  # each its own
    all_samples = [*samples_by_rank[0], *samples_by_rank[1]]
    assert {row["sample"] for row in all_samples} <= bad_samples
    assert len({row["sample"] for row in all_samples}) == len(all_samples) >= sum(num_bad_by_step[:failing_step])
    assert all(row["substitute"] not in bad_samples and ".tar: sample" in row["reason"] for row in all_samples)

    if again == 1:
        assert call_tool("pretrain", [*args, "data.max_bad_samples=20"]).code == 0
    else:
        start = Start([*args, "data.max_bad_samples=20"], tmp_path / "logs", again)
        assert start.wait() == [0] * again, start.output()
    assert read_exit(run)["code"] == 0
    assert checkpoint_steps(run)[-1] == 7
    all_samples = read_bad_samples(run, 0) + read_bad_samples(run, 1)
    assert (
        len({(row["epoch"], row["sample"]) for row in all_samples})
        == sum(num_bad_by_step)
        == len({row["sample"] for row in all_samples})
    )
    # each row counts those of its own steps: a sample that was replaced in the last step is missing nowhere
    num_bad_by_row = [(row["step"], row["bad_samples"]) for row in metric_rows(run)]
    assert num_bad_by_row == list(enumerate(itertools.accumulate(num_bad_by_step), start=1))
