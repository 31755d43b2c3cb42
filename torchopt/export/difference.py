"""How far apart two outputs are, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CLOSE = 1e-4  # of an output's scale: sums of floats in another order


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = CLOSE) -> bool:
    """True where two outputs are equal but for the order of float sums; integers and NaN must be equal.

    Example:
        >>> close(np.array([1.0, 2.0]), np.array([1.0001, 2.0])), close(np.array([1.0, 2.0]), np.array([1.001, 2.0]))
        (True, False)
    """
    return bool((apart(ours, theirs) <= tolerance * scale_of(ours)).all())


def apart(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Absolute differences, float64: 0 where both are the same infinity or NaN, infinite where one is."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.nan_to_num(np.abs(a - b), nan=np.inf, posinf=np.inf))


def scale_of(values: np.ndarray) -> float:
    """The largest finite magnitude, at least the smallest normal number; for integers and booleans 0, since they are equal or not."""
    if not np.issubdtype(values.dtype, np.floating):
        return 0.0
    return max(float(np.abs(values[np.isfinite(values)]).max(initial=0.0)), 1e-30)


def all_close(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], tolerance: float = CLOSE) -> bool:
    """True where every output is close to its own."""
    return all(close(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))


def figures(ours: list[np.ndarray], theirs: list[np.ndarray]) -> str:
    """How far the worst output is apart, in steps of 1/255 of its range."""
    worst = ("", -1.0)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        span = float(a.max() - a.min()) if a.size and np.issubdtype(a.dtype, np.floating) else 0.0
        distance = apart(a, b) / (span / 255 if span > 0 else 1.0)
        text = f"output {i} of the file is up to {distance.max():.2f} steps apart, {(distance > 1.001).mean():.1%} of it more than one"
        worst = max(worst, (text, float(distance.max())), key=lambda pair: pair[1])
    return worst[0]
