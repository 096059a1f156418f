"""Turns, ratios and tables of the benchmarks, by a clock that the test holds."""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
racing = import_module("racing")


def test_contestants_take_turns_and_each_begins_a_round():
    now, order = [0.0], []

    def step(who: str, seconds: float):
        def run() -> None:
            order.append(who)
            now[0] += seconds

        return run

    contestants = {"a": step("a", 1.0), "b": step("b", 2.0), "c": step("c", 4.0)}
    seconds = racing.race(contestants, rounds=3, steps=2, warm_up=1, clock=lambda: now[0])
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"


def test_speed_is_a_median_of_ratios_within_rounds():
    seconds = {"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}
    row = racing.speed(seconds, "a", 10, "b")
    assert row == {"images_per_second": 5.0, "milliseconds": 2000.0, "ratio": 1.0, "ratio_spread": [0.5, 2.0]}
    assert racing.speed(seconds, "b", 10, None)["ratio"] is None
    assert racing.between(row["ratio_spread"]) == "0.50-2.00"


def test_a_table_is_as_wide_as_what_it_holds():
    assert racing.grid(["who", "speed"], [["ours", "10.5"], ["theirs alone", "9"]]).splitlines() == [
        "who             speed",
        "ours             10.5",
        "theirs alone        9",
    ]
