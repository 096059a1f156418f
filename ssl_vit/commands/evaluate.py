"""Is an encoder worth it? Frozen features judged by linear probe, k-NN and few-shot; classifiers judged on a split."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ssl_vit.data.loader import Share
from ssl_vit.distributed import from_main, total
from ssl_vit.errors import USAGE, Refusal
from ssl_vit.evaluate.classifier import classifier
from ssl_vit.evaluate.config import LONG, Bench, Evaluate
from ssl_vit.evaluate.frozen import frozen
from ssl_vit.files import made, write_bytes
from ssl_vit.report.page import Page
from ssl_vit.runs.table import compared
from ssl_vit.runtime import command, follow_launcher, world
from ssl_vit.train.launch import Asked, start


def run(recipe: Evaluate) -> int:
    """Do what the recipe says; returns the exit code."""
    folder = Path(recipe.run)
    if recipe.compare:
        page = compared(recipe.compare)
        print("\n\n".join(page.parts))
        if "run" in recipe.model_fields_set:
            if (folder / "results.json").exists():
                raise Refusal(USAGE, f"run={folder}: holds a run's own report; name another folder for the comparison")
            page.write(made(folder))
        return 0
    if recipe.encoder is None:
        raise Refusal(USAGE, "encoder: it must be given: a run, an encoder folder, a weights file or timm:NAME")
    if "classifier" in recipe.methods and len(recipe.methods) > 1:
        raise Refusal(USAGE, "methods: classifier judges another thing than frozen features; give it alone")
    if recipe.data.hold_out:
        raise Refusal(USAGE, "data.hold_out: an evaluation is on data.val; leave it out")
    if recipe.methods != ("classifier",) and (recipe.metrics.label_sets or recipe.metrics.class_map):
        raise Refusal(USAGE, "metrics.label_sets and metrics.class_map: of a classifier; give methods=classifier")
    if (folder / "recipe.yaml").exists():
        raise Refusal(USAGE, f"run={folder}: holds a training; its results would be lost; name another folder")
    follow_launcher()
    asked = Asked(recipe.batch * world(), recipe.batch, 1, None, "fp32", False, LONG)
    accelerator = start(asked, "none", folder)
    try:
        from_main(accelerator, lambda: made(folder))
        share = Share(accelerator.process_index, accelerator.num_processes, recipe.batch)
        bench = Bench(recipe, accelerator, folder, share, partial(total, accelerator))
        results, page = classifier(bench) if recipe.methods == ("classifier",) else frozen(bench)
        from_main(accelerator, lambda: tell(bench, results, page))
    finally:
        accelerator.end_training()
    return 0


def tell(bench: Bench, results: dict[str, Any], made_of: Callable[[], Page]) -> None:
    """Write results.json and the page."""
    results["command"] = command()
    page = made_of()
    page.section("To repeat it")
    page.code(results["command"])
    write_bytes(bench.folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    page.write(bench.folder)
    if not bench.recipe.quiet:
        print("\n".join(page.parts[0].splitlines()))
        print(f"{bench.folder}: results.json, report.md, report.html", flush=True)
