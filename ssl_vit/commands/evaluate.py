"""Judge an encoder's frozen features, or a classifier: python tools/evaluate.py encoder=runs/NAME [key=value ...]"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_vit.data.loader import ProcessShard
from ssl_vit.distributed import Distributed
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate.classifier import evaluate_classifier
from ssl_vit.evaluate.config import TIMEOUT_SECONDS, EvaluationContext
from ssl_vit.evaluate.config import Evaluate as Config
from ssl_vit.evaluate.frozen import evaluate_frozen
from ssl_vit.files import ensure_dir, write_bytes
from ssl_vit.report.page import Page
from ssl_vit.runs.table import compare_results
from ssl_vit.runtime import command_line, die_with_launcher, world_size
from ssl_vit.train.launch import LaunchSettings, start_accelerator


def run(recipe: Config) -> int:
    """Do what the recipe says; returns the exit code."""
    folder = Path(recipe.run)
    if recipe.compare:
        page = compare_results(recipe.compare)
        print("\n\n".join(page.parts))
        if "run" in recipe.model_fields_set:
            if (folder / "results.json").exists():
                raise ExitError(
                    ExitCode.USAGE, f"run={folder}: holds a run's own report; name another folder for the comparison"
                )
            page.write(ensure_dir(folder))
        return 0
    if recipe.encoder is None:
        raise ExitError(
            ExitCode.USAGE, "encoder: it must be given: a run, an encoder folder, a weights file or timm:NAME"
        )
    if "classifier" in recipe.methods and len(recipe.methods) > 1:
        raise ExitError(ExitCode.USAGE, "methods: classifier judges another thing than frozen features; give it alone")
    if recipe.data.holdout:
        raise ExitError(ExitCode.USAGE, "data.holdout: an evaluation is on data.val; leave it out")
    if recipe.methods != ("classifier",) and (recipe.metrics.label_sets or recipe.metrics.class_map):
        raise ExitError(
            ExitCode.USAGE, "metrics.label_sets and metrics.class_map: of a classifier; give methods=classifier"
        )
    if (folder / "recipe.yaml").exists():
        raise ExitError(
            ExitCode.USAGE, f"run={folder}: holds a training; its results would be lost; name another folder"
        )
    die_with_launcher()
    settings = LaunchSettings(recipe.batch * world_size(), recipe.batch, 1, None, "fp32", False, TIMEOUT_SECONDS)
    accelerator = start_accelerator(settings, "none", folder)
    try:
        processes = Distributed.from_accelerator(accelerator)
        processes.run_on_main(lambda: ensure_dir(folder))
        shard = ProcessShard(processes.rank, processes.world, recipe.batch)
        context = EvaluationContext(recipe, processes, folder, shard)
        results, page = evaluate_classifier(context) if recipe.methods == ("classifier",) else evaluate_frozen(context)
        processes.run_on_main(lambda: write_evaluation(context, results, page))
    finally:
        accelerator.end_training()
    return 0


def write_evaluation(context: EvaluationContext, results: dict[str, Any], build_page: Callable[[], Page]) -> None:
    """Write results.json and the page."""
    results["command"] = command_line()
    page = build_page()
    page.section("To repeat it")
    page.code(results["command"])
    write_bytes(context.folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    page.write(context.folder)
    if not context.recipe.quiet:
        print("\n".join(page.parts[0].splitlines()))
        print(f"{context.folder}: results.json, report.md, report.html", flush=True)
