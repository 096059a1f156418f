"""The sweep of learning rates (paper B.1.1): judged on a held-out part of train, then all of train, test read once."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssl_vit.data import manifest
from ssl_vit.data.samples import Data
from ssl_vit.data.stream import TrainingStream, parts
from tests import odd, runs, synthetic
from tests.conftest import TINY
from tests.starts import Start

RATES = ("30", "0.3")  # the first learns nothing
SWEEP = [*TINY, "steps=12", "log_every=4", "save_every=4", "optim.warmup_steps=2", "tracker=none", "compile=false"]
SWEEP += [f"sweep.lr={','.join(RATES)}", "sweep.fraction=0.25", "seeds=3", "data.hold_out=0"]
TRAININGS = [*(f"sweep/lr-{rate}" for rate in RATES), *(f"seed-{seed}" for seed in range(3))]


def words(shards: Path, run: Path, *more: str) -> list[str]:
    return [*SWEEP, f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}", *more]


def start(tmp_path: Path, shards: Path, *more: str, run: str = "run", **options: Any) -> Start:
    return Start(words(shards, tmp_path / run, *more), tmp_path / "logs", tool="finetune", **options)


def told(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def asked(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "recipe.yaml").read_text())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.hard(tmp_path_factory.mktemp("hard"))


@pytest.fixture(scope="module")
def swept(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two rates, then three runs, that nothing happened to."""
    folder = tmp_path_factory.mktemp("swept")
    begun = start(folder, shards)
    assert begun.wait() == [0], begun.said()
    return folder / "run"


@pytest.mark.parametrize(
    ("samples", "share", "subset"), [(36, 0.25, 1.0), (1020, 0.1, 1.0), (60, 0.02, 0.5), (7, 0.5, 1)]
)
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
    epochs = 3 * stream.epoch_samples // 5 + 1
    keys = [key for step in range(epochs) for key in stream.plan.batch(step)]
    trained = {int(stream.ids[sample]) for _, sample in keys}
    held = set(parts(made.samples, data)[1].tolist())
    assert trained == set(range(made.samples)) - held


def test_results_say_what_was_swept_and_how_it_ended(swept: Path, shards: Path):
    """C5.2c: grid, chosen rate, hold-out score, test score, number of runs; mean and sample deviation over the runs."""
    found = told(swept)
    held = round(0.25 * manifest.load(shards / "train").samples)
    members = [told(swept / "sweep" / f"lr-{rate}") for rate in RATES]
    assert found["sweep"] == {
        "fraction": 0.25,
        "val": None,
        "tried": [
            {"lr": float(rate), "top1": member["top1"], "samples": held}
            for rate, member in zip(RATES, members, strict=True)
        ],
    }
    assert [member["samples"] for member in members] == [held] * 2
    best = max(range(2), key=lambda i: members[i]["top1"])
    assert members[best]["top1"] > members[0]["top1"]  # else there was nothing to choose
    assert found["lr"] == float(RATES[best])
    finals = [told(swept / f"seed-{seed}") for seed in range(3)]
    tops = [final["top1"] for final in finals]
    assert found["top1"] == pytest.approx(statistics.mean(tops))
    assert len(set(tops)) > 1  # else a deviation of 0 would do
    assert found["top1_sd"] == pytest.approx(statistics.stdev(tops))
    assert [row["top1"] for row in found["seeds"]] == tops
    assert found["samples"] == manifest.load(shards / "val").samples
    assert [row["seed"] for row in found["seeds"]] == [0, 1, 2]
    assert found["protocol"]["optim"]["lr"] == found["lr"]
    assert (swept / "report.md").exists()
    assert (swept / "report.html").exists()


