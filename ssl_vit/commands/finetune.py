"""A fine-tuning may be many trainings, one after the other in one process: of a sweep, of seeds, of tasks.

Each has a folder of its own, is skipped where its results are there, and goes on from its checkpoint where it was
stopped.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from ssl_vit.commands.results import write_tuned
from ssl_vit.commands.setup import Session, sources
from ssl_vit.commands.training_run import train
from ssl_vit.convert.resolve import found
from ssl_vit.convert.sample_names import names
from ssl_vit.data import remote
from ssl_vit.data.manifest import Manifest
from ssl_vit.distributed import from_main
from ssl_vit.errors import DATA, MISMATCH, USAGE, Refusal
from ssl_vit.evaluate import protocol
from ssl_vit.evaluate.label_sets import read_label_sets
from ssl_vit.recipes import Finetune
from ssl_vit.train.anomalies import Diverged
from ssl_vit.train.run_folder import Run


def ready(recipe: Finetune) -> Finetune:
    """The recipe on shards, into which images are made once for all its trainings.

    Raises Refusal, before hours are spent, where the last of the trainings could not be judged.
    """
    train, val = sources(recipe)
    judges = found(recipe, recipe.sweep.val, "val") if recipe.sweep.lr and recipe.sweep.val else None
    if judges is not None and val is not None and judges.identity == val.identity:
        raise Refusal(USAGE, "sweep.val: is data.val; what chooses the rate may not judge it too; take sweep.fraction")
    swept, config = recipe.sweep.lr and not recipe.sweep.val, recipe.metrics
    if swept and recipe.data.hold_out and val is None:
        cure = "give data.val to be judged on, or sweep.val"
        raise Refusal(USAGE, f"data.hold_out: what judges the rates would judge the final training too; {cure}")
    images = round(train.samples * recipe.data.subset) if isinstance(train, Manifest) else 0
    if swept and not isinstance(train, Manifest):
        raise Refusal(USAGE, "sweep.lr: with data.reader=webdataset give sweep.val; nothing can be held out")
    if swept and not 0 < round(images * recipe.sweep.fraction) < images:
        raise Refusal(DATA, f"sweep.fraction={recipe.sweep.fraction:g} of {images} images leaves a part empty")
    if val is not None and config.label_sets is not None:
        read_label_sets(config.label_sets, names(val), len(val.classes))
    if config.class_map is not None:
        raise Refusal(USAGE, "metrics.class_map: of tools/evaluate.py methods=classifier; leave it out")
    if recipe.data.reader == "webdataset":
        return recipe
    placed = {"train": shards_of(recipe, recipe.data.train, "train"), "val": shards_of(recipe, recipe.data.val, "val")}
    judged_on = recipe.sweep.model_copy(update={"val": shards_of(recipe, recipe.sweep.val, "val")})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=placed), "sweep": judged_on})


def shards_of(recipe: Finetune, paths: tuple[str, ...] | None, split: str) -> tuple[str, ...] | None:
    """The paths, with the shards of a folder of images in its place."""
    return paths and tuple(str(found(recipe, (p,), split).folder) if Path(p).is_dir() else p for p in paths)


def tasks(recipe: Finetune) -> dict[str, Finetune]:
    """The fine-tuning of each task; raises Refusal(DATA) where data are missing, before anything is trained."""
    if recipe.tasks_root is None:
        raise Refusal(USAGE, "tasks_root: it must be given: the folder that holds the tasks' shards")
    if remote.is_url(recipe.tasks_root):
        raise Refusal(USAGE, f"tasks_root={recipe.tasks_root}: a folder on this machine, not a URL")
    root, made, missing = Path(recipe.tasks_root), {}, []
    for task in recipe.tasks:
        train, val = tuple(str(root / task.name / part) for part in task.train), str(root / task.name / task.val)
        missing += [path for path in (*train, val) if not Path(path).is_dir()]
        whole = {} if task.augment else {"whole": True, "flip": False}
        data = recipe.data.model_copy(update={"train": train, "val": (val,), **whole})
        name = f"{recipe.benchmark.name or 'suite'}: {task.name}"
        known = {"name": name, "classes": task.classes, "test": task.test, "paper": task.paper}
        changed = {"tasks": (), "tasks_root": None, "run": str(Path(recipe.run) / task.name), "data": data}
        changed["benchmark"] = recipe.benchmark.model_copy(update=known)
        made[task.name] = recipe.model_copy(update=changed)
    if missing:
        get = f"; {recipe.benchmark.get}" if recipe.benchmark.get else ""
        raise Refusal(DATA, f"{len(missing)} folders are not there ({', '.join(missing[:3])} ...){get}")
    return made


def tuned(session: Session, recipe: Finetune, folder: Run) -> dict[str, Any]:
    """Choose the rate where there is one to choose, then train with it, once or with several seeds; the results."""
    rate, tried = recipe.optim.lr, []
    final = recipe
    if recipe.sweep.lr:
        for rate in recipe.sweep.lr:
            judged = member(session, trial(recipe, rate), attempted, scrap=True)
            kept = ("top1", "samples", "diverged")
            tried.append({"lr": rate, **{name: judged[name] for name in kept if name in judged}})
        if all("diverged" in one for one in tried):
            raise Refusal(DATA, f"sweep.lr: not one rate trains ({tried[-1]['diverged']})", shared=True)
        rate = protocol.chosen([(one["lr"], one["top1"]) for one in tried])
        final = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": rate})})
        if session.accelerator.is_main_process and not recipe.quiet:
            text = ", ".join(f"{one['lr']:g}: {one['top1']:.4f}" for one in tried)
            print(f"sweep: {text}; optim.lr={rate:g} is taken", flush=True)
    if recipe.seeds == 1:
        finals = [train(session, final, folder)]
    else:
        finals = [member(session, seeded(final, seed), train) for seed in range(recipe.seeds)]
    return from_main(session.accelerator, lambda: write_tuned(final, folder, finals, tried))


def attempted(session: Session, recipe: Finetune, folder: Run) -> dict[str, Any]:
    """A training of a sweep; one that diverges has its results too: no image right."""
    try:
        return train(session, recipe, folder)
    except Diverged as end:
        results = {"top1": 0.0, "samples": 0, "diverged": end.message}
        session.accelerator.free_memory()
        from_main(session.accelerator, lambda: folder.write_results(results))
        return results


def trial(recipe: Finetune, rate: float) -> Finetune:
    """The training that judges a rate: without the test set, on a part of the training set or beside a given split."""
    held = {"val": recipe.sweep.val} if recipe.sweep.val else {"val": None, "hold_out": recipe.sweep.fraction}
    changed = {
        "run": str(Path(recipe.run) / "sweep" / f"lr-{rate:g}"),
        "optim": recipe.optim.model_copy(update={"lr": rate}),
        "data": recipe.data.model_copy(update=held),
        "sweep": protocol.Sweep(),
        "seeds": 1,
        "benchmark": protocol.Benchmark(get=recipe.benchmark.get, name=recipe.benchmark.name),
        "metrics": recipe.metrics.model_copy(update={"label_sets": None, "class_map": None}),
    }
    return recipe.model_copy(update=changed)


def seeded(recipe: Finetune, number: int) -> Finetune:
    """The final training with another seed."""
    seed = recipe.seed + number
    changed = {"run": str(Path(recipe.run) / f"seed-{seed}"), "seed": seed, "seeds": 1, "sweep": protocol.Sweep()}
    return recipe.model_copy(update=changed)


def member(session: Session, recipe: Finetune, do: Any, scrap: bool = False) -> dict[str, Any]:
    """One of several trainings, in a folder of its own: its results, at once where they are there already.

    With `scrap` nothing of it but numbers is kept.
    """
    accelerator, folder = session.accelerator, Run(Path(recipe.run))

    def claim() -> dict[str, Any] | None:
        folder.claim(recipe, allowed=recipe.allow_change)
        path = folder.folder / "results.json"
        known = json.loads(path.read_text()) if path.exists() else None
        if known and do is tuned:  # a task's come in two steps
            return known if "command" in known else None
        changed = known and known.get("protocol", {}).get("metrics") != recipe.metrics.model_dump(mode="json")
        if changed and not scrap and any(folder.checkpoints.glob("step-*")):
            return None  # nothing is trained again, but it is measured as metrics.* say now
        if known and "digests" in known:
            train_on, val = sources(recipe)
            now = {"data.train": train_on, "data.val": val or train_on}
            if any(known["digests"][name] != one.identity for name, one in now.items() if isinstance(one, Manifest)):
                raise Refusal(MISMATCH, f"run={folder.folder}: has results on other data")
        return known

    results = from_main(accelerator, claim)
    try:
        if results is None:
            if accelerator.is_main_process and not recipe.quiet:
                print(f"{folder.folder}:", flush=True)
            results = do(session, recipe, folder)
        if scrap and accelerator.is_main_process:
            for name in ("checkpoints", "encoder", "classifier"):
                shutil.rmtree(folder.folder / name, ignore_errors=True)
    finally:
        folder.release()
    return results
