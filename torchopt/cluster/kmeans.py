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
from torchopt.cluster.optimal import optimum
from torchopt.cluster.points import SORTED_UP_TO, Array, Histogram, Points, make_points, sorted_points
from torchopt.cluster.seeds import start
from torchopt.errors import ConfigError, ModelError

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
    histogram = _histogram(flat, masses, n_clusters, pin_zero)
    points = sorted_points(flat, masses, pinned=pin_zero) if histogram is None else histogram.points()
    if len(points) + pin_zero <= n_clusters:
        return np.union1d(points.x, [0.0]) if pin_zero else points.x
    if init == "optimal":
        centres = optimum(points if len(points) <= EXACT_UP_TO else _grouped(points, n_clusters), n_clusters, pinned=pin_zero)
    else:
        centres = start(points, n_clusters, init, pinned=pin_zero, seed=seed)
    centres = lloyd(points, centres, pinned=pin_zero, iterations=iterations)
    if histogram is not None and iterations:
        centres = _take_apart(histogram, centres, pin_zero, iterations)
    return centres


def lloyd(points: Points, centres: Array, *, pinned: bool, iterations: int) -> Array:
    """Move each centre to the mean of the points nearest to it until no border moves; 0 stays where `pinned`.

    A centre that loses all its points starts again at the point that is farthest from its own centre.
    """
    seen: Array | None = None
    for _ in range(iterations):
        edges = _edges(points, centres)
        if seen is not None and np.array_equal(edges, seen):
            break
        seen = edges
        means = points.means(edges)
        if pinned:
            means[np.argmin(np.abs(centres))] = 0.0
        empty = np.flatnonzero(np.isnan(means))
        if len(empty):
            means = _reseed(points, edges, means, empty)
            seen = None
        centres = np.sort(means)
    return centres


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


def _edges(points: Points, centres: Array) -> Array:
    borders = (centres[1:] + centres[:-1]) / 2
    return np.concatenate(([0], np.searchsorted(points.x, borders), [len(points)]))


def _reseed(points: Points, edges: Array, means: Array, empty: Array) -> Array:
    filled = np.flatnonzero(edges[1:] > edges[:-1])
    ends = np.concatenate((edges[filled], edges[filled + 1] - 1))
    owners = np.concatenate((filled, filled))
    away = np.abs(points.x[ends] - means[owners])
    farthest = ends[np.argsort(-away, kind="stable")]
    means = means.copy()
    for cluster, point in zip(empty, dict.fromkeys(farthest.tolist())):
        means[cluster] = points.x[point]
    return means[~np.isnan(means)]


def _take_apart(histogram: Histogram, centres: Array, pinned: bool, iterations: int) -> Array:
    """Lloyd with the bins at the borders taken apart, until no border leaves them: the fixed point of the full data."""
    for _ in range(8):
        points, apart = histogram.split((centres[1:] + centres[:-1]) / 2)
        centres = lloyd(points, centres, pinned=pinned, iterations=iterations)
        borders = ((centres[1:] + centres[:-1]) / 2).astype(np.float32)
        if apart[histogram.bin_of(borders)].all():
            break
    return centres


def _grouped(points: Points, n_clusters: int) -> Points:
    """Neighbours merged into few points: half of the groups evenly over the range, half evenly over the mass."""
    count = max(GROUPS, 16 * n_clusters) // 2
    by_value = np.searchsorted(points.x, np.linspace(points.x[0], points.x[-1], count + 1))
    by_mass = np.searchsorted(points.mass, np.linspace(0.0, points.mass[-1], count + 1))
    edges = np.unique(np.concatenate(([0], by_value, by_mass, [len(points)])))
    edges = edges[edges <= len(points)]
    return make_points(points.means(edges), np.diff(points.mass[edges]), pinned=points.shift == 0.0)


def _histogram(flat: Array, masses: Array | None, n_clusters: int, pinned: bool) -> Histogram | None:
    """Bins for large data, unless the values crowd into few of them."""
    if len(flat) <= SORTED_UP_TO or flat.dtype != np.float32 or flat.min() == flat.max():
        return None
    if not 1e-30 < float(flat.max()) - float(flat.min()) < 1e30:  # where the bins' float32 arithmetic would leave its range
        return None
    histogram = Histogram(flat, masses, pinned=pinned)
    crowded = histogram.uneven or np.count_nonzero(histogram.mass) < 16 * n_clusters
    return None if crowded else histogram


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
