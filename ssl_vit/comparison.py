"""Runs side by side, from their results.json."""

import json
from pathlib import Path
from typing import Any

from ssl_vit.evaluate.report import Page, per_cent, plain
from ssl_vit.exits import DATA, Refusal


def compared(runs: tuple[str, ...]) -> Page:
    """Runs side by side: a line for each thing that was measured, a column for each run."""
    columns: dict[str, dict[str, str]] = {}
    for name in runs:
        path = Path(name) / "results.json"
        try:
            columns[name] = lines_of(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(DATA, f"compare: {path} is not the results of a run ({type(error).__name__})") from error
    page = Page("Runs side by side")
    lines = list(dict.fromkeys(line for column in columns.values() for line in column))
    rows = [[line, *(one.get(line, "-") for one in columns.values())] for line in lines]
    page.table(["%", *map(plain, columns)], rows)
    return page


def lines_of(results: dict[str, Any]) -> dict[str, str]:
    """What a results.json says, as lines of a comparison."""
    found = {}
    for row in results.get("rows", ()):
        who = "" if row["who"] == "pretrained" else f", {row['who']}"
        case = row["case"] if row["method"] == "few_shot" else ""
        name = " ".join(filter(None, [row["method"], case, f"(layer {row['layer']}, {row['readout']}{who})"]))
        found[name] = per_cent(row["top1"], row.get("top1_sd"))
    for name in ("top1", "top5", "mean_per_class", "accuracy", "knn_top1", "mean"):
        if isinstance(results.get(name), float):
            found[name] = per_cent(results[name], results.get(f"{name}_sd"))
    found |= {f"mean of {group}": per_cent(value) for group, value in results.get("groups", {}).items()}
    found |= {task: per_cent(one["top1"], one.get("top1_sd")) for task, one in results.get("tasks", {}).items()}
    for name in ("label_sets", "mapped", "mapped_only"):
        found |= {f"{name} {n}": per_cent(results[name][n]) for n in ("top1", "top5") if name in results}
    return found
