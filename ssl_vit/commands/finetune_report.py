"""The report page of a fine-tuning and of a suite."""

import json
from pathlib import Path
from typing import Any

from ssl_vit.evaluate.report_sections import confusion, flat, remarks
from ssl_vit.recipes import Finetune
from ssl_vit.report import format
from ssl_vit.report.format import per_cent
from ssl_vit.report.page import Page, curves


def tuned_page(recipe: Finetune, folder: Path, results: dict[str, Any]) -> Page:
    """A page of a fine-tuning with its sweep and its seeds, from its results and the files in its folder."""
    name = recipe.benchmark.name or ", ".join(recipe.data.val or recipe.data.train or ())
    page = Page(f"Fine-tuning on {name}")
    first = folder / f"seed-{recipe.seed}" if recipe.seeds > 1 else folder
    rows = [[n, per_cent(results.get(n), results.get(f"{n}_sd"))] for n in ("top1", "top5", "mean_per_class")]
    page.table(["on the test split", "%"], [row for row in rows if row[1] != "-"])
    if sets := results.get("label_sets"):
        table = [[n, per_cent(sets.get(n), sets.get(f"{n}_sd"))] for n in ("top1", "top5")]
        page.table(["by label sets", "%"], table)
    remarks(page, results, recipe.benchmark.paper)
    page.section("Protocol")
    said = flat(results["protocol"])
    digests = results.get("digests") or results["seeds"][0]["digests"]
    page.values({"seeds": recipe.seeds, **said, **{f"digest of {n}": v for n, v in digests.items()}})
    page.text("To repeat it:")
    page.code(results["command"])
    if "sweep" in results:
        page.section("Learning rate")
        tried = results["sweep"]["tried"]
        page.table(
            ["rate", "top-1 on the held-out part, %"],
            [[f"{t['lr']:g}", "diverged" if "diverged" in t else per_cent(t["top1"])] for t in tried],
        )
        lines = {"held out": ([t["lr"] for t in tried], [100 * t["top1"] for t in tried])}
        page.picture("sweep", "top-1 by learning rate", curves(lines, "learning rate", "top-1, %", log=True))
        page.text(f"Taken for the final training: {recipe.optim.lr:g}.")
    if "seeds" in results:
        page.section("Seeds")
        page.table(["seed", "top-1, %"], [[str(one["seed"]), per_cent(one["top1"])] for one in results["seeds"]])
    _curves(page, first)
    confusion(page, first)
    return page


def _curves(page: Page, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    page.section("Training")
    for name, what in (("loss", "loss"), ("top1", "top-1")):
        lines = {
            label: ([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r])
            for key, label in ((name, "training"), (f"val_{name}", "test split"))
        }
        page.picture(name, f"{what} by step", curves(lines, "step", what))


def suite_page(recipe: Finetune, results: dict[str, Any]) -> Page:
    """A page of a suite of tasks."""
    page = Page(recipe.benchmark.name or "Suite of tasks")
    page.table(["mean of", "top-1, %"], [["all tasks", per_cent(results["mean"])]])
    page.table(["group", "top-1, %"], [[name, per_cent(value)] for name, value in results["groups"].items()])
    table = [
        [name, one["group"], per_cent(one["top1"], one.get("top1_sd")), one["samples"], one["paper"]]
        for name, one in results["tasks"].items()
    ]
    page.table(["task", "group", "top-1, %", "test images", "paper, %"], table)
    for name, one in results["tasks"].items():
        for note in one.get("not_the_benchmark", ()):
            page.text(f"**Not the benchmark's data**, {format.plain(name)}: {format.plain(note)}.")
    page.section("Protocol")
    page.values({n: v for n, v in flat(results["protocol"]).items() if not n.startswith("data.")})
    page.text("To repeat it:")
    page.code(results["command"])
    return page
