"""The sweep of learning rates (paper B.1.1): judged on a held-out part of train, then all of train, test read once."""

import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssl_vit import fault_injection
from ssl_vit.commands import finetune
from ssl_vit.data import manifest
from ssl_vit.data.dataset import Data
from ssl_vit.data.loader import TrainingStream, parts
from tests import frozen, odd, synthetic, tiny_runs
from tests.conftest import TINY, once
from tests.frozen import results as told
from tests.starts import Start, call

RATES = ("30", "0.3")  # the first learns nothing
SWEEP = [*TINY, "steps=12", "log_every=4", "save_every=4", "optim.warmup_steps=2", "tracker=none", "compile=false"]
SWEEP += [f"sweep.lr={','.join(RATES)}", "sweep.fraction=0.25", "seeds=3", "data.hold_out=0"]
TRAININGS = [*(f"sweep/lr-{rate}" for rate in RATES), *(f"seed-{seed}" for seed in range(3))]


def words(shards: Path, run: Path, *more: str) -> list[str]:
    return [*SWEEP, f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}", *more]


def sweep(shards: Path, run: Path, *more: str) -> None:
    frozen.run_tool("finetune", words(shards, run, *more), run.parent)


def asked(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "recipe.yaml").read_text())


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "kinds-of-noise", synthetic.hard) / "shards"


