"""Recipes: the parts' configs put together, checked against each other, and run."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from ssl_vit import config, cost, inject
from ssl_vit.advice import planned, relieved
from ssl_vit.data import find, workers
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.samples import Data, Samples
from ssl_vit.data.sequential import SequentialStream, Tars, tars
from ssl_vit.data.stream import EvaluationStream, Share, TrainingStream
from ssl_vit.encoders import Encoder, weights
from ssl_vit.encoders.vit import Vit
from ssl_vit.evaluate.accuracy import HeldOut
from ssl_vit.exits import DATA, INTERNAL, USAGE, Refusal, leave, out_of_memory, verdict
from ssl_vit.family import follow_launcher
from ssl_vit.heads import Head
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.heads.panel import grid
from ssl_vit.heads.transfer import Transfer
from ssl_vit.model import Batch, Model, count_parameters
from ssl_vit.scaling import Device
from ssl_vit.train import checkpoint
from ssl_vit.train.distributed import from_main, total
from ssl_vit.train.environment import world
from ssl_vit.train.launch import start
from ssl_vit.train.loop import Loop, Task, fit, shared
from ssl_vit.train.numbers import NOTHING, RollBack
from ssl_vit.train.optim import AdamW, Optim, Sgd
from ssl_vit.train.run import SAFE, Run
from ssl_vit.train.startup import check_alike, check_shared, meet, on_each_machine
from ssl_vit.train.tracker import write_png
from ssl_vit.train.watchdog import Watchdog

FOLDER = Path(__file__).parent.parent / "recipes"
PANEL = 8  # images in a picture
MEETING = 120.0  # seconds that a process waits for the master to be there
FREE_OF_SOURCE = {"kind", "image", "pool", "dropout"}  # what a source of weights leaves open


class Train(Loop):
    """What pretraining and fine-tuning share."""

    run: str = Field(default="runs/run", min_length=1, description="output folder (default: runs/RECIPE)")
    dry_run: bool = Field(default=False, description="say what would be done, draw the first batch, and stop")
    world: int | None = Field(default=None, ge=1, description="with dry_run: GPUs to plan the run for")
    device: Device = Device()
    fresh: bool = Field(
        default=False, description="put aside what the run folder holds and begin anew (a launcher's restart goes on)"
    )
    allow_change: tuple[str, ...] = Field(
        default=(), description=f"keys that may differ from the run's, of: {' '.join(sorted(SAFE))}"
    )
    init: str = Field(
        default="none", description="weights to start from: a run, an encoder folder, a weights file, timm:NAME, none"
    )
    data: Data = Data()
    encoder: Encoder = Vit()

    @field_validator("allow_change")
    @classmethod
    def _is_safe(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in SAFE:
                raise ValueError(f"{name} may not change in a run; these may: {' '.join(sorted(SAFE))}")
        return names


class Pretrain(Train):
    """Pretrain an encoder: by masked patch prediction, or supervised with head.kind=classifier."""

    head: Head = MeanColor()
    optim: Optim = AdamW()


class Finetune(Train):
    """Fine-tune a pretrained encoder to classify images, or train one from scratch with init=none."""

    head: Head = Transfer()
    optim: Optim = Sgd()


Recipe = Pretrain | Finetune


def resolve(recipe: Recipe) -> tuple[Recipe, weights.Weights | None, Vit | None]:
    """The recipe with its encoder's config complete, and where `init` names a source, its weights and config.

    A source's architecture is the encoder's; Refusal(USAGE) names encoder keys that contradict it.
    """
    given, source, tensors = recipe.encoder, None, None
    encoder = given.model_copy(update={"image": recipe.data.image_size})
    if "image" in given.model_fields_set and given.image_hw != encoder.image_hw:
        raise Refusal(USAGE, f"encoder.image: leave it out, it follows data.image_size={recipe.data.image_size}")
    if recipe.init != "none":
        source, tensors = weights.read(recipe.init)
        _agree(given, source, recipe.init)
        free = {name: getattr(given, name) for name in ("pool", "dropout") if name in given.model_fields_set}
        encoder = source.model_copy(update={"image": recipe.data.image_size, **free})
    if encoder.channels != 3:
        raise Refusal(USAGE, f"encoder.channels={encoder.channels}: images are read as RGB, which has 3")
    try:
        with torch.device("meta"):
            recipe.head.build(encoder.build(), classes=1)
    except ValueError as error:
        raise Refusal(USAGE, f"data.image_size={recipe.data.image_size}: {error}") from error
    return recipe.model_copy(update={"encoder": encoder}), tensors, source


def _agree(given: Vit, source: Vit, name: str) -> None:
    """Refuse encoder keys that were given and say something else than the source of the weights."""
    said = given.model_fields_set - FREE_OF_SOURCE
    numbers = ("width", "depth", "heads", "mlp")
    mine = dict(zip(numbers, given.numbers, strict=True)) | {k: getattr(given, k) for k in said - {"size", *numbers}}
    theirs = source.model_dump() | dict(zip(numbers, source.numbers, strict=True))
    if "size" not in said:
        mine = {key: value for key, value in mine.items() if key in said}
    wrong = [key for key, value in mine.items() if value != theirs[key]]
    if wrong:
        cure = " ".join(f"encoder.{key}={theirs[key]}" for key in wrong)
        raise Refusal(USAGE, f"init={name} is another encoder than the encoder keys say; give {cure}, or none of them")


def build(recipe: Recipe, classes: int, tensors: weights.Weights | None = None, source: Vit | None = None) -> Model:
    """The model of a resolved recipe: weights drawn from its seed, the encoder's from the source where there is one."""
    torch.manual_seed(recipe.seed)
    encoder = recipe.encoder.build()
    if tensors is not None and source is not None:
        weights.fill(encoder, source, tensors, recipe.init)
    return Model(encoder, recipe.head.build(encoder, classes))


