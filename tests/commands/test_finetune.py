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
from ssl_vit.data.loader import TrainingStream, split_holdout
from tests import evaluate_cases, machines, synthetic, tiny_runs
from tests.conftest import TINY, build_once
from tests.evaluate_cases import read_results
from tests.processes import Start, call_tool

RATES = ("30", "0.3")  # the first learns nothing
SWEEP_ARGS = [*TINY, "steps=12", "log_every=4", "save_every=4", "optim.warmup_steps=2", "tracker=none", "compile=false"]
SWEEP_ARGS += [f"sweep.lr={','.join(RATES)}", "sweep.fraction=0.25", "seeds=3", "data.holdout=0"]
TRAINING_FOLDERS = [*(f"sweep/lr-{rate}" for rate in RATES), *(f"seed-{seed}" for seed in range(3))]


def sweep_args(shards: Path, run: Path, *extra: str) -> list[str]:
    return [*SWEEP_ARGS, f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}", *extra]


def run_sweep(shards: Path, run: Path, *extra: str) -> None:
    evaluate_cases.run_tool("finetune", sweep_args(shards, run, *extra), run.parent)


def read_recipe(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "recipe.yaml").read_text())


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_once(tmp_path_factory, "kinds-of-noise", synthetic.make_hard_shards) / "shards"


