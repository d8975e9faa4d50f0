"""How a cost grows with length: the exponent of a power law, in words for the notes of a run."""

import math
from collections.abc import Mapping


def power_law(points: Mapping[float, float], since: float, unit: str) -> str:
    """The exponents over all lengths and over those from ``since`` on, each where there are three points or more.

    Args:
        points: length -> cost.
        since: where long inputs begin; below, the time is that of launches.
        unit: of the lengths.

    Returns:
        For instance "1024 to 65536 tokens: length^0.71; 32768 to 65536 tokens: length^1.00"; empty with few points.
    """
    long = {length: value for length, value in points.items() if length >= since}
    said = [
        f"{min(part)} to {max(part)} {unit}: length^{exponent(part):.2f}"
        for part in ([dict(points)] if long == dict(points) else [dict(points), long])
        if len(part) > 2
    ]
    return "; ".join(said)


def exponent(points: Mapping[float, float]) -> float:
    """The slope of log value over log length, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (points.keys(), points.values()))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)
