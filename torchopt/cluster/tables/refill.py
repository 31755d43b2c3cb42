"""What becomes of a centre that stands for nothing: it takes over half of the run that costs most, cut where that saves most.

    cut = argmin_c cost(start, c) + cost(c, stop)        of the run whose cost is largest

k-means usually moves such a centre to the point farthest away. While a network is pruned, though, masks empty the centres around zero one
after the other; farthest away they would be spent on outliers, one weight each. Halving the costliest run, they follow the weights that
are left.
"""

from __future__ import annotations

import numpy as np

from torchopt.cluster.tables.points import Array, Points


def refill(points: Points, edges: Array, centres: Array, *, pinned: bool) -> Array:
    """Return the centres (k,) with those of empty runs moved, in the same order; what cannot be moved is NaN.

    Args:
        points: the data.
        edges: (k + 1,) where the run of each centre begins, and the last ends.
        centres: (k,); only those of empty runs and of runs that are cut change.
        pinned: the centre that is 0 stays 0.

    Example:
        >>> from torchopt.cluster.tables.points import sorted_points
        >>> points = sorted_points(np.array([1.0, 2.0, 10.0, 12.0]), None, pinned=False)
        >>> refill(points, np.array([0, 2, 4, 4]), np.array([1.5, 11.0, 99.0]), pinned=False).tolist()
        [1.5, 10.0, 12.0]
    """
    starts, stops, centres = edges[:-1].copy(), edges[1:].copy(), centres.copy()
    zero = int(np.argmin(np.abs(centres))) if pinned else -1
    for empty in np.flatnonzero(starts == stops):
        if empty == zero:
            continue
        worst = _costliest(points, starts, stops, zero)
        if worst < 0:
            centres[empty] = np.nan
            continue
        kept, given = _cut(points, int(starts[worst]), int(stops[worst]), around_zero=worst == zero)
        for cluster, run in ((worst, kept), (empty, given)):
            starts[cluster], stops[cluster] = run
            if cluster != zero:
                centres[cluster] = points.means(np.array(run))[0]
    return centres


def _costliest(points: Points, starts: Array, stops: Array, zero: int) -> int:
    """The run that costs most, of those that can be cut; -1 where none costs anything."""
    costs = np.where(stops - starts > 1, points.cost(starts, stops), 0.0)
    if zero >= 0:
        costs[zero] = points.second[stops[zero]] - points.second[starts[zero]]
    worst = int(np.argmax(costs))
    return worst if costs[worst] > 0 else -1


def _cut(points: Points, start: int, stop: int, *, around_zero: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """The best two parts of a run: what its centre keeps, and what it gives away; 0 keeps either end, or nothing."""
    if not around_zero:
        cuts = np.arange(start + 1, stop)
        cut = int(cuts[np.argmin(points.cost(start, cuts) + points.cost(cuts, stop))])
        return (start, cut), (cut, stop)
    cuts = np.arange(start, stop + 1)
    keeps_left = points.second[cuts] - points.second[start] + points.cost(cuts, stop)
    keeps_right = points.cost(start, cuts) + points.second[stop] - points.second[cuts]
    left, right = int(np.argmin(keeps_left)), int(np.argmin(keeps_right))
    if keeps_left[left] <= keeps_right[right]:
        return (start, start + left), (start + left, stop)
    return (start + right, stop), (start, start + right)
