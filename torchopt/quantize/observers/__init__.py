"""Observers: what calibration remembers of an activation, and the range that it makes of it.

An observer sees each calibration batch once and keeps state of a fixed size, so that memory does not grow with the number of
batches. `Quantize.observer` names the class; a new one is a subclass of `Observer` in a file of its own beside `minmax.py`, and one
line in `make`. A user's own class is wrapped (`own.py`).
"""

from __future__ import annotations

from typing import Any

from torchopt.errors import ConfigError
from torchopt.quantize.observers.distribution import Distribution, Entropy, LeastSquares, Percentile
from torchopt.quantize.observers.minmax import MinMax, MovingAverage, Observer
from torchopt.quantize.observers.own import ImportedObserver, OwnObserver, Wrapped

__all__ = [
    "Distribution",
    "Entropy",
    "ImportedObserver",
    "LeastSquares",
    "MinMax",
    "MovingAverage",
    "Observer",
    "OwnObserver",
    "Percentile",
    "Wrapped",
    "make",
]


def make(name: Any, *, quant_min: int, quant_max: int, symmetric: bool) -> Observer:
    """Return a new observer.

    Args:
        name: `Quantize.observer`; a name, or a user's class.
        quant_min: the smallest integer of the grid that the range is for.
        quant_max: the largest.
        symmetric: the grid has its zero in the middle.

    Raises:
        ConfigError: no observer has that name.

    Example:
        >>> make("minmax", quant_min=0, quant_max=255, symmetric=False)
        MinMax()
    """
    if not isinstance(name, str):
        own = name if isinstance(name, OwnObserver) else OwnObserver(kind=name)
        return Wrapped(own, quant_min, quant_max)
    match name:
        case "minmax" | "auto":  # "auto" starts from the extremes: output_error.py
            return MinMax()
        case "moving_average":
            return MovingAverage()
        case "percentile":
            return Percentile()
        case "histogram" | "mse":
            return LeastSquares(levels=quant_max - quant_min)
        case "entropy":
            return Entropy(levels=quant_max - quant_min)
    raise ConfigError(
        f"Quantize.observer: {name!r} is not available; choose 'minmax', 'moving_average', 'percentile', 'mse' or 'entropy'"
    )
