"""Fine-tune an encoder to classify: accelerate launch tools/finetune.py recipe=NAME [key=value ...]

A fine-tuning may be many trainings, one after the other in one process: of a sweep, of seeds, of tasks. Each has a
folder of its own, is skipped where its results are there, and goes on from its checkpoint where it was stopped.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from ssl_vit.commands.results import write_finetune_results, write_suite
from ssl_vit.commands.setup import Session, prepare_data
from ssl_vit.commands.train import run_training
from ssl_vit.commands.training_run import train
from ssl_vit.convert.resolve import resolve_for_recipe
from ssl_vit.convert.sample_names import read_sample_names
from ssl_vit.data import remote
from ssl_vit.data.manifest import Manifest
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate import protocol
from ssl_vit.evaluate.label_sets import read_label_sets
from ssl_vit.recipes import Finetune
from ssl_vit.recipes import Finetune as Config
from ssl_vit.train.anomalies import Diverged
from ssl_vit.train.run_folder import Run


def run(recipe: Config) -> int:
    """Fine-tune as the recipe says, on one data set or on each of its tasks; returns the exit code."""
    return run_training(recipe, finetune_tasks if recipe.tasks else finetune_one)


def finetune_one(session: Session, recipe: Finetune, folder: Run) -> None:
    """Fine-tune on the recipe's data."""
    prepared = session.processes.run_on_main(lambda: prepare_recipe(recipe))
    sweep_and_train(session, prepared, folder)


def finetune_tasks(session: Session, recipe: Finetune, folder: Run) -> None:
    """Fine-tune on each task of a suite, in a folder of its own, and write the suite's results."""
    members = session.processes.run_on_main(lambda: task_recipes(recipe))
    prepare_members = lambda: {name: prepare_recipe(member) for name, member in members.items()}  # noqa: E731
    members = session.processes.run_on_main(prepare_members)
    results = {name: run_member(session, member, sweep_and_train) for name, member in members.items()}
    session.processes.run_on_main(lambda: write_suite(recipe, folder, results))


def prepare_recipe(recipe: Finetune) -> Finetune:
    """The recipe on shards, into which images are made once for all its trainings.

    Raises ExitError, before hours are spent, where the last of the trainings could not be judged.
    """
    train, val = prepare_data(recipe)
    sweep_val = resolve_for_recipe(recipe, recipe.sweep.val, "val") if recipe.sweep.lr and recipe.sweep.val else None
    if sweep_val is not None and val is not None and sweep_val.identity == val.identity:
        raise ExitError(
            ExitCode.USAGE, "sweep.val: is data.val; what chooses the rate may not judge it too; take sweep.fraction"
        )
    holds_out, config = recipe.sweep.lr and not recipe.sweep.val, recipe.metrics
    if holds_out and recipe.data.holdout and val is None:
        hint = "give data.val to be judged on, or sweep.val"
        raise ExitError(
            ExitCode.USAGE, f"data.holdout: what judges the rates would judge the final training too; {hint}"
        )
    images = round(train.samples * recipe.data.subset) if isinstance(train, Manifest) else 0
    if holds_out and not isinstance(train, Manifest):
        raise ExitError(ExitCode.USAGE, "sweep.lr: with data.reader=webdataset give sweep.val; nothing can be held out")
    if holds_out and not 0 < round(images * recipe.sweep.fraction) < images:
        raise ExitError(
            ExitCode.DATA, f"sweep.fraction={recipe.sweep.fraction:g} of {images} images leaves a part empty"
        )
    if val is not None and config.label_sets is not None:
        read_label_sets(config.label_sets, read_sample_names(val), len(val.classes))
    if config.class_map is not None:
        raise ExitError(ExitCode.USAGE, "metrics.class_map: of tools/evaluate.py methods=classifier; leave it out")
    if recipe.data.reader == "webdataset":
        return recipe
    data_paths = {
        "train": shard_paths(recipe, recipe.data.train, "train"),
        "val": shard_paths(recipe, recipe.data.val, "val"),
    }
    sweep = recipe.sweep.model_copy(update={"val": shard_paths(recipe, recipe.sweep.val, "val")})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data_paths), "sweep": sweep})


def shard_paths(recipe: Finetune, paths: tuple[str, ...] | None, split: str) -> tuple[str, ...] | None:
    """The paths, with the shards of a folder of images in its place."""
    return paths and tuple(
        str(resolve_for_recipe(recipe, (p,), split).folder) if Path(p).is_dir() else p for p in paths
    )


def task_recipes(recipe: Finetune) -> dict[str, Finetune]:
    """The fine-tuning of each task; raises ExitError(DATA) where data are missing, before anything is trained."""
    if recipe.tasks_root is None:
        raise ExitError(ExitCode.USAGE, "tasks_root: it must be given: the folder that holds the tasks' shards")
    if remote.is_url(recipe.tasks_root):
        raise ExitError(ExitCode.USAGE, f"tasks_root={recipe.tasks_root}: a folder on this machine, not a URL")
    root, recipes, missing = Path(recipe.tasks_root), {}, []
    for task in recipe.tasks:
        train, val = tuple(str(root / task.name / split) for split in task.train), str(root / task.name / task.val)
        missing += [path for path in (*train, val) if not Path(path).is_dir()]
        augmentation = {} if task.augment else {"crop": "none", "flip": False}
        data = recipe.data.model_copy(update={"train": train, "val": (val,), **augmentation})
        name = f"{recipe.benchmark.name or 'suite'}: {task.name}"
        benchmark_fields = {"name": name, "classes": task.classes, "test": task.test, "paper": task.paper}
        updates = {"tasks": (), "tasks_root": None, "run": str(Path(recipe.run) / task.name), "data": data}
        updates["benchmark"] = recipe.benchmark.model_copy(update=benchmark_fields)
        recipes[task.name] = recipe.model_copy(update=updates)
    if missing:
        hint = f"; {recipe.benchmark.get}" if recipe.benchmark.get else ""
        raise ExitError(ExitCode.DATA, f"{len(missing)} folders are not there ({', '.join(missing[:3])} ...){hint}")
    return recipes


