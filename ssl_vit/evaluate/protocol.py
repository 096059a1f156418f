"""What a fine-tuning is made of: trainings that choose the rate, final ones, benchmarks and their tasks, as data."""

import math
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator

from ssl_vit.config import Config
from ssl_vit.data.manifest import Manifest
from ssl_vit.evaluate.metrics import group_means, mean_std

AVERAGED_METRICS = ("top1", "top5", "mean_per_class", "loss")  # of final runs, mean and deviation


class Sweep(Config):
    """Learning rates to try before the final training, judged without the test set (paper B.1.1)."""

    lr: tuple[float, ...] = Field(default=(), description="rates (none: no sweep, optim.lr is taken)")
    fraction: float = Field(default=0.1, gt=0, lt=1, description="of data.train, held out to judge them by")
    val: tuple[str, ...] | None = Field(
        default=None, description="a split to judge them by instead (the final training does not see it)"
    )

    @field_validator("lr")
    @classmethod
    def _check_rates(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= rate < math.inf for rate in rates):
            raise ValueError("learning rates are numbers from 0 on")
        if len({f"{rate:g}" for rate in rates}) < len(rates):
            raise ValueError("a rate is there twice")
        return rates


class Benchmark(Config):
    """What a published benchmark is, to tell whether a number is one of its numbers."""

    name: str | None = Field(default=None, description="its name")
    classes: int | None = Field(default=None, ge=1, description="its classes")
    train: int | None = Field(default=None, ge=1, description="its training images")
    test: int | None = Field(default=None, ge=1, description="its test images")
    get: str | None = Field(default=None, description="how to get the data; said where it is missing")
    paper: str | None = Field(default=None, description="what the paper reports")

    def describe_mismatches(self, train: Manifest | None, test: Manifest | None) -> list[str]:
        """Where the data are not the benchmark's, in words."""
        checks = [
            ("classes", self.classes, len(test.classes) if test else None),
            ("training images", self.train, train.samples if train else None),
            ("test images", self.test, test.samples if test else None),
        ]
        return [
            f"{actual} {quantity}, not {expected}"
            for quantity, expected, actual in checks
            if expected and actual not in (None, expected)
        ]


class SuiteTask(Config):
    """One data set of a suite of benchmarks, under `tasks_root`/NAME."""

    name: str = Field(description="its folder")
    group: str = Field(default="", description="whose mean it enters, beside that of all tasks")
    classes: int | None = Field(default=None, ge=1, description="its classes")
    test: int | None = Field(default=None, ge=1, description="its test images")
    augment: bool = Field(default=True, description="false: no crop and no flip, which would change its labels")
    train: tuple[str, ...] = Field(default=("train800", "val200"), description="its folders to train on")
    val: str = Field(default="test", description="its folder to test on")
    paper: str | None = Field(default=None, description="what the paper reports")


def best_learning_rate(trials: Sequence[tuple[float, float]]) -> float:
    """The rate with the best score of (rate, score); of equals, the first."""
    return max(trials, key=lambda pair: pair[1])[0]


def average_results(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample deviation (`..._sd`) of what the final runs measured."""
    values: dict[str, Any] = {}
    for name in (name for name in AVERAGED_METRICS if all(isinstance(run.get(name), int | float) for run in runs)):
        values[name], deviation = mean_std([run[name] for run in runs])
        values |= {} if deviation is None else {f"{name}_sd": deviation}
    label_sets = [run["label_sets"] for run in runs if "label_sets" in run]
    if label_sets:
        values["label_sets"] = {**average_results(label_sets), "samples": label_sets[0]["samples"]}
    return values


def suite_results(tasks: Sequence[SuiteTask], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The score of a suite: the plain mean of its tasks' top-1 (paper 4.1), and each group's mean beside it."""
    scores = [(task.group, results[task.name]["top1"]) for task in tasks]
    table = {task.name: {"group": task.group, "paper": task.paper, **results[task.name]} for task in tasks}
    return {"mean": mean_std([score for _, score in scores])[0], "groups": group_means(scores), "tasks": table}
