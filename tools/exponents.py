"""How a cost grows along an axis: exponents by least squares on logarithms, beside a formula's on the same points."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import numpy as np
from racing import Row


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float | None]:
    """The slope of the least-squares line through points, and its standard error, which two points do not have."""
    a, b = np.asarray(x, float) - np.mean(x), np.asarray(y, float) - np.mean(y)
    slope = float(a @ b / (a @ a))
    left = b - slope * a
    return slope, float(np.sqrt(left @ left / (len(a) - 2) / (a @ a))) if len(a) > 2 else None


def exponent(values: Sequence[float], costs: Sequence[float]) -> float | None:
    """The p of cost = c value^p; None where there are not two different values."""
    return line(np.log(values), np.log(costs))[0] if len(set(values)) > 1 else None  # type: ignore[arg-type]


def growth(
    axis: str,
    case: str,
    seconds: Mapping[int, Sequence[float]],
    formula: Callable[[int], float] | None = None,
    images: Callable[[int], int] | None = None,
    left_out: Mapping[int, str] | None = None,
) -> Row:
    """The row of an axis, of the seconds of each value in each round: a fit a round, their median, least and most.

    `formula` is what a value should cost, in any unit, where that is known; `images` how many a step of it takes;
    `left_out` are values that are no part of the fit, measured or not, and why. `ratio` is what the cost grew by from
    the first value to the last, beside what it should have by the formula; `last_two` are the exponents between the
    last two values alone, measured and by the formula, where what a step costs at any size weighs least.
    """
    left_out = left_out or {}
    shown, values = list(seconds), [value for value in seconds if value not in left_out]
    middle = {value: median(seconds[value]) for value in shown}
    said = [formula(value) for value in values] if formula else []
    rounds = list(zip(*(seconds[value] for value in values), strict=True))
    fits = sorted(fit for costs in rounds if (fit := exponent(values, costs)) is not None)
    ends = [fit for costs in rounds if (fit := exponent(values[-2:], costs[-2:])) is not None]
    ratios = sorted(costs[-1] / costs[0] * said[0] / said[-1] for costs in rounds) if said and fits else None
    return {
        "benchmark": "scaling",
        "axis": axis,
        "case": case,
        "who": "ssl_vit",
        "values": shown,
        "milliseconds": [round(middle[value] * 1e3, 4) for value in shown],
        "images_per_second": [round(images(value) / middle[value], 2) for value in shown] if images else None,
        "ratio": round(median(ratios), 3) if ratios else None,
        "ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)] if ratios else None,
        "exponent": round(median(fits), 3) if fits else None,
        "exponent_spread": [round(fits[0], 3), round(fits[-1], 3)] if fits else None,
        "formula": round(exponent(values, said) or 0.0, 3) if ratios else None,
        "last_two": round(median(ends), 3) if ends else None,
        "last_two_formula": round(exponent(values[-2:], said[-2:]) or 0.0, 3) if ratios else None,
        "left_out": {str(value): why for value, why in left_out.items()},
    }
