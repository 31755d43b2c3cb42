"""Where k-means starts: evenly over the range, evenly in the distribution, uniformly at random, or by k-means++.

k-means++ (Arthur and Vassilvitskii 2007) draws each next centre with probability proportional to its squared distance from the nearest
centre so far; the best of 2 + ln k draws is kept each time, as scikit-learn does. With zero pinned, k-means++ begins with zero; the
other starts give the negative and the positive side centres in proportion to their numbers, as TensorFlow Model Optimization does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from torchopt.cluster.tables.points import Array, Points

Side = Callable[[Array, Array, int], Array]  # ascending x (m,), masses (m,), number of centres → centres


def start(points: Points, n_clusters: int, init: str, *, pinned: bool, seed: int) -> Array:
    """Return `n_clusters` ascending centres; with `pinned`, exactly one of them is 0.

    Args:
        points: the data.
        n_clusters: at least 2 (3 where pinned).
        init: "kmeans++", "linear", "density" or "random".
        pinned: zero is one of the centres.
        seed: of the random choices.
    """
    rng = np.random.default_rng(seed)
    x, mass = points.x, np.diff(points.mass)
    if init == "kmeans++":
        return _plus_plus(x, mass, n_clusters, pinned, rng)
    sides: dict[str, Side] = {
        "linear": lambda x, _, k: np.linspace(x[0], x[-1], k),
        "density": _quantiles,
        "random": lambda x, _, k: rng.uniform(x[0], x[-1], k),
    }
    side = sides[init]
    if not pinned:
        return np.sort(side(x, mass, n_clusters))
    below, above = x < 0, x > 0
    total = mass[below].sum() + mass[above].sum()
    negative = round((n_clusters - 1) * float(mass[below].sum() / total)) if total else 0
    if below.any() and above.any():
        negative = min(max(negative, 1), n_clusters - 2)
    parts = [np.zeros(1)]
    for chosen, count in ((below, negative), (above, n_clusters - 1 - negative)):
        if chosen.any() and count:
            parts.append(side(x[chosen], mass[chosen], count))
    return np.sort(np.concatenate(parts))


def _quantiles(x: Array, mass: Array, k: int) -> Array:
    """The values where the cumulative distribution, linear between the points, reaches (j + 1/2) / k."""
    reached = (np.cumsum(mass) - mass / 2) / mass.sum()
    return np.interp((np.arange(k) + 0.5) / k, reached, x)


def _plus_plus(x: Array, mass: Array, k: int, pinned: bool, rng: np.random.Generator) -> Array:
    first = 0.0 if pinned else float(rng.choice(x, p=mass / mass.sum()))
    centres = [first]
    distance = (x - first) ** 2
    trials = 2 + int(np.log(k))
    while len(centres) < k:
        reach = np.cumsum(mass * distance)
        if reach[-1] <= 0:
            break
        drawn = np.minimum(np.searchsorted(reach, rng.random(trials) * reach[-1], side="right"), len(x) - 1)
        closer = np.minimum(distance, (x - x[drawn, None]) ** 2)  # (trials, m)
        best = int(np.argmin(closer @ mass))
        centres.append(float(x[drawn[best]]))
        distance = closer[best]
    return np.sort(np.array(centres))