@pytest.fixture(scope="session")
def swept(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two rates, then three runs, that nothing happened to; tests only read it."""
    return build_once(tmp_path_factory, "swept", lambda folder: run_sweep(shards, folder / "run")) / "run"


@pytest.mark.parametrize(("samples", "share", "subset"), [(36, 0.25, 1.0), (60, 0.02, 0.5), (7, 0.5, 1)])
def test_the_parts_are_disjoint_and_together_all_of_train(samples: int, share: float, subset: float):
    """C5.2a."""
    train_ids, holdout_ids = split_holdout(samples, Data(holdout=share, subset=subset))
    all_ids, no_ids = split_holdout(samples, Data(subset=subset))
    assert len(no_ids) == 0
    assert len(holdout_ids) == round(share * len(all_ids))
    assert not set(train_ids.tolist()) & set(holdout_ids.tolist())
    assert sorted([*train_ids.tolist(), *holdout_ids.tolist()]) == all_ids.tolist()
    if subset == 1:
        assert all_ids.tolist() == list(range(samples))


def test_what_is_held_out_is_never_trained_on(shards: Path):
    train_manifest = manifest.load(shards / "train")
    data = Data(holdout=0.25, image_size=16)
    stream = TrainingStream(train_manifest, data, seed=0, batch=5)
    assert stream.ids is not None
    keys = [key for step in range(3 * stream.epoch_samples // 5 + 1) for key in stream.plan.batch(step)]
    trained_ids = {int(stream.ids[sample]) for _, sample in keys}
    assert trained_ids == set(range(train_manifest.samples)) - set(
        split_holdout(train_manifest.samples, data)[1].tolist()
    )


def test_results_say_what_was_swept_and_how_it_ended(swept: Path, shards: Path):
    """C5.2c: grid, chosen rate, hold-out score, test score, number of runs; mean and sample deviation over the runs."""
    results = read_results(swept)
    num_held_out = round(0.25 * manifest.load(shards / "train").samples)
    members = [read_results(swept / "sweep" / f"lr-{rate}") for rate in RATES]
    scores = [(float(rate), member["top1"]) for rate, member in zip(RATES, members, strict=True)]
    expected = [{"lr": rate, "top1": top1, "samples": num_held_out} for rate, top1 in scores]
    assert results["sweep"] == {"fraction": 0.25, "val": None, "tried": expected}
    assert [member["samples"] for member in members] == [num_held_out] * 2
    best = max(range(2), key=lambda i: members[i]["top1"])
    assert members[best]["top1"] > members[0]["top1"]  # else there was nothing to choose
    assert results["lr"] == float(RATES[best])
    top1s = [read_results(swept / f"seed-{seed}")["top1"] for seed in range(3)]
    assert results["top1"] == pytest.approx(statistics.mean(top1s))
    assert len(set(top1s)) > 1  # else a deviation of 0 would do
    assert results["top1_sd"] == pytest.approx(statistics.stdev(top1s))
    assert [row["top1"] for row in results["seeds"]] == top1s
    assert results["samples"] == manifest.load(shards / "val").samples
    assert [row["seed"] for row in results["seeds"]] == [0, 1, 2]
    assert results["protocol"]["optim"]["lr"] == results["lr"]
    assert all((swept / name).exists() for name in ("report.md", "report.html"))


def test_members_and_final_runs_differ_in_rate_seed_and_data_alone(swept: Path, shards: Path):
    """C5.2b: and the test set is read once a final run."""
    best_lr, num_test = read_results(swept)["lr"], manifest.load(shards / "val").samples
    for name in TRAINING_FOLDERS:
        recipe, is_member = read_recipe(swept / name), name.startswith("sweep")
        assert recipe["optim"]["lr"] == (float(name.rpartition("-")[2]) if is_member else best_lr)
        assert recipe["seed"] == (0 if is_member else int(name[-1]))
        assert recipe["data"]["holdout"] == (0.25 if is_member else 0.0)
        assert (recipe["data"]["val"] is None) == is_member  # the test set is not even opened
        assert recipe["steps"] == 12
        val_samples = [row["val_samples"] for row in tiny_runs.metric_rows(swept / name) if "val_samples" in row]
        assert val_samples == ([read_results(swept / name)["samples"]] if is_member else [num_test])
        assert not is_member or num_test not in val_samples
    assert [path.name for path in sorted(swept.glob("sweep/*"))] == sorted(f"lr-{rate}" for rate in RATES)


def sweep_bits(run: Path) -> dict[str, bytes]:
    """All bits of its trainings, of which a member of the sweep keeps its numbers alone, and what it says."""
    bits = {}
    for name in TRAINING_FOLDERS:
        is_final = name.startswith("seed")
        run_bits = (
            tiny_runs.run_bits(run / name) if is_final else {"rows": repr(tiny_runs.metric_rows(run / name)).encode()}
        )
        bits |= {f"{name}: {name}": value for name, value in run_bits.items()}
    sweep_results = {name: value for name, value in read_results(run).items() if name not in ("protocol", "command")}
    return bits | {"results": json.dumps(sweep_results, sort_keys=True).encode()}


def modified_times(folder: Path) -> dict[str, int]:
    """When its files were written, but for those that whoever looks into a run takes or confirms."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "recipe.yaml"))
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def inject_member_fault() -> None:
    """Have the training MEMBER meet the fault FAULT, and no other."""
    original_train = finetune.train

    def train(session: Any, recipe: Any, folder: Any) -> Any:
        fault_injection.enable_faults(os.environ["FAULT"] if recipe.run.endswith(os.environ["MEMBER"]) else "")
        return original_train(session, recipe, folder)

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
    options: dict[str, Any] = {"tool": "finetune", "prepare": inject_member_fault, "MEMBER": member, "FAULT": fault}
    start = Start(sweep_args(shards, run), tmp_path / "logs", **options)
    assert start.wait() == [-9 if fault.startswith("kill") else 75], start.output()
    member_index = TRAINING_FOLDERS.index(member)
    finished = [name for name in TRAINING_FOLDERS if (run / name / "results.json").exists()]
    assert finished == TRAINING_FOLDERS[:member_index]
    assert not any((run / name / "metrics.jsonl").exists() for name in TRAINING_FOLDERS[member_index + 1 :])
    assert not (run / "results.json").exists()
    times = {name: modified_times(run / name) for name in finished}
    run_sweep(shards, run)
    assert {name: modified_times(run / name) for name in finished} == times  # neither trained nor judged again
    assert tiny_runs.differing_bits(sweep_bits(run), sweep_bits(swept)) == {}


def test_a_finished_sweep_is_left_alone_and_seeds_can_be_added(swept: Path, shards: Path, tmp_path: Path):
    """A fourth run beside the three that are there, which are not trained again."""
    run = shutil.copytree(swept, tmp_path / "run")
    times = {name: modified_times(run / name) for name in TRAINING_FOLDERS}
    for extra in ((), ("seeds=4",)):
        run_sweep(shards, run, *extra)
        assert {name: modified_times(run / name) for name in TRAINING_FOLDERS} == times
    top1s = [read_results(run / f"seed-{seed}")["top1"] for seed in range(4)]
    assert read_results(run)["top1_sd"] == pytest.approx(statistics.stdev(top1s))


@pytest.mark.process
@pytest.mark.ranks
def test_two_processes_sweep_as_one_does(swept: Path, shards: Path, tmp_path: Path):
    evaluate_cases.run_tool("finetune", sweep_args(shards, tmp_path / "run"), tmp_path, world=2)
    results, expected = read_results(tmp_path / "run"), read_results(swept)
    assert (results["lr"], results["samples"]) == (expected["lr"], expected["samples"])
    assert [row["top1"] for row in results["seeds"]] == pytest.approx(
        [row["top1"] for row in expected["seeds"]], abs=0.11
    )


SHORT_ARGS = ["sweep.lr=0.3", "seeds=1"]


def test_a_given_split_judges_the_sweep_and_a_fresh_start_takes_nothing_over(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    member = run / "sweep" / "lr-0.3"
    run_sweep(shards, run, *SHORT_ARGS, f"sweep.val={shards}/train")
    assert read_results(member)["samples"] == manifest.load(shards / "train").samples
    assert read_recipe(member)["data"]["holdout"] == 0.0
    assert read_results(run).get("top1_sd") is None
    file_names = {path.name for path in run.iterdir()} - {".lock", "exit.json"}
    run_sweep(shards, run, *SHORT_ARGS, "restart=true", "steps=4")
    backup = next(run.glob("before-*"))
    assert {path.name for path in backup.iterdir()} == file_names
    assert read_recipe(member)["steps"] == 4


def test_a_rate_that_diverges_is_the_worst_and_ends_nothing(shards: Path, tmp_path: Path):
    args = ["sweep.lr=0.05,1e36", "seeds=1", "optim.clip=none", "optim.momentum=0.99", "steps=30", "save_every=30"]
    run_sweep(shards, tmp_path / "run", *args)
    trials = read_results(tmp_path / "run")["sweep"]["tried"]
    assert "diverged" in trials[1]
    assert "diverged" not in trials[0]
    assert read_results(tmp_path / "run")["lr"] == 0.05
    assert "diverged" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("seeds", [1, 2])
def test_results_are_not_told_of_other_data(seeds: int, shards: Path, tmp_path: Path):
    args = ["sweep.lr=", f"seeds={seeds}"]
    run_sweep(shards, tmp_path / "run", *args)
    result = call_tool("finetune", sweep_args(shards, tmp_path / "run", *args, f"data.val={shards}/train"))
    assert result.code == 78, result.output
    assert "other data" in result.output


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
        (["data.val=none", "data.holdout=0.2"], 64, "data.holdout: what judges the rates would judge the final"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_trained(more, code, text, shards: Path, tmp_path: Path):
    result = call_tool("finetune", sweep_args(shards, tmp_path / "run", *(word.format(shards=shards) for word in more)))
    assert result.code == code, result.output
    assert text in result.last_line
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("run/**/metrics.jsonl"))


def test_label_sets_are_averaged_over_the_runs(shards: Path, tmp_path: Path):
    label_sets = {f"{number:03d}.png": [[], [number % 3], [0, 1]][number % 7 % 3] for number in range(60)}
    (tmp_path / "sets.json").write_text(json.dumps(label_sets))
    run, args = tmp_path / "run", ["sweep.lr=", "seeds=2", "optim.lr=0.3"]
    run_sweep(shards, run, *args, f"metrics.label_sets={tmp_path / 'sets.json'}")
    seed_results, mean_results = (
        [read_results(run / f"seed-{seed}")["label_sets"] for seed in range(2)],
        read_results(run)["label_sets"],
    )
    assert mean_results["samples"] == seed_results[0]["samples"] == sum(bool(result) for result in label_sets.values())
    assert mean_results["top1"] == pytest.approx(statistics.mean(result["top1"] for result in seed_results))
    assert mean_results["top1_sd"] == pytest.approx(statistics.stdev(result["top1"] for result in seed_results))


def test_a_task_killed_before_its_page_is_written_gets_it(shards: Path, tmp_path: Path):
    """Its training has written results.json by then, which is not yet all of the task's."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "one").symlink_to(shards)
    suite_recipe = {"tasks": [{"name": "one", "train": "train", "val": "val"}], "tasks_root": f"{tmp_path}/root"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite_recipe))
    args = [f"recipe={tmp_path / 'suite.yaml'}", *SWEEP_ARGS, *SHORT_ARGS, f"run={tmp_path / 'run'}"]
    start = Start(args, tmp_path / "logs", tool="finetune", prepare=machines.kill_before_results)
    assert start.wait() == [-9], start.output()
    assert (tmp_path / "run" / "one" / "results.json").exists()
    evaluate_cases.run_tool("finetune", args, tmp_path)
    assert read_results(tmp_path / "run" / "one")["lr"] == 0.3
    assert (tmp_path / "run" / "one" / "report.html").exists()
    assert read_results(tmp_path / "run")["mean"] == read_results(tmp_path / "run" / "one")["top1"]


def test_a_folder_of_images_is_converted_once(shards: Path, tmp_path: Path):
    """By the first of its trainings, a member of the sweep, for the final run too."""
    images = tmp_path / "images"
    synthetic.draw_noise(images / "train", [0, 1, 2] * 8, synthetic.class_names(3))
    synthetic.draw_noise(images / "val", [0, 1, 2] * 2, synthetic.class_names(3))
    run_sweep(shards, tmp_path / "run", *SHORT_ARGS, "steps=2", f"data.train={images}", f"data.val={images}")
    assert {path.parents[2] for path in tmp_path.rglob("manifest.json")} == {tmp_path / "shards"}
    assert read_results(tmp_path / "run")["samples"] == 6