def test_members_and_final_runs_differ_in_rate_seed_and_data_alone(swept: Path):
    chosen = told(swept)["lr"]
    for place in TRAININGS:
        made = asked(swept / place)
        member = place.startswith("sweep")
        assert made["optim"]["lr"] == (float(place.rpartition("-")[2]) if member else chosen)
        assert made["seed"] == (0 if member else int(place[-1]))
        assert made["data"]["hold_out"] == (0.25 if member else 0.0)
        assert (made["data"]["val"] is None) == member  # the test set is not even opened
        assert made["steps"] == 12
    assert [path.name for path in sorted(swept.glob("sweep/*"))] == sorted(f"lr-{rate}" for rate in RATES)


def test_the_test_set_is_read_once_a_final_run(swept: Path, shards: Path):
    """C5.2b."""
    test = manifest.load(shards / "val").samples
    for place in TRAININGS:
        judged = [row["val_samples"] for row in runs.rows(swept / place) if "val_samples" in row]
        assert judged == ([test] if place.startswith("seed") else [told(swept / place)["samples"]])
        assert test not in judged or place.startswith("seed")


def bits(run: Path) -> dict[str, bytes]:
    """All bits of its trainings, of which a member of the sweep keeps its numbers alone, and what it says."""
    found = {}
    for place in TRAININGS:
        left = (
            runs.results(run / place) if place.startswith("seed") else {"rows": repr(runs.rows(run / place)).encode()}
        )
        found |= {f"{place}: {name}": value for name, value in left.items()}
    said = {name: value for name, value in told(run).items() if name not in ("protocol", "command")}
    return found | {"results": json.dumps(said, sort_keys=True).encode()}


