"""k-means on a line: few values that stand for many weights with the least squared error.

    minimize Σ_i m_i (w_i - T[c_i])²        over T (k values) and c

Weights are one-dimensional, so clusters are runs of the sorted weights, and Lloyd's iteration (1982) costs O(k log n) with prefix sums.
`init="optimal"` starts from the global optimum: exactly, by dynamic programming, for up to 6,000 distinct values; beyond, from the
optimum of a summary of m grouped points, whose sum of squares inside the groups W bounds the loss: √(error) ≤ √(optimum) + 2·√W (triangle
inequality in L2), and Lloyd on all the weights then takes that loss away in practice. Masses m_i are 1, or the
weights' importance (squared gradients, as in sensitive k-means, Kim et al. 2023, arXiv 2306.07629).
"""

from __future__ import annotations

import numpy as np

from torchopt.cluster.config import check_clusters, check_init
from torchopt.cluster.tables.counted import Counted, counted
from torchopt.cluster.tables.optimal import optimum
from torchopt.cluster.tables.points import Array, Points, Sorted, in_order, merged
from torchopt.cluster.tables.refill import refill
from torchopt.cluster.tables.seeds import start
from torchopt.errors import ConfigError, ModelError

SINGLE_UP_TO = 1 << 17  # distinct values; more are grouped, but for Lloyd's iterations
COUNTED_FROM = 1 << 17  # values; more are counted in cells where they lie evenly enough
SETTLES_IN = 100  # iterations; where fewer are allowed they are counted, on sorted values
ROUNDS = 20  # of taking values near borders one by one; one or two are usual
SUMMARY = 8192  # groups
EXACT_UP_TO = 6000  # distinct values: 16 clusters in 60 ms
GROUPS = 512  # grouped points for the optimum of larger data, and at least 16 a cluster


def kmeans(
    values: Array,
    n_clusters: int,
    *,
    init: str = "optimal",
    importance: Array | None = None,
    pin_zero: bool = False,
    iterations: int = 300,
    seed: int = 0,
) -> Array:
    """Return at most `n_clusters` ascending values that stand for `values` with small squared error.

    Args:
        values: float array of any shape, finite.
        n_clusters: 2 … 256; fewer are returned where `values` has fewer distinct ones.
        init: "optimal", "kmeans++", "linear", "density" or "random".
        importance: masses of the values, same shape, not negative; None is 1 each.
        pin_zero: one of the returned values is exactly 0.
        iterations: Lloyd iterations after the start, at most.
        seed: of "kmeans++" and "random".

    Returns:
        (k,) float64, ascending.

    Raises:
        ConfigError: `n_clusters` or `init` is out of range, or there are more clusters than values.
        ModelError: `values` or `importance` is not finite.

    Example:
        >>> kmeans(np.array([1.0, 2.0, 10.0, 12.0]), 2).tolist()
        [1.5, 11.0]
        >>> kmeans(np.array([0.1, 2.0, 10.0, 12.0]), 3, pin_zero=True).tolist()
        [0.0, 2.0, 11.0]
    """
    flat, masses = _checked(values, n_clusters, init, importance, pin_zero)
    if pin_zero:
        flat, masses = _without_zeros(flat, masses)
    if not len(flat):
        return np.zeros(1)
    many = counted(flat, masses, n_clusters) if len(flat) > COUNTED_FROM and iterations >= SETTLES_IN else None
    if many is not None:
        centres = _first(many.points(pinned=pin_zero), n_clusters, init, pin_zero, seed)
        return _settled(many, centres, pin_zero, iterations)
    ordered = in_order(flat, masses)
    points = _points(ordered, pinned=pin_zero)
    if len(points) + pin_zero <= n_clusters:
        return np.union1d(points.x, [0.0]) if pin_zero else points.x
    few = points if init != "optimal" or len(points) <= EXACT_UP_TO else ordered.grouped(_groups(n_clusters), pinned=pin_zero)
    return lloyd(ordered, _first(few, n_clusters, init, pin_zero, seed), pinned=pin_zero, iterations=iterations)


def _first(points: Points, n_clusters: int, init: str, pinned: bool, seed: int) -> Array:
    """The centres that Lloyd's iteration starts from."""
    if init != "optimal":
        return start(
            points if len(points) <= SINGLE_UP_TO else points.grouped(SUMMARY, pinned=pinned),
            n_clusters,
            init,
            pinned=pinned,
            seed=seed,
        )
    few = points if len(points) <= EXACT_UP_TO else points.grouped(_groups(n_clusters), pinned=pinned)
    return optimum(few, n_clusters, pinned=pinned)


def _groups(n_clusters: int) -> int:
    return max(GROUPS, 16 * n_clusters)


def _settled(values: Counted, centres: Array, pinned: bool, iterations: int) -> Array:
    """Lloyd's fixed point on all the values: on whole cells first, then with single values near the borders until they stay there."""
    centres = lloyd(values.points(pinned=pinned), centres, pinned=pinned, iterations=iterations)
    for _ in range(ROUNDS):
        points, open_ = values.near(centres, pinned=pinned)
        centres = lloyd(points, centres, pinned=pinned, iterations=iterations)
        if values.inside(centres, open_):
            break
    return centres


