"""One training from a recipe to its result, in a start that may hold several."""

from functools import partial
from pathlib import Path
from typing import Any

from ssl_vit import fault_injection
from ssl_vit.commands.results import export_and_write_results, keep_predictions
from ssl_vit.commands.setup import (
    Session,
    build_model,
    check_shards,
    first_images,
    flops_per_image,
    make_stream,
    prepare_data,
    prepare_probe_data,
)
from ssl_vit.data.loader import EvaluationStream, ProcessShard, split_holdout
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.webdataset_stream import TarList
from ssl_vit.distributed import Distributed
from ssl_vit.encoders import weights
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate.evaluators import FrozenProbe, HeadEvaluator
from ssl_vit.evaluate.metrics import Predictions
from ssl_vit.files import sha256, write_bytes
from ssl_vit.heads import clusters
from ssl_vit.model import Evaluator, Model, count_parameters, pool_tokens
from ssl_vit.recipes import Finetune, Pretrain, Recipe, keeps_classifier
from ssl_vit.train.anomalies import NO_SKIPS, RollBack
from ssl_vit.train.config import process_shard
from ssl_vit.train.loop import TrainingTask, fit
from ssl_vit.train.preflight import on_each_machine
from ssl_vit.train.run_folder import Run


def train(session: Session, recipe: Recipe, folder: Run) -> dict[str, Any]:
    """One training from its data to its results."""
    accelerator, processes = session.accelerator, session.processes
    accelerator.project_configuration.logging_dir = str(folder.folder)  # where its tracker writes
    data, val = processes.run_on_main(lambda: prepare_data(recipe))
    probe_splits = processes.run_on_main(lambda: prepare_probe_data(recipe))
    on_each_machine(processes, lambda: check_shards(recipe, data, val, *(probe_splits or ())))
    share = process_shard(recipe, processes.rank, processes.world)
    row, skipped = None, NO_SKIPS
    say = partial(print, flush=True) if processes.is_main and not recipe.quiet else lambda _: None
    processes.run_on_main(lambda: copy_codebook(recipe.head, folder.folder))
    while row is None:
        model = build_model(recipe, len(data.classes), session.tensors, session.source, say)
        if keeps_classifier(recipe):
            weights.read_classifier(recipe.init)[1].load_into_layer(model.head.layers[0], data.classes, recipe.init)
        task = _make_task(session, recipe, model, data, val, probe_splits, share, folder)
        if skipped is NO_SKIPS:
            lines = run_summary(recipe, task, data, val, processes)
            say("\n".join(lines[: 1 if session.introduced else None]))
            session.introduced = True
        try:
            row = fit(folder, accelerator, processes, recipe, task, skipped_batches=skipped)
        except RollBack as back:
            skipped = back.skipped_batches
        del model, task
        accelerator.free_memory()
    fault_injection.fault_point("finish")
    eval_split = val or (data if recipe.data.holdout and isinstance(data, Manifest) else None)
    return processes.run_on_main(
        lambda: export_and_write_results(recipe, folder, row, data, eval_split, session.tensors)
    )


def run_summary(
    recipe: Recipe, task: TrainingTask, data: Manifest | TarList, val: Manifest | None, processes: Distributed
) -> list[str]:
    """What is about to be trained, on what, for how long and by whom."""
    gflops = f"{task.flops_per_image / 1e9:,.2f} GFLOP an image and step"
    size = f"{count_parameters(task.model) / 1e6:,.1f} M parameters, {gflops}"
    images = f"{recipe.steps:,} steps of {recipe.batch:,} images"
    if isinstance(data, Manifest):
        num_samples = task.stream.epoch_samples or data.samples
        images += f", {recipe.steps * recipe.batch / num_samples:,.1f} epochs"
        prefix = f"{num_samples:,} of " if num_samples < data.samples else ""
        samples = f"{data.name}: {prefix}{data.samples:,} samples in {len(data.shards):,} shards"
    else:
        samples = data.name
    evaluation = f"; judged on {val.name}: {val.samples:,}" if val is not None else ""
    world, micro = processes.world, recipe.local_micro_batch(processes.world)
    micro_batches = recipe.batch // world // micro
    per_process = f"{micro:,} images" if micro_batches == 1 else f"{micro_batches:,} times {micro:,} images"
    metrics = "metrics.jsonl" if recipe.tracker == "none" else f"metrics.jsonl, {recipe.tracker}"
    if recipe.tracker == "tensorboard":
        metrics += f" (tensorboard --logdir {recipe.run})"
    lines = {
        "run": f"{recipe.run}: {metrics}",
        "model": f"{recipe.encoder.title}, {recipe.head.kind}: {size}",
        "data": samples + evaluation,
        "length": images,
        "machine": f"{world} process{'es' * (world > 1)} on {processes.device.type}, {per_process} each a step",
    }
    return [f"{name:<9}{text}" for name, text in lines.items()]


