"""A training whose data is damaged: how much is borne, when all ranks stop together, and what is told and listed."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssl_vit import config, errors, recipes
from ssl_vit.data.dataset import IN_A_ROW, Fault, Faults, borne
from ssl_vit.data.loader import TrainingStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.train.anomalies import DataWatch
from tests.conftest import TINY
from tests.data.damage import flip
from tests.data.pictures import one, write_pictures
from tests.data.servers import refused
from tests.starts import Start, call
from tests.tiny_runs import rows, saved, told


def watch(folder: Path, epoch_samples: int = 1000, most: int | None = None) -> tuple[DataWatch, Faults]:
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1)
    return DataWatch(accelerator, faults := Faults(), folder, epoch_samples, most), faults


def fault(number: int, reason: str = "a.tar: it is damaged") -> Fault:
    return Fault(0, 0, number, number + 1, reason)


def listed(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"bad_samples-{rank}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("epoch_samples", "most", "allowed"), [(1000, None, 10), (200_000, None, 20), (1000, 0, 0)])
def test_one_bad_sample_too_many_stops(tmp_path: Path, epoch_samples: int, most: int | None, allowed: int):
    assert [borne(samples, None) for samples in (1, 1000, 100_000, 200_000, 1_281_167)] == [10, 10, 10, 20, 128]
    assert [borne(1000, most) for most in (0, 3, 10**6)] == [0, 3, 10**6]
    judge, faults = watch(tmp_path, epoch_samples, most)
    for number in range(allowed):
        faults.met(4, [fault(number)])
        judge.check(4 * number, wait=False)
    judge.check(4 * allowed, wait=True)
    faults.met(4, [fault(allowed)])
    said = refused(lambda: judge.check(4 * allowed + 4, wait=False), errors.DATA)
    assert said.startswith(f"too many samples are damaged: {allowed + 1} in this epoch, {allowed} are borne; ")
    assert "bad_samples-*.jsonl" in said
    rows = listed(tmp_path)
    assert [row["sample"] for row in rows] == list(range(allowed + 1))
    assert rows[0] == {"epoch": 0, "sample": 0, "substitute": 1, "reason": "a.tar: it is damaged"}


def test_a_hundred_in_a_row_stop_whatever_is_borne(tmp_path: Path):
    judge, faults = watch(tmp_path, most=10**6)

    def step(bad: int) -> None:
        faults.met(10, [Fault(slot, 0, slot, None, "gone") for slot in range(bad)])
        judge.check(0, wait=False)

    for bad in 2 * [*9 * [10], 9] + 9 * [10]:  # one good sample among them begins the count anew
        step(bad)
    assert f"{IN_A_ROW} in a row" in refused(lambda: step(10), errors.DATA)


def test_an_epoch_begins_a_new_count_and_a_resumption_goes_on_with_the_old_one(tmp_path: Path):
    judge, faults = watch(tmp_path, epoch_samples=100)
    judge.resume(250, total=30, bad=8)
    faults.met(4, [fault(1), fault(2)])
    judge.check(290, wait=False)
    assert (judge.total, judge.bad) == (32, 10)
    judge.check(304, wait=False)  # the next epoch
    assert (judge.total, judge.bad) == (32, 0)
    faults.met(20, [fault(number) for number in range(10)])
    judge.check(350, wait=False)
    faults.met(4, [fault(11)])
    assert "11 in this epoch" in refused(lambda: judge.check(354, wait=False), errors.DATA)


def test_a_failure_that_no_substitute_cures_is_told_as_it_is(tmp_path: Path):
    judge, faults = watch(tmp_path, most=10**6)
    faults.fatal = errors.Refusal(errors.DISK, "https://nowhere: stays away")
    with pytest.raises(errors.Refusal) as caught:
        judge.check(0, wait=False)
    assert (caught.value.code, caught.value.message) == (errors.DISK, "https://nowhere: stays away")
    assert caught.value.shared


def test_few_bad_samples_are_printed_all_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    judge, faults = watch(tmp_path, most=100)
    faults.met(50, [fault(number) for number in range(40)])
    judge.check(0, wait=False)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 11
    assert said[0] == "bad sample 0, replaced by sample 1: a.tar: it is damaged"
    assert "bad_samples-0.jsonl" in said[-1]
    assert len(listed(tmp_path)) == 40


@pytest.mark.parametrize("name", ["caf\udce9", "x\x1b[2J", "x\nbad sample 7, replaced by sample 8: all is well"])
def test_an_odd_name_neither_ends_the_training_nor_writes_its_log(tmp_path: Path, capsys: Any, name: str):
    judge, faults = watch(tmp_path)
    faults.met(4, [fault(1, f"a.tar: {name}")])
    judge.check(0, wait=False)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert line.startswith("bad sample 1, replaced by sample 2: a.tar: ")
    assert [row["sample"] for row in listed(tmp_path)] == [1]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, set[int]]:
    """60 samples, and the 20 of them that are damaged."""
    folder = tmp_path_factory.mktemp("damaged")
    names = [f"{'ab'[number % 2]}/{number:02d}.png" for number in range(60)]
    made = one(write_pictures(folder / "in", names, height=18, width=18), folder / "out", shard_samples=10)
    bad = set(range(1, 60, 3))
    for sample in bad:
        flip(made.tar(sample // 10), int(made.index(sample // 10)[sample % 10]["offset"]) + 20)
    return made, bad


@pytest.mark.ranks
@pytest.mark.parametrize("again", [1, pytest.param(2, marks=pytest.mark.process)])
def test_two_processes_stop_together_and_go_on_where_more_is_borne(damaged: Any, tmp_path: Path, again: int):
    made, bad = damaged
    run = tmp_path / "run"
    words = [*TINY, f"data.train={made.folder}", f"run={run}", "steps=7", "log_every=1", "save_every=2", "tracker=none"]
    words += ["data.workers=1"]  # they ignore signals, so they must be told to go, or the exit waits for ever
    stream = TrainingStream(made, config.parse(recipes.Pretrain, words, recipes.FOLDER).data, seed=0, batch=8)
    met = [sum(sample in bad for _, sample in stream.plan.batch(step)) for step in range(7)]
    too_many = next(step for step in range(7) if sum(met[: step + 1]) > 10) + 1  # in which step

    start = Start(words, tmp_path / "logs", 2)
    assert start.wait() == [errors.DATA] * 2, start.said()
    assert start.orphans == []
    end = told(run)
    assert end["code"] == errors.DATA
    assert end["reason"].startswith(f"too many samples are damaged: {sum(met[:too_many])} in this epoch, 10 are")
    assert too_many <= end["step"] <= too_many + 1
    assert saved(run), "there was none before the fault either"
    assert all(step < too_many for step in saved(run))
    closing = [line for line in start.said().splitlines() if line.startswith("pretrain.py: ")]
    assert closing == [f"pretrain.py: {end['reason']}"]  # of what is the same on all ranks, one tells
    first = [listed(run, rank) for rank in range(2)]
    for rank in range(2):
        named = [line for line in start.said(rank).splitlines() if line.startswith("bad sample")]
        assert "Traceback" not in start.said(rank)
        assert all(f": {made.folder}/0000" in line for line in named)
        assert first[rank]  # each its own
    both = [*first[0], *first[1]]
    assert {row["sample"] for row in both} <= bad
    assert len({row["sample"] for row in both}) == len(both) >= sum(met[:too_many])
    assert all(row["substitute"] not in bad and ".tar: sample" in row["reason"] for row in both)

    if again == 1:
        assert call("pretrain", [*words, "data.max_bad=20"]).code == 0
    else:
        start = Start([*words, "data.max_bad=20"], tmp_path / "logs", again)
        assert start.wait() == [0] * again, start.said()
    assert told(run)["code"] == 0
    assert saved(run)[-1] == 7
    both = listed(run, 0) + listed(run, 1)
    assert len({(row["epoch"], row["sample"]) for row in both}) == sum(met) == len({row["sample"] for row in both})
    # each row counts those of its own steps: a sample that was replaced in the last step is missing nowhere
    counted = [(row["step"], row["bad_samples"]) for row in rows(run)]
    assert counted == list(enumerate(itertools.accumulate(met), start=1))