def sources(recipe: Recipe) -> tuple[Manifest | Tars, Manifest | None]:
    """The training and evaluation data, complete; images are converted first, beside the run."""
    data = recipe.data
    if data.train is None:
        raise Refusal(USAGE, "data.train: it must be given: a folder of shards, or of images")
    if isinstance(recipe, Finetune) and data.val is None:
        raise Refusal(USAGE, "data.val: it must be given: fine-tuning is judged on it")
    converted = Path(recipe.run).parent / "shards"
    search = partial(find.sets, converted=converted, store=data.store, may_convert=world() == 1)
    train = tars(data.train, data.store) if data.reader == "webdataset" else search(data.train, "train")
    val = search(data.val, "val") if data.val is not None else None
    sound(recipe, train, val)
    if isinstance(train, Tars):
        print(f"{train.name}: read by webdataset: neither exactly once an epoch nor exactly resumable", flush=True)
    if recipe.head.needs_labels and not train.classes:
        index = " (tools/index_shards.py finds them)" if isinstance(train, Tars) else ""
        raise Refusal(DATA, f"{train.name}: has no classes{index}, and head.kind={recipe.head.kind} needs labels")
    if recipe.head.needs_labels and val is not None and val.classes != train.classes:
        cure = "convert both in one go, or give both the same class_map"
        raise Refusal(DATA, f"{val.name}: its classes are not those of {train.name}; {cure}")
    return train, val


def sound(recipe: Recipe, *sets: Manifest | Tars | None) -> None:
    """Refuse data of which shards are missing or altered on this machine."""
    for made in sets:
        if isinstance(made, Manifest):
            made.check(full=recipe.data.verify)


def streamed(train: Manifest | Tars, recipe: Recipe) -> TrainingStream | SequentialStream:
    """The training data as a stream."""
    kind = SequentialStream if isinstance(train, Tars) else TrainingStream
    return kind(train, recipe.data, recipe.seed, recipe.batch)  # type: ignore[arg-type]


def run(recipe: Recipe) -> int:
    """Do what the recipe says, from the checkpoint where there is one; returns the exit code."""
    follow_launcher()
    arm_faults()
    inject.point("start")
    recipe, tensors, source = resolve(recipe)
    asked = recipe.asked(recipe.optim.clip, world())
    if recipe.dry_run:
        return preview(recipe, tensors, source)
    folder = Run(Path(recipe.run))
    meet(min(recipe.timeout, MEETING))
    accelerator = start(asked, recipe.tracker, folder.folder)
    watchdog = Watchdog(accelerator, recipe.timeout, lambda end: folder.write_exit(end.code, end.message))
    try:
        check_alike(accelerator, recipe)
        from_main(accelerator, lambda: folder.claim(recipe, recipe.fresh, recipe.allow_change))
        inject.point("claimed")
        check_shared(accelerator, folder.folder)
        folder.held = True  # by one process for all
        train, val = from_main(accelerator, lambda: sources(recipe), watchdog.beat)
        on_each_machine(accelerator, lambda: sound(recipe, train, val))
        share = shared(recipe, accelerator.process_index, accelerator.num_processes)
        row, left_out = None, NOTHING
        while row is None:
            model = build(recipe, len(train.classes), tensors, source)
            task = _task(recipe, model, train, val, share, accelerator.device, partial(total, accelerator))
            try:
                row = fit(folder, accelerator, recipe, task, watchdog.beat, left_out=left_out)
            except RollBack as back:
                left_out = back.left_out
                del model, task
                accelerator.free_memory()
        inject.point("finish")
        from_main(accelerator, lambda: _finish(recipe, folder, row))
        if accelerator.is_main_process:
            folder.write_exit(0, "done")
    except BaseException as error:
        if lost := watchdog.explain(error):
            folder.write_exit(lost.code, lost.message)
            leave(lost)
        told = workers.explain(error) or (Refusal(INTERNAL, relieved(recipe)) if out_of_memory(error) else None)
        end = told or verdict(error)
        if accelerator.is_main_process or not end.shared:
            folder.write_exit(end.code, end.message)
        if not end.shared:
            watchdog.fail(end)
        if told:
            raise told from error
        raise
    finally:
        watchdog.close()
        folder.release()
        accelerator.end_training()
    return 0


