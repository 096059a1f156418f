"""One training from a recipe to its result, in a start that may hold several."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_vit import fault_injection
from ssl_vit.commands.results import finish, keep_predictions
from ssl_vit.commands.setup import Session, build, first_images, flops, probes, sound, sources, streamed
from ssl_vit.data.loader import EvaluationStream, Share, parts
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.webdataset_stream import Tars
from ssl_vit.distributed import from_main, total
from ssl_vit.encoders import weights
from ssl_vit.errors import MISMATCH, Refusal
from ssl_vit.evaluate.evaluators import HeldOut, Probe
from ssl_vit.evaluate.metrics import Predictions
from ssl_vit.files import sha256, write_bytes
from ssl_vit.heads import clusters
from ssl_vit.model import Evaluator, Model, count_parameters, read_out
from ssl_vit.recipes import Finetune, Pretrain, Recipe, kept_head
from ssl_vit.train.anomalies import NOTHING, RollBack
from ssl_vit.train.config import shared
from ssl_vit.train.loop import Task, fit
from ssl_vit.train.preflight import on_each_machine
from ssl_vit.train.run_folder import Run

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(session: Session, recipe: Recipe, folder: Run) -> dict[str, Any]:
    """One training from its data to its results."""
    accelerator, beat = session.accelerator, session.watchdog.beat
    accelerator.project_configuration.logging_dir = str(folder.folder)  # where its tracker writes
    data, val = from_main(accelerator, lambda: sources(recipe), beat)
    probed = from_main(accelerator, lambda: probes(recipe), beat)
    on_each_machine(accelerator, lambda: sound(recipe, data, val, *(probed or ())))
    share = shared(recipe, accelerator.process_index, accelerator.num_processes)
    row, left_out = None, NOTHING
    say = partial(print, flush=True) if accelerator.is_main_process and not recipe.quiet else lambda _: None
    from_main(accelerator, lambda: keep(recipe.head, folder.folder), beat)
    while row is None:
        model = build(recipe, len(data.classes), session.tensors, session.source, say)
        if kept_head(recipe):
            weights.read_classifier(recipe.init)[1].fill(model.head.layers[0], data.classes, recipe.init)
        task = _task(session, recipe, model, data, val, probed, share, folder)
        if left_out is NOTHING:
            lines = introduction(recipe, task, data, val, accelerator)
            say("\n".join(lines[: 1 if session.introduced else None]))
            session.introduced = True
        try:
            row = fit(folder, accelerator, recipe, task, beat, left_out=left_out)
        except RollBack as back:
            left_out = back.left_out
        del model, task
        accelerator.free_memory()
    fault_injection.point("finish")
    judged_on = val or (data if recipe.data.hold_out and isinstance(data, Manifest) else None)
    return from_main(accelerator, lambda: finish(recipe, folder, row, data, judged_on, session.tensors), beat)


def introduction(
    recipe: Recipe, task: Task, data: Manifest | Tars, val: Manifest | None, accelerator: "Accelerator"
) -> list[str]:
    """What is about to be trained, on what, for how long and by whom."""
    size = f"{count_parameters(task.model) / 1e6:,.1f} M parameters, {task.flops / 1e9:,.2f} GFLOP an image and step"
    images = f"{recipe.steps:,} steps of {recipe.batch:,} images"
    if isinstance(data, Manifest):
        taken = task.stream.epoch_samples or data.samples
        images += f", {recipe.steps * recipe.batch / taken:,.1f} epochs"
        some = f"{taken:,} of " if taken < data.samples else ""
        samples = f"{data.name}: {some}{data.samples:,} samples in {len(data.shards):,} shards"
    else:
        samples = data.name
    judged = f"; judged on {val.name}: {val.samples:,}" if val is not None else ""
    world, micro = accelerator.num_processes, recipe.micro(accelerator.num_processes)
    pieces = recipe.batch // world // micro
    each = f"{micro:,} images" if pieces == 1 else f"{pieces:,} times {micro:,} images"
    metrics = "metrics.jsonl" if recipe.tracker == "none" else f"metrics.jsonl, {recipe.tracker}"
    if recipe.tracker == "tensorboard":
        metrics += f" (tensorboard --logdir {recipe.run})"
    lines = {
        "run": f"{recipe.run}: {metrics}",
        "model": f"{recipe.encoder.title}, {recipe.head.kind}: {size}",
        "data": samples + judged,
        "length": images,
        "machine": f"{world} process{'es' * (world > 1)} on {accelerator.device.type}, {each} each a step",
    }
    return [f"{name:<9}{text}" for name, text in lines.items()]


def _task(
    session: Session,
    recipe: Recipe,
    model: Model,
    data: Manifest | Tars,
    val: Manifest | None,
    probed: tuple[Manifest, Manifest] | None,
    share: Share,
    folder: Run,
) -> Task:
    stream, device = streamed(data, recipe), session.accelerator.device
    evaluators: list[Evaluator] = []
    if val is not None:
        split = EvaluationStream(val, recipe.data, share.micro_batch)
        evaluators.append(_held_out(session, recipe, model, split, share, folder))
    elif recipe.data.hold_out and isinstance(data, Manifest):
        split = EvaluationStream(data, recipe.data, share.micro_batch, parts(data.samples, recipe.data)[1])
        evaluators.append(_held_out(session, recipe, model, split, share, folder))
    if probed is not None and isinstance(recipe, Pretrain):
        evaluators.append(_probe(session, recipe, model, probed, share))
    panel = None
    if hasattr(model.head, "panel"):
        drawn = first_images(val or stream, recipe.data)
        panel = {name: value.to(device) for name, value in drawn.items()}
    return Task(model, stream, recipe.optim, evaluators, panel, flops(model))


def _held_out(
    session: Session, recipe: Recipe, model: Model, split: EvaluationStream, share: Share, folder: Run
) -> HeldOut:
    """The head's measures over a split; of a fine-tuning its predictions are kept."""
    accelerator, identity = session.accelerator, split.samples.manifest.identity

    def keep(found: Predictions) -> None:
        every = recipe.best is not None
        from_main(accelerator, lambda: keep_predictions(folder, found, identity, every))

    report, wanted = model.head.report, keep if isinstance(recipe, Finetune) else None
    return HeldOut(split, share, accelerator.device, partial(total, accelerator), report, wanted)  # type: ignore[arg-type]