def stamps(place: Path) -> dict[str, int]:
    """When its files were written, but for those that whoever looks into a run takes or confirms."""
    files = (path for path in place.rglob("*") if path.is_file() and path.name not in (".lock", "recipe.yaml"))
    return {path.relative_to(place).as_posix(): path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("begun", ["sweep/lr-0.3", "seed-1"])
def test_a_killed_sweep_goes_on_in_the_member_it_was_in(begun: str, swept: Path, shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    first = start(tmp_path, shards)
    first.until(lambda: any((run / begun / "checkpoints").glob("step-*4")))
    first.kill()
    assert first.wait() == [-9]
    done = [place for place in TRAININGS if (run / place / "results.json").exists()]
    assert done == TRAININGS[: TRAININGS.index(begun)]
    assert not (run / "results.json").exists()
    before = {place: stamps(run / place) for place in done}
    again = start(tmp_path, shards)
    assert again.wait() == [0], again.said()
    for place in done:  # neither trained nor judged again
        assert stamps(run / place) == before[place], place
    assert runs.differing(bits(run), bits(swept)) == {}


@pytest.mark.parametrize("fault", ["kill:point=save.mid:step=8", "kill:point=finish"])
def test_a_sweep_survives_a_kill_at_a_place(fault: str, swept: Path, shards: Path, tmp_path: Path):
    first = start(tmp_path, shards, fault=fault)
    assert first.wait() == [-9], first.said()
    again = start(tmp_path, shards)
    assert again.wait() == [0], again.said()
    assert runs.differing(bits(tmp_path / "run"), bits(swept)) == {}


def test_a_signal_stops_the_whole_sweep(swept: Path, shards: Path, tmp_path: Path):
    """75 and a checkpoint, not the next member."""
    first = start(tmp_path, shards, fault="term:point=row:step=4")
    assert first.wait() == [75], first.said()
    assert not (tmp_path / "run" / "sweep" / f"lr-{RATES[1]}" / "metrics.jsonl").exists()
    again = start(tmp_path, shards)
    assert again.wait() == [0], again.said()
    assert runs.differing(bits(tmp_path / "run"), bits(swept)) == {}


def test_a_finished_sweep_is_left_alone(swept: Path, shards: Path):
    before = {place: stamps(swept / place) for place in TRAININGS}
    again = Start(words(shards, swept), swept.parent / "logs", tool="finetune")
    assert again.wait() == [0], again.said()
    assert {place: stamps(swept / place) for place in TRAININGS} == before


def test_two_processes_sweep_as_one_does(swept: Path, shards: Path, tmp_path: Path):
    both = start(tmp_path, shards, world=2)
    assert both.wait(120) == [0, 0], both.said()
    mine, theirs = told(tmp_path / "run"), told(swept)
    assert (mine["lr"], mine["samples"]) == (theirs["lr"], theirs["samples"])
    assert [row["top1"] for row in mine["seeds"]] == pytest.approx([row["top1"] for row in theirs["seeds"]], abs=0.11)


def test_a_given_split_judges_the_sweep(shards: Path, tmp_path: Path):
    begun = start(tmp_path, shards, f"sweep.val={shards}/train", "seeds=1", "sweep.lr=0.3")
    assert begun.wait() == [0], begun.said()
    val = manifest.load(shards / "train").samples
    member = tmp_path / "run" / "sweep" / "lr-0.3"
    assert told(member)["samples"] == val
    assert asked(member)["data"]["hold_out"] == 0.0
    assert "top1_sd" not in told(tmp_path / "run") or told(tmp_path / "run")["top1_sd"] is None


def test_a_rate_that_diverges_is_the_worst_and_ends_nothing(shards: Path, tmp_path: Path):
    wild = ["sweep.lr=0.05,1e36", "seeds=1", "optim.clip=none", "optim.momentum=0.99", "steps=30", "save_every=30"]
    begun = start(tmp_path, shards, *wild)
    assert begun.wait() == [0], begun.said()
    tried = told(tmp_path / "run")["sweep"]["tried"]
    assert "diverged" in tried[1]
    assert "diverged" not in tried[0]
    assert told(tmp_path / "run")["lr"] == 0.05
    assert "diverged" in (tmp_path / "run" / "report.md").read_text()


def test_what_chooses_the_rate_may_not_judge_it(shards: Path, tmp_path: Path):
    begun = start(tmp_path, shards, f"sweep.val={shards}/val")
    assert begun.wait() == [64]
    assert "sweep.val: is data.val" in begun.said()


def test_results_are_not_told_of_other_data(shards: Path, tmp_path: Path):
    for seeds in ("1", "2"):
        words = ["sweep.lr=", f"seeds={seeds}", f"run={tmp_path}/run{seeds}"]
        begun = start(tmp_path, shards, *words)
        assert begun.wait() == [0], begun.said()
        again = start(tmp_path, shards, *words, f"data.val={shards}/train")
        assert again.wait() == [78], again.said()
        assert "other data" in again.said()


SHORT = ["sweep.lr=0.3", "seeds=1"]


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["sweep.fraction=0.001"], 65, "sweep.fraction=0.001 of 48 images leaves a part empty"),
        (["sweep.lr=0.1,0.1"], 64, "sweep.lr: a rate is there twice"),
        (["sweep.lr=-0.1"], 64, "sweep.lr: learning rates are numbers from 0 on"),
        (["sweep.lr=nan"], 64, "sweep.lr: 'nan': it should be a finite number"),
        (["sweep.fraction=1"], 64, "sweep.fraction: '1'"),
        (["seeds=0"], 64, "seeds: '0'"),
        (["data.val=none"], 64, "data.val: it must be given"),
        (["data.val=/nowhere"], 65, "/nowhere: no such folder"),
        (["metrics.label_sets=/nowhere.json"], 65, "/nowhere.json: cannot be read"),
        (["data.val=none", "data.hold_out=0.2"], 64, "data.hold_out: what judges the rates would judge the final"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_trained(more, code, text, shards: Path, tmp_path: Path):
    begun = start(tmp_path, shards, *more)
    assert begun.wait() == [code], begun.said()
    assert text in begun.said().strip().splitlines()[-1]
    assert "Traceback" not in begun.said()
    assert not list(tmp_path.glob("run/**/metrics.jsonl"))


def test_a_fresh_start_takes_nothing_over(shards: Path, tmp_path: Path):
    first = start(tmp_path, shards, *SHORT)
    assert first.wait() == [0], first.said()
    made = {path.name for path in (tmp_path / "run").iterdir()} - {".lock", "exit.json"}
    again = start(tmp_path, shards, *SHORT, "fresh=true", "steps=4")
    assert again.wait() == [0], again.said()
    aside = next((tmp_path / "run").glob("before-*"))
    assert {path.name for path in aside.iterdir()} == made
    assert asked(tmp_path / "run" / "sweep" / "lr-0.3")["steps"] == 4


def test_seeds_can_be_added(swept: Path, shards: Path, tmp_path: Path):
    """A fourth run beside the three that are there, which are not trained again."""
    run = shutil.copytree(swept, tmp_path / "run")
    before = {place: stamps(run / place) for place in TRAININGS}
    more = start(tmp_path, shards, "seeds=4")
    assert more.wait() == [0], more.said()
    assert {place: stamps(run / place) for place in TRAININGS} == before
    tops = [told(run / f"seed-{seed}")["top1"] for seed in range(4)]
    assert told(run)["top1_sd"] == pytest.approx(statistics.stdev(tops))


def test_label_sets_are_averaged_over_the_runs(shards: Path, tmp_path: Path):
    sets = {f"{number:03d}.png": [[], [number % 3], [0, 1]][number % 7 % 3] for number in range(60)}
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    more = ["sweep.lr=", "seeds=2", "optim.lr=0.3", f"metrics.label_sets={tmp_path / 'sets.json'}"]
    begun = start(tmp_path, shards, *more)
    assert begun.wait() == [0], begun.said()
    found = [told(tmp_path / "run" / f"seed-{seed}")["label_sets"] for seed in range(2)]
    mean = told(tmp_path / "run")["label_sets"]
    assert mean["samples"] == found[0]["samples"] == sum(bool(one) for one in sets.values())
    assert mean["top1"] == pytest.approx(statistics.mean(one["top1"] for one in found))
    assert mean["top1_sd"] == pytest.approx(statistics.stdev(one["top1"] for one in found))


def test_a_task_killed_before_its_page_is_written_gets_it(shards: Path, tmp_path: Path):
    """Its training has written results.json by then, which is not yet all of the task's."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "one").symlink_to(shards)
    listed = yaml.safe_dump(
        {"tasks": [{"name": "one", "train": "train", "val": "val"}], "tasks_root": f"{tmp_path}/root"}
    )
    (tmp_path / "suite.yaml").write_text(listed)
    suite = [f"recipe={tmp_path / 'suite.yaml'}", *SWEEP, *SHORT, f"run={tmp_path / 'run'}"]
    first = Start(suite, tmp_path / "logs", tool="finetune", prepare=odd.killed_before_it_tells)
    assert first.wait() == [-9], first.said()
    assert (tmp_path / "run" / "one" / "results.json").exists()
    again = Start(suite, tmp_path / "logs", tool="finetune")
    assert again.wait() == [0], again.said()
    assert told(tmp_path / "run" / "one")["lr"] == 0.3
    assert (tmp_path / "run" / "one" / "report.html").exists()
    assert told(tmp_path / "run")["mean"] == told(tmp_path / "run" / "one")["top1"]


def test_a_folder_of_images_is_converted_once(shards: Path, tmp_path: Path):
    images = shards.parent / "images"
    more = ["sweep.lr=0.3", "seeds=2", f"data.train={images}", f"data.val={images}"]
    begun = start(tmp_path, shards, *more)
    assert begun.wait() == [0], begun.said()
    made = {path.parent.parent for path in tmp_path.rglob("manifest.json")}
    assert [path.parent for path in made] == [tmp_path / "shards"]
    assert told(tmp_path / "run")["samples"] == 60