def arm_faults() -> None:
    """Where a drill asks for faults, say so first."""
    if asked := os.environ.get(inject.VARIABLE, ""):
        print(f"{inject.VARIABLE}={asked}: faults will be injected", flush=True)
    inject.arm(asked)


def _task(
    recipe: Recipe,
    model: Model,
    train: Manifest | Tars,
    val: Manifest | None,
    share: Share,
    device: torch.device,
    total: Any,
) -> Task:
    stream = streamed(train, recipe)
    evaluators = []
    if val is not None:
        held_out = EvaluationStream(val, recipe.data, share.micro_batch)
        evaluators.append(HeldOut(held_out, share, device, total, model.head.report))  # type: ignore[arg-type]
    panel = None
    if hasattr(model.head, "panel"):
        drawn = first_images(val or stream, recipe.data)
        panel = {name: value.to(device) for name, value in drawn.items()}
    return Task(model, stream, recipe.optim, evaluators, panel, flops(model))


def first_images(source: Manifest | TrainingStream | SequentialStream, data: Data) -> Batch:
    """The first few images of a split as evaluation sees them; of tars without a manifest, as training does."""
    if isinstance(source, SequentialStream):
        return source.first(PANEL)
    manifest = source.samples.manifest if isinstance(source, TrainingStream) else source
    samples = Samples(manifest, data, seed=0, training=False)
    batch, _ = samples.batch([(0, i) for i in range(min(PANEL, manifest.samples))])
    return {name: value.contiguous() for name, value in batch.items()}


def flops(model: Model) -> int:
    """FLOPs of training on an image, by formula."""
    return cost.training_flops(cost.encoder_macs(model.encoder.config) + model.head.macs)


def _finish(recipe: Recipe, folder: Run, row: dict[str, Any]) -> None:
    """Export the encoder from the last checkpoint, whichever engine wrote it, and write results.json."""
    encoder = recipe.encoder.build()
    saved = checkpoint.weights(checkpoint.steps(folder.checkpoints)[-1])
    encoder.load_state_dict(
        {name.removeprefix("encoder."): value for name, value in saved.items() if name.startswith("encoder.")}
    )
    checkpoint.publish(folder.folder / "encoder", lambda draft: weights.export(encoder, draft))
    judged = {name.removeprefix("val_"): value for name, value in row.items() if name.startswith("val_")}
    protocol = {
        "init": recipe.init,
        "head": recipe.head.kind,
        "data.train": recipe.data.train,
        "data.val": recipe.data.val,
        "data.subset": recipe.data.subset,
        "image_size": recipe.data.image_size,
        "pool": recipe.encoder.pool,
        "optim": recipe.optim.model_dump(),
        "steps": recipe.steps,
        "batch": recipe.batch,
        "seed": recipe.seed,
    }
    trained = {f"train_{name}": row[name] for name in ("loss", "unigram_entropy") if name in row}
    folder.write_results({**judged, **trained, "step": row["step"], "protocol": protocol})
    if not recipe.quiet:
        shown = {
            name: value for name, value in judged.items() if name in ("loss", "accuracy", "top1", "top5", "samples")
        }
        text = "".join(
            f", {name} {value:.4f}" if name != "samples" else f" on {value}" for name, value in shown.items()
        )
        print(f"{folder.folder}: done, {row['step']} steps{text}; encoder in {folder.folder / 'encoder'}")


def preview(recipe: Recipe, tensors: weights.Weights | None, source: Vit | None) -> int:
    """Say what a run would do and draw its first batch, corrupted where the head does that; trains nothing."""
    if int(os.environ.get("RANK", "0")):
        return 0
    train, val = sources(recipe)
    model = build(recipe, len(train.classes), tensors, source)
    stream = streamed(train, recipe)
    print(config.dump(recipe))
    length = f"{recipe.steps:,} steps of {recipe.batch:,} images"
    if isinstance(stream, TrainingStream):
        shards = stream.samples.manifest
        epochs = recipe.steps * recipe.batch / stream.epoch_samples
        length += f": {epochs:.1f} epochs of {stream.epoch_samples:,}"
        data = f"{shards.name}: {shards.samples:,} samples, {len(shards.classes)} classes, {len(shards.shards)} shards"
        keys = next(stream.keys(0, Share(micro_batch=min(PANEL, recipe.batch))))
        batch, _ = stream.samples.batch(keys)
    else:
        data, batch = train.name, stream.first(min(PANEL, recipe.batch))
    rows = {
        "parameters": f"encoder {count_parameters(model.encoder):,}, head {count_parameters(model.head):,}",
        "FLOPs an image": f"{flops(model):,} (forward and backward)",
        "length": length,
        "data": data,
        "evaluation": f"{val.name}: {val.samples:,} samples" if val is not None else "none",
    }
    picture = Path(recipe.run) / "first_batch.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_png(model(batch, panel=True) if hasattr(model.head, "panel") else grid([batch["image"]]), picture)
    rows["first batch"] = str(picture)
    print("\n".join(f"{name:<16}{text}" for name, text in rows.items()))
    if recipe.world is not None:
        print("\n".join(planned(recipe, model, train)))
    return 0
