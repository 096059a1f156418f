"""Warnings in words: each sign alone, when it is said, that it is said once, and that a healthy run hears nothing."""

import math
from typing import Any

import pytest

from ssl_vit.train.metrics import PATIENCE, Health

WELL: dict[str, Any] = {"loss": 3.0, "unigram_entropy": 4.5, "uniform": 6.24, "top_label": 0.1, "data_wait": 0.01}
WELL |= {"bad_samples": 2}


def said(rows: list[dict[str, Any]], warmup: int = 100, every: int = 50) -> list[tuple[int, str]]:
    health = Health(warmup)
    steps = range(every, every * (len(rows) + 1), every)
    return [(step, line) for step, row in zip(steps, rows, strict=True) for line in health.look({"step": step, **row})]


def test_a_healthy_run_hears_nothing():
    """Nor does one whose loss rises by what is small beside a guess."""
    assert said([{**WELL, "loss": 6.2 * 0.95**n + 0.1 * (n % 3)} for n in range(60)]) == []
    assert said([{"loss": loss, "unigram_entropy": 4.5} for loss in (0.1, 0.3, 0.4, 0.5, 0.5, 0.6)]) == []


@pytest.mark.parametrize("name", ["unigram_entropy", "variance"])
def test_a_loss_at_chance_after_the_warm_up(name: str):
    row = {"loss": 4.49, name: 4.5}
    found = said([row] * 40, warmup=100)
    assert [step for step, _ in found] == [100 + PATIENCE]
    assert "still that of guessing" in found[0][1]
    assert "4.490" in found[0][1]
    assert said([row] * 40, warmup=3000) == []
    assert said([{**row, "loss": 4.3}] * 40) == []


SLOW = {**WELL, "data_wait": 0.5}
SIGNS: dict[str, tuple[list[dict[str, Any]], int, str]] = {  # rows, the step at which, and what is said
    "labels": ([WELL, *({**WELL, "top_label": n} for n in (0.95, 0.96))], 100, "95% of the patches have the same labe"),
    "loader": ([SLOW, SLOW, WELL, SLOW, SLOW, SLOW, SLOW], 300, "50% of the time is spent waiting for data"),
    # the third row running with more than the one before
    "samples": ([{**WELL, "bad_samples": count} for count in (1, 1, 2, 2, 3, 4, 5, 6)], 350, "5 so far"),
}
for after in (4.2, None, math.inf):
    rising = [{**WELL, "loss": loss} for loss in (5.0, 3.0, 3.2, after, after, after, after)]
    SIGNS[f"a rate that is too high: {after}"] = rising, 300, "the loss was 3.000"


@pytest.mark.parametrize("name", SIGNS)
def test_each_sign_is_told_once(name: str):
    rows, when, what = SIGNS[name]
    [(step, line)] = said(rows)
    assert step == when
    assert what in line
    assert ("learning rate" in line) == ("rate" in name)


def test_all_signs_at_once_are_all_said():
    row = {"loss": 4.5, "unigram_entropy": 4.5, "top_label": 0.95, "data_wait": 0.9}
    found = said([{**row, "bad_samples": n, "loss": 4.5 + (n > 3) * 5} for n in range(1, 30)])
    assert len(found) == 4  # a collapse is why the loss is at chance
    assert {line.split(": ")[0] for _, line in found} >= {"step 50", "step 150"}


def test_images_that_are_classified_have_no_guess_to_be_compared_with():
    assert said([{"loss": 1.609, "top1": 0.2}] * 40) == []
    assert said([{"loss": loss, "top1": 0.9} for loss in (0.05, 0.2, 0.2, 0.2)]) == []
    assert len(said([{"loss": loss, "top1": 0.9} for loss in (0.05, 0.3, 0.3, 0.3)])) == 1
    assert said([{"loss": loss, "top1": 0.0} for loss in (60.0, 70.0, 70.0, 70.0)]) == []  # a sigmoid a class


def test_where_what_is_borne_ends():
    """A loss may rise by a fifth of a guess."""
    limits = {"top_label": (0.899, 0.901), "data_wait": (0.299, 0.301), "loss": (0.979 * 4.5, 0.981 * 4.5)}
    for name, values in limits.items():
        assert [len(said([{**WELL, "loss": 4.0, name: value}] * 40)) for value in values] == [0, 1], name
    for rise, warnings in {0.19: 0, 0.21: 1}.items():
        assert len(said([{**WELL, "loss": loss} for loss in (3.0, *[3.0 + rise * 4.5] * 3)])) == warnings
