"""The report page of a fine-tuning and of a suite."""

import json
from pathlib import Path
from typing import Any

from ssl_vit.evaluate.report_sections import add_caveats, add_confusion, flatten_protocol
from ssl_vit.recipes import Finetune
from ssl_vit.report import format
from ssl_vit.report.format import format_percent
from ssl_vit.report.page import Page, plot_curves


def finetune_page(recipe: Finetune, folder: Path, results: dict[str, Any]) -> Page:
    """A page of a fine-tuning with its sweep and its seeds, from its results and the files in its folder."""
    name = recipe.benchmark.name or ", ".join(recipe.data.val or recipe.data.train or ())
    page = Page(f"Fine-tuning on {name}")
    first = folder / f"seed-{recipe.seed}" if recipe.seeds > 1 else folder
    rows = [[n, format_percent(results.get(n), results.get(f"{n}_sd"))] for n in ("top1", "top5", "mean_per_class")]
    page.table(["on the test split", "%"], [row for row in rows if row[1] != "-"])
    if sets := results.get("label_sets"):
        table = [[n, format_percent(sets.get(n), sets.get(f"{n}_sd"))] for n in ("top1", "top5")]
        page.table(["by label sets", "%"], table)
    add_caveats(page, results, recipe.benchmark.paper)
    page.section("Protocol")
    protocol = flatten_protocol(results["protocol"])
    digests = results.get("digests") or results["seeds"][0]["digests"]
    page.values({"seeds": recipe.seeds, **protocol, **{f"digest of {n}": v for n, v in digests.items()}})
    page.text("To repeat it:")
    page.code(results["command"])
    if "sweep" in results:
        page.section("Learning rate")
        trials = results["sweep"]["tried"]
        page.table(
            ["rate", "top-1 on the held-out part, %"],
            [
                [f"{trial['lr']:g}", "diverged" if "diverged" in trial else format_percent(trial["top1"])]
                for trial in trials
            ],
        )
        lines = {"held out": ([trial["lr"] for trial in trials], [100 * trial["top1"] for trial in trials])}
        page.picture("sweep", "top-1 by learning rate", plot_curves(lines, "learning rate", "top-1, %", log=True))
        page.text(f"Taken for the final training: {recipe.optim.lr:g}.")
    if "seeds" in results:
        page.section("Seeds")
        page.table(
            ["seed", "top-1, %"], [[str(result["seed"]), format_percent(result["top1"])] for result in results["seeds"]]
        )
    _add_curves(page, first)
    add_confusion(page, first)
    return page


def _add_curves(page: Page, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    page.section("Training")
    for name, title in (("loss", "loss"), ("top1", "top-1")):
        lines = {
            label: ([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r])
            for key, label in ((name, "training"), (f"val_{name}", "test split"))
        }
        page.picture(name, f"{title} by step", plot_curves(lines, "step", title))


def suite_page(recipe: Finetune, results: dict[str, Any]) -> Page:
    """A page of a suite of tasks."""
    page = Page(recipe.benchmark.name or "Suite of tasks")
    page.table(["mean of", "top-1, %"], [["all tasks", format_percent(results["mean"])]])
    page.table(["group", "top-1, %"], [[name, format_percent(value)] for name, value in results["groups"].items()])
    table = [
        [name, task["group"], format_percent(task["top1"], task.get("top1_sd")), task["samples"], task["paper"]]
        for name, task in results["tasks"].items()
    ]
    page.table(["task", "group", "top-1, %", "test images", "paper, %"], table)
    for name, task in results["tasks"].items():
        for note in task.get("not_the_benchmark", ()):
            page.text(f"**Not the benchmark's data**, {format.escape(name)}: {format.escape(note)}.")
    page.section("Protocol")
    page.values({n: v for n, v in flatten_protocol(results["protocol"]).items() if not n.startswith("data.")})
    page.text("To repeat it:")
    page.code(results["command"])
    return page