def lloyd(values: Sorted | Points, centres: Array, *, pinned: bool, iterations: int) -> Array:
    """Move each centre to the mean of the values nearest to it until no border moves; 0 stays where `pinned`.

    A centre that loses all its values takes over half of the costliest run (`refill`).
    """
    seen: Array | None = None
    for _ in range(iterations):
        edges = _edges(values.x, centres)
        if seen is not None and np.array_equal(edges, seen):
            break
        seen = edges
        means = values.means(edges)
        if pinned:
            means[np.argmin(np.abs(centres))] = 0.0
        empty = np.isnan(means)
        if empty.any():
            means = _refilled(values, np.where(empty, centres, means), pinned)
            seen = None
        centres = np.sort(means[~np.isnan(means)])
    return centres


def refilled(values: Array, centres: Array, *, pin_zero: bool) -> Array:
    """Return the centres (k,), ascending, of which those that no value is nearest to are moved to where they save most (`refill`).

    The others stay, but for those whose values are shared out; a centre that nothing can be given stays too.

    Example:
        >>> refilled(np.array([0.0, 0.0, 4.0, 6.0, 6.0]), np.array([0.0, 1.0, 5.0]), pin_zero=True).tolist()
        [0.0, 6.0, 4.0]
    """
    flat, _ = _without_zeros(np.asarray(values).ravel(), None) if pin_zero else (np.asarray(values).ravel(), None)
    if not len(flat):
        return centres
    moved = _refilled(in_order(flat, None), centres, pin_zero)
    return np.where(np.isnan(moved), centres, moved)


def _refilled(values: Sorted | Points, centres: Array, pinned: bool) -> Array:
    points = _points(values, pinned=pinned)
    return refill(points, _edges(points.x, centres), centres, pinned=pinned)


def _points(values: Sorted | Points, *, pinned: bool) -> Points:
    """The distinct values, or groups of neighbours where they are many."""
    if isinstance(values, Points):
        return values
    return merged(values, pinned=pinned) if values.distinct <= SINGLE_UP_TO else values.grouped(SUMMARY, pinned=pinned)


def squared_error(values: Array, centres: Array, importance: Array | None = None) -> float:
    """Return Σ m·(w - T[c])² with each value at its nearest centre.

    Example:
        >>> squared_error(np.array([1.0, 2.0, 10.0, 12.0]), np.array([1.5, 11.0]))
        2.5
    """
    flat = np.asarray(values, np.float64).ravel()
    nearest = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, flat)]
    squares = (flat - nearest) ** 2
    return float(squares.sum() if importance is None else np.dot(squares, np.asarray(importance, np.float64).ravel()))


def _edges(x: Array, centres: Array) -> Array:
    """Where the values nearest to each centre begin (k + 1,); borders in the precision of `x`, which numpy would convert otherwise."""
    borders = (centres[1:] + centres[:-1]) / 2
    rounded = borders.astype(x.dtype)
    above = np.where(rounded < borders, np.nextafter(rounded, x.dtype.type(np.inf)), rounded)  # the same values lie below it
    return np.concatenate(([0], np.searchsorted(x, above), [len(x)]))


def _without_zeros(flat: Array, masses: Array | None) -> tuple[Array, Array | None]:
    """Zeros cost nothing where zero is pinned, and would crowd one bin."""
    some = flat != 0
    if some.all():
        return flat, masses
    return flat[some], None if masses is None else masses[some]


def _checked(values: Array, n_clusters: int, init: str, importance: Array | None, pin_zero: bool) -> tuple[Array, Array | None]:
    check_clusters(n_clusters)
    check_init(init)
    flat = np.asarray(values)
    flat = np.ascontiguousarray(flat if flat.dtype in (np.float32, np.float64) else flat.astype(np.float64)).ravel()
    if not np.isfinite(flat).all():
        raise ModelError(
            f"kmeans: {int((~np.isfinite(flat)).sum())} of {flat.size} values are NaN or infinite; finite values are needed"
        )
    if n_clusters > flat.size:
        raise ConfigError(
            f"kmeans: n_clusters={n_clusters} but there are only {flat.size} values; use at most that many clusters"
        )
    if pin_zero and n_clusters == 2:
        raise ConfigError("kmeans: n_clusters=2 with zero pinned leaves one other value for both signs; use 3 or more")
    if importance is None:
        return flat, None
    masses = np.asarray(importance, np.float64).ravel()
    if masses.size != flat.size or not np.isfinite(masses).all() or (masses < 0).any() or not masses.any():
        raise ModelError(
            f"kmeans: importance has {masses.size} entries for {flat.size} values, or some are negative, not finite or all are zero; "
            "one number of at least 0 a value is needed"
        )
    used = masses > 0
    return (flat, masses) if used.all() else (flat[used], masses[used])
