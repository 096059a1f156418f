"""Warnings in words: each sign alone, when it is said, that it is said once, and that a healthy run hears nothing."""

import math
from typing import Any

import pytest

from ssl_vit.train.metrics import PATIENCE_STEPS, HealthMonitor

HEALTHY: dict[str, Any] = {"loss": 3.0, "unigram_entropy": 4.5, "uniform": 6.24, "top_label": 0.1, "data_wait": 0.01}
HEALTHY |= {"bad_samples": 2}


def collect_warnings(rows: list[dict[str, Any]], warmup: int = 100, interval: int = 50) -> list[tuple[int, str]]:
    health = HealthMonitor(warmup)
    steps = range(interval, interval * (len(rows) + 1), interval)
    return [
        (step, line) for step, row in zip(steps, rows, strict=True) for line in health.check_row({"step": step, **row})
    ]


def test_a_healthy_run_hears_nothing():
    """Nor does one whose loss rises by what is small beside a guess."""
    assert collect_warnings([{**HEALTHY, "loss": 6.2 * 0.95**n + 0.1 * (n % 3)} for n in range(60)]) == []
    assert collect_warnings([{"loss": loss, "unigram_entropy": 4.5} for loss in (0.1, 0.3, 0.4, 0.5, 0.5, 0.6)]) == []


@pytest.mark.parametrize("name", ["unigram_entropy", "variance"])
def test_a_loss_at_chance_after_the_warm_up(name: str):
    row = {"loss": 4.49, name: 4.5}
    warnings = collect_warnings([row] * 40, warmup=100)
    assert [step for step, _ in warnings] == [100 + PATIENCE_STEPS]
    assert "still that of guessing" in warnings[0][1]
    assert "4.490" in warnings[0][1]
    assert collect_warnings([row] * 40, warmup=3000) == []
    assert collect_warnings([{**row, "loss": 4.3}] * 40) == []


SLOW_LOADER = {**HEALTHY, "data_wait": 0.5}
SIGNS: dict[str, tuple[list[dict[str, Any]], int, str]] = {  # rows, the step at which, and what is said
    "labels": (
        [HEALTHY, *({**HEALTHY, "top_label": n} for n in (0.95, 0.96))],
        100,
        "95% of the patches have the same labe",
    ),
    "loader": (
        [SLOW_LOADER, SLOW_LOADER, HEALTHY, SLOW_LOADER, SLOW_LOADER, SLOW_LOADER, SLOW_LOADER],
        300,
        "50% of the time is spent waiting for data",
    ),
    # the third row running with more than the one before
    "samples": ([{**HEALTHY, "bad_samples": count} for count in (1, 1, 2, 2, 3, 4, 5, 6)], 350, "5 so far"),
}
for after in (4.2, None, math.inf):
    rising = [{**HEALTHY, "loss": loss} for loss in (5.0, 3.0, 3.2, after, after, after, after)]
    SIGNS[f"a rate that is too high: {after}"] = rising, 300, "the loss was 3.000"


@pytest.mark.parametrize("name", SIGNS)
def test_each_sign_is_told_once(name: str):
    rows, expected_step, expected = SIGNS[name]
    [(step, line)] = collect_warnings(rows)
    assert step == expected_step
    assert expected in line
    assert ("learning rate" in line) == ("rate" in name)


def test_all_signs_at_once_are_all_said():
    row = {"loss": 4.5, "unigram_entropy": 4.5, "top_label": 0.95, "data_wait": 0.9}
    warnings = collect_warnings([{**row, "bad_samples": n, "loss": 4.5 + (n > 3) * 5} for n in range(1, 30)])
    assert len(warnings) == 4  # a collapse is why the loss is at chance
    assert {line.split(": ")[0] for _, line in warnings} >= {"step 50", "step 150"}


def test_images_that_are_classified_have_no_guess_to_be_compared_with():
    assert collect_warnings([{"loss": 1.609, "top1": 0.2}] * 40) == []
    assert collect_warnings([{"loss": loss, "top1": 0.9} for loss in (0.05, 0.2, 0.2, 0.2)]) == []
    assert len(collect_warnings([{"loss": loss, "top1": 0.9} for loss in (0.05, 0.3, 0.3, 0.3)])) == 1
    assert (
        collect_warnings([{"loss": loss, "top1": 0.0} for loss in (60.0, 70.0, 70.0, 70.0)]) == []
    )  # a sigmoid a class


def test_where_what_is_borne_ends():
    """A loss may rise by a fifth of a guess."""
    limits = {"top_label": (0.899, 0.901), "data_wait": (0.299, 0.301), "loss": (0.979 * 4.5, 0.981 * 4.5)}
    for name, values in limits.items():
        assert [len(collect_warnings([{**HEALTHY, "loss": 4.0, name: value}] * 40)) for value in values] == [0, 1], name
    for rise, warnings in {0.19: 0, 0.21: 1}.items():
        assert len(collect_warnings([{**HEALTHY, "loss": loss} for loss in (3.0, *[3.0 + rise * 4.5] * 3)])) == warnings