def _make_task(
    session: Session,
    recipe: Recipe,
    model: Model,
    data: Manifest | TarList,
    val: Manifest | None,
    probe_splits: tuple[Manifest, Manifest] | None,
    share: ProcessShard,
    folder: Run,
) -> TrainingTask:
    stream, device = make_stream(data, recipe), session.processes.device
    evaluators: list[Evaluator] = []
    if val is not None:
        split = EvaluationStream(val, recipe.data, share.micro_batch)
        evaluators.append(_head_evaluator(session, recipe, model, split, share, folder))
    elif recipe.data.holdout and isinstance(data, Manifest):
        split = EvaluationStream(data, recipe.data, share.micro_batch, split_holdout(data.samples, recipe.data)[1])
        evaluators.append(_head_evaluator(session, recipe, model, split, share, folder))
    if probe_splits is not None and isinstance(recipe, Pretrain):
        evaluators.append(_frozen_probe(session, recipe, model, probe_splits, share))
    visualized = None
    if model.head.visualize is not None:
        batch = first_images(val or stream, recipe.data)
        visualized = {name: value.to(device) for name, value in batch.items()}
    return TrainingTask(model, stream, recipe.optim, evaluators, visualized, flops_per_image(model))


def _head_evaluator(
    session: Session, recipe: Recipe, model: Model, split: EvaluationStream, share: ProcessShard, folder: Run
) -> HeadEvaluator:
    """The head's measures over a split; of a fine-tuning its predictions are kept."""
    identity = split.samples.manifest.identity

    def save_predictions(predictions: Predictions) -> None:
        keep_all = recipe.best is not None
        session.processes.run_on_main(lambda: keep_predictions(folder, predictions, identity, keep_all))

    report, on_predictions = model.head.report, save_predictions if isinstance(recipe, Finetune) else None
    return HeadEvaluator(split, share, session.processes, report, on_predictions)  # type: ignore[arg-type]


def _frozen_probe(
    session: Session, recipe: Pretrain, model: Model, probe_splits: tuple[Manifest, Manifest], share: ProcessShard
) -> FrozenProbe:
    """k-NN and few-shot on at most `online.samples` images of each split, a fixed random choice."""

    def probe_stream(split: Manifest) -> EvaluationStream:
        overrides = {"subset": min(1.0, recipe.online.samples / split.samples), "holdout": 0.0}
        data = recipe.data.model_copy(update=overrides)
        return EvaluationStream(split, data, share.micro_batch, split_holdout(split.samples, data)[0])

    encoder = model.encoder
    pooling = partial(pool_tokens, pool=encoder.pool, prefix=encoder.prefix)
    splits = probe_stream(probe_splits[0]), probe_stream(probe_splits[1])
    return FrozenProbe(splits, share, session.processes, recipe.online, pooling)


def copy_codebook(head: object, folder: Path) -> None:
    """Copy a head's codebook into its run; raises ExitError(MISMATCH) where the run was begun with another one."""
    if not isinstance(head, clusters.Clusters) or head.codebook is None:
        return
    copy, codebook = folder / "codebook.safetensors", Path(head.codebook)
    if not copy.exists():
        write_bytes(copy, codebook.read_bytes())
    elif sha256(copy) != sha256(codebook):
        raise ExitError(ExitCode.MISMATCH, f"head.codebook={codebook}: not the one that the run was begun with, {copy}")
