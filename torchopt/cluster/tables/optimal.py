"""The global optimum of k-means on a line, by dynamic programming with divide and conquer.

    D[k][i] = min_j D[k-1][j] + cost(j, i)        the best k clusters of the first i points

The best j never decreases with i (the cost satisfies the concave Monge condition), so the middle i of an interval splits the candidates of
both halves: O(k m log m) instead of O(k m²) (Ckmeans.1d.dp, Wang and Song 2011; Grønlund et al. 2017, arXiv 1701.07204). All intervals
of one depth are evaluated together by numpy. With a value pinned at zero, one more kind of cluster exists, used at most once, whose cost is
Σ m·x²: D counts the partitions without it, E those with it.
"""

from __future__ import annotations

import numpy as np

from torchopt.cluster.tables.points import Array, Points

FIRST_ROWS = 16  # searched over all candidates, at once: fewer calls of numpy than by halves, which are what small problems cost


def optimum(points: Points, n_clusters: int, *, pinned: bool) -> Array:
    """Return the ascending centres of the best partition into at most `n_clusters` clusters, 0 among them where `pinned`.

    Args:
        points: m points, more than `n_clusters` of them.
        n_clusters: at least 2.
        pinned: zero is one of the centres, and counts as one.

    Example:
        >>> from torchopt.cluster.tables.points import sorted_points
        >>> optimum(sorted_points(np.array([1.0, 2.0, 10.0, 12.0]), None, pinned=False), 2, pinned=False).tolist()
        [1.5, 11.0]
    """
    if pinned:
        return _pinned(points, n_clusters)
    m = len(points)
    best = np.full(m + 1, np.inf)
    best[0] = 0.0
    chosen: list[Array] = []
    for k in range(1, n_clusters + 1):
        best, argument = _layer(points, best, k, last=k == n_clusters)
        chosen.append(argument)
    edges = [m]
    for argument in reversed(chosen):
        edges.append(int(argument[edges[-1]]))
    return points.means(np.array(edges[::-1]))


def _pinned(points: Points, n_clusters: int) -> Array:
    m, free = len(points), n_clusters - 1
    without = np.full(m + 1, np.inf)
    without[0] = 0.0
    with_zero, opened = _zero_step(points, without)
    plain: list[Array] = []
    after: list[Array] = []
    zeros = [opened]  # where the run of zero begins, by number of free clusters before it
    from_zero: list[Array] = [np.ones(m + 1, bool)]
    for k in range(1, free + 1):
        without, argument = _layer(points, without, k)
        plain.append(argument)
        continued, argument = _layer(points, with_zero, k)
        after.append(argument)
        entered, opened = _zero_step(points, without)
        zeros.append(opened)
        from_zero.append(entered < continued)
        with_zero = np.minimum(entered, continued)
    return _walk_back(points, free, plain, after, zeros, from_zero)


def _walk_back(
    points: Points, k: int, plain: list[Array], after: list[Array], zeros: list[Array], from_zero: list[Array]
) -> Array:
    i, runs = len(points), []
    while not from_zero[k][i]:
        j = int(after[k - 1][i])
        runs.append((j, i))
        i, k = j, k - 1
    i = int(zeros[k][i])
    while k:
        j = int(plain[k - 1][i])
        runs.append((j, i))
        i, k = j, k - 1
    centres = [float(points.means(np.array(run))[0]) for run in runs]
    return np.sort(np.array([0.0, *centres]))


def _zero_step(points: Points, best: Array) -> tuple[Array, Array]:
    """Append the (possibly empty) run of zero: min over j ≤ i of best[j] + Σ m·x² over [j, i), and that j."""
    gap = best - points.second
    lowest = np.minimum.accumulate(gap)
    where = np.where(gap == lowest, np.arange(len(gap)), 0)
    return lowest + points.second, np.maximum.accumulate(where)


def _layer(points: Points, best: Array, k: int, *, last: bool = False) -> tuple[Array, Array]:
    """One more free cluster: (D[k], argmin), both (m + 1,), from D[k - 1]; only the entry m where it is the `last`."""
    m = len(points)
    value = np.full(m + 1, np.inf)
    argument = np.zeros(m + 2, np.int64)
    argument[:k] = k - 1
    argument[m + 1] = m
    if m < k:
        return value, argument
    if last:
        rows = np.array([m])
        value[rows], argument[rows] = _least(points, best, rows, np.array([k - 1]), np.array([m - 1]))
        return value, argument
    step = max(1, (1 << max(m - k, 1).bit_length()) // FIRST_ROWS)
    rows = np.arange(k - 1 + step, m + 1, step)
    value[rows], argument[rows] = _least(points, best, rows, np.full(len(rows), k - 1), rows - 1)
    while step > 1:
        step //= 2
        rows = np.arange(k - 1 + step, m + 1, 2 * step)
        low = np.maximum(argument[rows - step], k - 1)
        high = np.minimum(argument[np.minimum(rows + step, m + 1)], rows - 1)
        value[rows], argument[rows] = _least(points, best, rows, low, high)
    return value, argument


def _least(points: Points, best: Array, rows: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """For each row i, the least best[j] + cost(j, i) over low ≤ j ≤ high, and the first j that reaches it."""
    lengths = high - low + 1
    begins = np.cumsum(lengths) - lengths
    j = np.arange(lengths.sum()) + np.repeat(low - begins, lengths)
    totals = best[j] + points.cost(j, np.repeat(rows, lengths))
    least = np.minimum.reduceat(totals, begins)
    hits = np.flatnonzero(totals == np.repeat(least, lengths))
    return least, j[hits[np.searchsorted(hits, begins)]]