@pytest.fixture(scope="session")
def swept(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two rates, then three runs, that nothing happened to; tests only read it."""
    return once(tmp_path_factory, "swept", lambda folder: sweep(shards, folder / "run")) / "run"


@pytest.mark.parametrize(("samples", "share", "subset"), [(36, 0.25, 1.0), (60, 0.02, 0.5), (7, 0.5, 1)])
def test_the_parts_are_disjoint_and_together_all_of_train(samples: int, share: float, subset: float):
    """C5.2a."""
    mine, held = parts(samples, Data(hold_out=share, subset=subset))
    whole, none = parts(samples, Data(subset=subset))
    assert len(none) == 0
    assert len(held) == round(share * len(whole))
    assert not set(mine.tolist()) & set(held.tolist())
    assert sorted([*mine.tolist(), *held.tolist()]) == whole.tolist()
    if subset == 1:
        assert whole.tolist() == list(range(samples))


def test_what_is_held_out_is_never_trained_on(shards: Path):
    made = manifest.load(shards / "train")
    data = Data(hold_out=0.25, image_size=16)
    stream = TrainingStream(made, data, seed=0, batch=5)
    assert stream.ids is not None
    keys = [key for step in range(3 * stream.epoch_samples // 5 + 1) for key in stream.plan.batch(step)]
    trained = {int(stream.ids[sample]) for _, sample in keys}
    assert trained == set(range(made.samples)) - set(parts(made.samples, data)[1].tolist())


def test_results_say_what_was_swept_and_how_it_ended(swept: Path, shards: Path):
    """C5.2c: grid, chosen rate, hold-out score, test score, number of runs; mean and sample deviation over the runs."""
    found = told(swept)
    held = round(0.25 * manifest.load(shards / "train").samples)
    members = [told(swept / "sweep" / f"lr-{rate}") for rate in RATES]
    scores = [(float(rate), member["top1"]) for rate, member in zip(RATES, members, strict=True)]
    tried = [{"lr": rate, "top1": top1, "samples": held} for rate, top1 in scores]
    assert found["sweep"] == {"fraction": 0.25, "val": None, "tried": tried}
    assert [member["samples"] for member in members] == [held] * 2
    best = max(range(2), key=lambda i: members[i]["top1"])
    assert members[best]["top1"] > members[0]["top1"]  # else there was nothing to choose
    assert found["lr"] == float(RATES[best])
    tops = [told(swept / f"seed-{seed}")["top1"] for seed in range(3)]
    assert found["top1"] == pytest.approx(statistics.mean(tops))
    assert len(set(tops)) > 1  # else a deviation of 0 would do
    assert found["top1_sd"] == pytest.approx(statistics.stdev(tops))
    assert [row["top1"] for row in found["seeds"]] == tops
    assert found["samples"] == manifest.load(shards / "val").samples
    assert [row["seed"] for row in found["seeds"]] == [0, 1, 2]
    assert found["protocol"]["optim"]["lr"] == found["lr"]
    assert all((swept / name).exists() for name in ("report.md", "report.html"))


def test_members_and_final_runs_differ_in_rate_seed_and_data_alone(swept: Path, shards: Path):
    """C5.2b: and the test set is read once a final run."""
    chosen, test = told(swept)["lr"], manifest.load(shards / "val").samples
    for place in TRAININGS:
        made, member = asked(swept / place), place.startswith("sweep")
        assert made["optim"]["lr"] == (float(place.rpartition("-")[2]) if member else chosen)
        assert made["seed"] == (0 if member else int(place[-1]))
        assert made["data"]["hold_out"] == (0.25 if member else 0.0)
        assert (made["data"]["val"] is None) == member  # the test set is not even opened
        assert made["steps"] == 12
        judged = [row["val_samples"] for row in tiny_runs.rows(swept / place) if "val_samples" in row]
        assert judged == ([told(swept / place)["samples"]] if member else [test])
        assert not member or test not in judged
    assert [path.name for path in sorted(swept.glob("sweep/*"))] == sorted(f"lr-{rate}" for rate in RATES)


def bits(run: Path) -> dict[str, bytes]:
    """All bits of its trainings, of which a member of the sweep keeps its numbers alone, and what it says."""
    found = {}
    for place in TRAININGS:
        final = place.startswith("seed")
        left = tiny_runs.results(run / place) if final else {"rows": repr(tiny_runs.rows(run / place)).encode()}
        found |= {f"{place}: {name}": value for name, value in left.items()}
    said = {name: value for name, value in told(run).items() if name not in ("protocol", "command")}
    return found | {"results": json.dumps(said, sort_keys=True).encode()}


def stamps(place: Path) -> dict[str, int]:
    """When its files were written, but for those that whoever looks into a run takes or confirms."""
    files = (path for path in place.rglob("*") if path.is_file() and path.name not in (".lock", "recipe.yaml"))
    return {path.relative_to(place).as_posix(): path.stat().st_mtime_ns for path in files}


def hit_in_a_member() -> None:
    """Have the training MEMBER meet the fault FAULT, and no other."""
    whole = finetune.train

    def train(session: Any, recipe: Any, folder: Any) -> Any:
        fault_injection.arm(os.environ["FAULT"] if recipe.run.endswith(os.environ["MEMBER"]) else "")
        return whole(session, recipe, folder)

    finetune.train = train


@pytest.mark.parametrize(
    ("member", "fault"),
    [
        ("seed-1", "kill:point=save.published:step=4"),
        ("sweep/lr-30", "term:point=row:step=4"),
        pytest.param("sweep/lr-0.3", "kill:point=save.published:step=4", marks=pytest.mark.process),
        pytest.param("sweep/lr-30", "kill:point=save.mid:step=8", marks=pytest.mark.process),
        pytest.param("sweep/lr-30", "kill:point=finish", marks=pytest.mark.process),
    ],
)
def test_a_sweep_that_is_stopped_goes_on_in_the_member_it_was_in(member, fault, swept, shards: Path, tmp_path: Path):
    """A kill, and a signal, which stops the whole sweep with 75 and a checkpoint, and not the member alone."""
    run = tmp_path / "run"
    options: dict[str, Any] = {"tool": "finetune", "prepare": hit_in_a_member, "MEMBER": member, "FAULT": fault}
    first = Start(words(shards, run), tmp_path / "logs", **options)
    assert first.wait() == [-9 if fault.startswith("kill") else 75], first.said()
    begun = TRAININGS.index(member)
    done = [place for place in TRAININGS if (run / place / "results.json").exists()]
    assert done == TRAININGS[:begun]
    assert not any((run / place / "metrics.jsonl").exists() for place in TRAININGS[begun + 1 :])
    assert not (run / "results.json").exists()
    before = {place: stamps(run / place) for place in done}
    sweep(shards, run)
    assert {place: stamps(run / place) for place in done} == before  # neither trained nor judged again
    assert tiny_runs.differing(bits(run), bits(swept)) == {}


def test_a_finished_sweep_is_left_alone_and_seeds_can_be_added(swept: Path, shards: Path, tmp_path: Path):
    """A fourth run beside the three that are there, which are not trained again."""
    run = shutil.copytree(swept, tmp_path / "run")
    before = {place: stamps(run / place) for place in TRAININGS}
    for more in ((), ("seeds=4",)):
        sweep(shards, run, *more)
        assert {place: stamps(run / place) for place in TRAININGS} == before
    tops = [told(run / f"seed-{seed}")["top1"] for seed in range(4)]
    assert told(run)["top1_sd"] == pytest.approx(statistics.stdev(tops))


@pytest.mark.process
@pytest.mark.ranks
def test_two_processes_sweep_as_one_does(swept: Path, shards: Path, tmp_path: Path):
    frozen.run_tool("finetune", words(shards, tmp_path / "run"), tmp_path, world=2)
    mine, theirs = told(tmp_path / "run"), told(swept)
    assert (mine["lr"], mine["samples"]) == (theirs["lr"], theirs["samples"])
    assert [row["top1"] for row in mine["seeds"]] == pytest.approx([row["top1"] for row in theirs["seeds"]], abs=0.11)


SHORT = ["sweep.lr=0.3", "seeds=1"]


def test_a_given_split_judges_the_sweep_and_a_fresh_start_takes_nothing_over(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    member = run / "sweep" / "lr-0.3"
    sweep(shards, run, *SHORT, f"sweep.val={shards}/train")
    assert told(member)["samples"] == manifest.load(shards / "train").samples
    assert asked(member)["data"]["hold_out"] == 0.0
    assert told(run).get("top1_sd") is None
    made = {path.name for path in run.iterdir()} - {".lock", "exit.json"}
    sweep(shards, run, *SHORT, "fresh=true", "steps=4")
    aside = next(run.glob("before-*"))
    assert {path.name for path in aside.iterdir()} == made
    assert asked(member)["steps"] == 4


def test_a_rate_that_diverges_is_the_worst_and_ends_nothing(shards: Path, tmp_path: Path):
    wild = ["sweep.lr=0.05,1e36", "seeds=1", "optim.clip=none", "optim.momentum=0.99", "steps=30", "save_every=30"]
    sweep(shards, tmp_path / "run", *wild)
    tried = told(tmp_path / "run")["sweep"]["tried"]
    assert "diverged" in tried[1]
    assert "diverged" not in tried[0]
    assert told(tmp_path / "run")["lr"] == 0.05
    assert "diverged" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("seeds", [1, 2])
def test_results_are_not_told_of_other_data(seeds: int, shards: Path, tmp_path: Path):
    more = ["sweep.lr=", f"seeds={seeds}"]
    sweep(shards, tmp_path / "run", *more)
    again = call("finetune", words(shards, tmp_path / "run", *more, f"data.val={shards}/train"))
    assert again.code == 78, again.said
    assert "other data" in again.said


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["sweep.fraction=0.001"], 65, "sweep.fraction=0.001 of 48 images leaves a part empty"),
        (["sweep.lr=0.1,0.1"], 64, "sweep.lr: a rate is there twice"),
        (["sweep.lr=-0.1"], 64, "sweep.lr: learning rates are numbers from 0 on"),
        (["sweep.lr=nan"], 64, "sweep.lr: 'nan': it should be a finite number"),
        (["sweep.fraction=1"], 64, "sweep.fraction: '1'"),
        (["data.val=none"], 64, "data.val: it must be given"),
        (["data.val=/nowhere"], 65, "/nowhere: no such folder"),
        (["metrics.label_sets=/nowhere.json"], 65, "/nowhere.json: cannot be read"),
        (["sweep.val={shards}/val"], 64, "sweep.val: is data.val"),
        (["data.val=none", "data.hold_out=0.2"], 64, "data.hold_out: what judges the rates would judge the final"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_trained(more, code, text, shards: Path, tmp_path: Path):
    ended = call("finetune", words(shards, tmp_path / "run", *(word.format(shards=shards) for word in more)))
    assert ended.code == code, ended.said
    assert text in ended.line
    assert "Traceback" not in ended.said
    assert not list(tmp_path.glob("run/**/metrics.jsonl"))


def test_label_sets_are_averaged_over_the_runs(shards: Path, tmp_path: Path):
    sets = {f"{number:03d}.png": [[], [number % 3], [0, 1]][number % 7 % 3] for number in range(60)}
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    run, more = tmp_path / "run", ["sweep.lr=", "seeds=2", "optim.lr=0.3"]
    sweep(shards, run, *more, f"metrics.label_sets={tmp_path / 'sets.json'}")
    found, mean = [told(run / f"seed-{seed}")["label_sets"] for seed in range(2)], told(run)["label_sets"]
    assert mean["samples"] == found[0]["samples"] == sum(bool(one) for one in sets.values())
    assert mean["top1"] == pytest.approx(statistics.mean(one["top1"] for one in found))
    assert mean["top1_sd"] == pytest.approx(statistics.stdev(one["top1"] for one in found))


def test_a_task_killed_before_its_page_is_written_gets_it(shards: Path, tmp_path: Path):
    """Its training has written results.json by then, which is not yet all of the task's."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "one").symlink_to(shards)
    listed = {"tasks": [{"name": "one", "train": "train", "val": "val"}], "tasks_root": f"{tmp_path}/root"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(listed))
    suite = [f"recipe={tmp_path / 'suite.yaml'}", *SWEEP, *SHORT, f"run={tmp_path / 'run'}"]
    first = Start(suite, tmp_path / "logs", tool="finetune", prepare=odd.killed_before_it_tells)
    assert first.wait() == [-9], first.said()
    assert (tmp_path / "run" / "one" / "results.json").exists()
    frozen.run_tool("finetune", suite, tmp_path)
    assert told(tmp_path / "run" / "one")["lr"] == 0.3
    assert (tmp_path / "run" / "one" / "report.html").exists()
    assert told(tmp_path / "run")["mean"] == told(tmp_path / "run" / "one")["top1"]


def test_a_folder_of_images_is_converted_once(shards: Path, tmp_path: Path):
    """By the first of its trainings, a member of the sweep, for the final run too."""
    images = tmp_path / "images"
    synthetic.draw(images / "train", [0, 1, 2] * 8, synthetic.names(3))
    synthetic.draw(images / "val", [0, 1, 2] * 2, synthetic.names(3))
    sweep(shards, tmp_path / "run", *SHORT, "steps=2", f"data.train={images}", f"data.val={images}")
    assert {path.parents[2] for path in tmp_path.rglob("manifest.json")} == {tmp_path / "shards"}
    assert told(tmp_path / "run")["samples"] == 6