def sweep_and_train(session: Session, recipe: Finetune, folder: Run) -> dict[str, Any]:
    """Choose the rate where there is one to choose, then train with it, once or with several seeds; the results."""
    rate, trials = recipe.optim.lr, []
    final = recipe
    if recipe.sweep.lr:
        for rate in recipe.sweep.lr:
            result = run_member(session, sweep_member(recipe, rate), train_or_diverge, scrap=True)
            keys = ("top1", "samples", "diverged")
            trials.append({"lr": rate, **{name: result[name] for name in keys if name in result}})
        if all("diverged" in trial for trial in trials):
            raise ExitError(ExitCode.DATA, f"sweep.lr: not one rate trains ({trials[-1]['diverged']})", shared=True)
        rate = protocol.best_learning_rate([(trial["lr"], trial["top1"]) for trial in trials])
        final = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": rate})})
        if session.processes.is_main and not recipe.quiet:
            text = ", ".join(f"{trial['lr']:g}: {trial['top1']:.4f}" for trial in trials)
            print(f"sweep: {text}; optim.lr={rate:g} is taken", flush=True)
    if recipe.seeds == 1:
        finals = [train(session, final, folder)]
    else:
        finals = [run_member(session, with_seed(final, seed), train) for seed in range(recipe.seeds)]
    return session.processes.run_on_main(lambda: write_finetune_results(final, folder, finals, trials))


def train_or_diverge(session: Session, recipe: Finetune, folder: Run) -> dict[str, Any]:
    """A training of a sweep; one that diverges has its results too: no image right."""
    try:
        return train(session, recipe, folder)
    except Diverged as end:
        results = {"top1": 0.0, "samples": 0, "diverged": end.message}
        session.accelerator.free_memory()
        session.processes.run_on_main(lambda: folder.write_results(results))
        return results


def sweep_member(recipe: Finetune, rate: float) -> Finetune:
    """The training that judges a rate: without the test set, on a part of the training set or beside a given split."""
    split = {"val": recipe.sweep.val} if recipe.sweep.val else {"val": None, "holdout": recipe.sweep.fraction}
    updates = {
        "run": str(Path(recipe.run) / "sweep" / f"lr-{rate:g}"),
        "optim": recipe.optim.model_copy(update={"lr": rate}),
        "data": recipe.data.model_copy(update=split),
        "sweep": protocol.Sweep(),
        "seeds": 1,
        "benchmark": protocol.Benchmark(get=recipe.benchmark.get, name=recipe.benchmark.name),
        "metrics": recipe.metrics.model_copy(update={"label_sets": None, "class_map": None}),
    }
    return recipe.model_copy(update=updates)


def with_seed(recipe: Finetune, number: int) -> Finetune:
    """The final training with another seed."""
    seed = recipe.seed + number
    updates = {"run": str(Path(recipe.run) / f"seed-{seed}"), "seed": seed, "seeds": 1, "sweep": protocol.Sweep()}
    return recipe.model_copy(update=updates)


def run_member(session: Session, recipe: Finetune, train_fn: Any, scrap: bool = False) -> dict[str, Any]:
    """One of several trainings, in a folder of its own: its results, at once where they are there already.

    With `scrap` nothing of it but numbers is kept.
    """
    processes, folder = session.processes, Run(Path(recipe.run))

    def prepare_folder() -> dict[str, Any] | None:
        folder.acquire(recipe, allowed=recipe.allow_recipe_change)
        path = folder.folder / "results.json"
        saved = json.loads(path.read_text()) if path.exists() else None
        if saved and train_fn is sweep_and_train:  # a task's come in two steps
            return saved if "command" in saved else None
        metrics_changed = saved and saved.get("protocol", {}).get("metrics") != recipe.metrics.model_dump(mode="json")
        if metrics_changed and not scrap and any(folder.checkpoints.glob("step-*")):
            return None  # nothing is trained again, but it is measured as metrics.* say now
        if saved and "digests" in saved:
            train_data, val = prepare_data(recipe)
            current = {"data.train": train_data, "data.val": val or train_data}
            if any(
                saved["digests"][name] != data.identity for name, data in current.items() if isinstance(data, Manifest)
            ):
                raise ExitError(ExitCode.MISMATCH, f"run={folder.folder}: has results on other data")
        return saved

    results = processes.run_on_main(prepare_folder)
    try:
        if results is None:
            if processes.is_main and not recipe.quiet:
                print(f"{folder.folder}:", flush=True)
            results = train_fn(session, recipe, folder)
        if scrap and processes.is_main:
            for name in ("checkpoints", "encoder", "classifier"):
                shutil.rmtree(folder.folder / name, ignore_errors=True)
    finally:
        folder.release()
    return results