def _probe(session: Session, recipe: Pretrain, model: Model, probed: tuple[Manifest, Manifest], share: Share) -> Probe:
    """k-NN and few-shot on at most `online.samples` images of each split, a fixed random choice."""

    def some(split: Manifest) -> EvaluationStream:
        share_of_it = {"subset": min(1.0, recipe.online.samples / split.samples), "hold_out": 0.0}
        data = recipe.data.model_copy(update=share_of_it)
        return EvaluationStream(split, data, share.micro_batch, parts(split.samples, data)[0])

    accelerator, encoder = session.accelerator, model.encoder
    way = partial(read_out, pool=encoder.pool, prefix=encoder.prefix)
    splits = some(probed[0]), some(probed[1])
    return Probe(splits, share, accelerator.device, partial(total, accelerator), recipe.online, way)


def keep(head: object, folder: Path) -> None:
    """Copy a head's codebook into its run; raises Refusal(MISMATCH) where the run was begun with another one."""
    if not isinstance(head, clusters.Clusters) or head.codebook is None:
        return
    copy, given = folder / "codebook.safetensors", Path(head.codebook)
    if not copy.exists():
        write_bytes(copy, given.read_bytes())
    elif sha256(copy) != sha256(given):
        raise Refusal(MISMATCH, f"head.codebook={given}: not the one that the run was begun with, {copy}")
