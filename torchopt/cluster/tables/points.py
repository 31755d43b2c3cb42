"""Weights as sorted points with prefix sums, so that any run of neighbours is summed in O(1).

    cost(i, j) = Σ m·x² - (Σ m·x)² / Σ m        over the points i ≤ p < j, with masses m

Weights are one-dimensional, so each cluster is a run of neighbours in sorted order, and all that k-means ever asks is sums over runs.
Of many values (`Sorted`) the sums are kept at every 64th place only; what costs more than a few sums is done on groups of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """Points on a line, ascending, with masses and prefix sums.

    Attributes:
        x: (m,) float64, ascending, distinct.
        mass: (m + 1,) float64, prefix sums of the masses.
        first: (m + 1,) float64, prefix sums of mass · (x - shift).
        second: (m + 1,) float64, prefix sums of mass · (x - shift)².
        shift: subtracted before summing, so that values far from zero do not cancel; 0 where zero is pinned.
    """

    x: Array
    mass: Array
    first: Array
    second: Array
    shift: float

    def __len__(self) -> int:
        return len(self.x)

    def cost(self, start: Array | int, stop: Array | int) -> Array:
        """Squared error of the runs [start, stop) around their own means; 0 for empty runs."""
        mass = self.mass[stop] - self.mass[start]
        first = self.first[stop] - self.first[start]
        spread = self.second[stop] - self.second[start] - first * first / np.where(mass > 0, mass, 1.0)
        error: Array = np.maximum(spread, 0.0)
        return error

    def means(self, edges: Array) -> Array:
        """Means of the runs between `edges` (k + 1,) → (k,); NaN for empty runs."""
        mass = np.diff(self.mass[edges])
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(mass > 0, np.diff(self.first[edges]) / mass, np.nan) + self.shift

    def grouped(self, count: int, *, pinned: bool) -> Points:
        """Neighbours merged into about `count` points: half of the groups evenly over the range, half evenly over the mass."""
        by_value = np.searchsorted(self.x, np.linspace(self.x[0], self.x[-1], count // 2 + 1))
        by_mass = np.searchsorted(self.mass, np.linspace(0.0, self.mass[-1], count // 2 + 1)[1:-1])
        edges = np.unique(np.concatenate(([0], by_value, by_mass, [len(self)])))
        return make_points(self.means(edges), np.diff(self.mass[edges]), pinned=pinned)


def make_points(x: Array, mass: Array, *, pinned: bool) -> Points:
    """Build `Points` from ascending distinct `x` (m,) and positive `mass` (m,)."""
    shift = 0.0 if pinned else float((x * mass).sum() / mass.sum())
    centred = x - shift
    moment = mass * centred
    return Points(x=x, mass=_prefix(mass), first=_prefix(moment), second=_prefix(moment * centred), shift=shift)


def sorted_points(values: Array, importance: Array | None, *, pinned: bool) -> Points:
    """Sort `values` (n,), merge equal ones, and sum their masses (1 each without `importance`)."""
    return merged(in_order(values, importance), pinned=pinned)


def in_order(values: Array, importance: Array | None) -> Sorted:
    """Sort `values` (n,), with their masses if there are any; numpy sorts a million float32 in 4 ms."""
    if importance is None:
        return Sorted(np.sort(values), None)
    order = np.argsort(values, kind="stable")
    return Sorted(values[order], importance[order])


def merged(ordered: Sorted, *, pinned: bool) -> Points:
    """Equal values as one point."""
    x = ordered.x
    starts = np.flatnonzero(np.concatenate(([True], x[1:] != x[:-1])))
    mass = np.diff(np.append(starts, len(x))) if ordered.weight is None else np.add.reduceat(ordered.weight, starts)
    return make_points(x[starts].astype(np.float64), mass.astype(np.float64), pinned=pinned)


class Sorted:
    """Many values in ascending order, equal ones side by side, with their sums at every 64th place.

    The mean of a run is the difference of two sums and of at most 63 values beside either; nothing else of the values' size is made.

    Args:
        x: (n,) ascending.
        weight: (n,) masses of theirs, or None for 1 each.
    """

    def __init__(self, x: Array, weight: Array | None) -> None:
        self.x, self.weight = x, weight
        self.first = _block_sums(x if weight is None else x * weight)
        self.mass = None if weight is None else _block_sums(weight)

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def distinct(self) -> int:
        """How many different values there are."""
        return 1 + int(np.count_nonzero(self.x[1:] != self.x[:-1]))

    def means(self, edges: Array) -> Array:
        """Means of the runs between `edges` (k + 1,) → (k,); NaN for empty runs."""
        place = edges // BLOCK * BLOCK
        near = np.minimum(place[:, None] + np.arange(BLOCK), len(self) - 1)  # (k + 1, BLOCK)
        inside = np.arange(BLOCK) < (edges - place)[:, None]
        weight = inside if self.weight is None else inside * self.weight[near]
        first = self.first[edges // BLOCK] + (self.x[near] * weight).sum(1, dtype=np.float64)
        mass = edges if self.mass is None else self.mass[edges // BLOCK] + weight.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            means: Array = np.where(np.diff(edges) > 0, np.diff(first) / np.diff(mass), np.nan)
        return means

    def grouped(self, count: int, *, pinned: bool) -> Points:
        """Neighbours merged into about `count` points: half of the groups evenly over the range, half evenly over the mass."""
        by_value = np.searchsorted(self.x, np.linspace(self.x[0], self.x[-1], count // 2 + 1))
        places = np.linspace(0.0, len(self), count // 2 + 1)
        if self.mass is not None:
            places = np.interp(np.linspace(0.0, self.mass[-1], len(places)), self.mass, np.arange(len(self.mass)) * BLOCK)
        edges = np.unique(np.concatenate(([0], by_value, np.minimum(places.astype(np.int64), len(self)), [len(self)])))
        means, mass = self.means(edges), np.diff(edges) if self.weight is None else np.add.reduceat(self.weight, edges[:-1])
        distinct = np.flatnonzero(np.concatenate(([True], np.diff(means) > 0)))  # a value may reach over several groups
        return make_points(means[distinct], np.add.reduceat(mass.astype(np.float64), distinct), pinned=pinned)


def _block_sums(terms: Array) -> Array:
    """Sums of the terms before every 64th place, and before the end: (⌈n / 64⌉ + 1,) float64."""
    whole = len(terms) // BLOCK * BLOCK
    sums = terms[:whole].reshape(-1, BLOCK).sum(1, dtype=np.float64)
    return _prefix(np.append(sums, terms[whole:].sum(dtype=np.float64)))


def _prefix(terms: Array) -> Array:
    sums = np.empty(len(terms) + 1)
    sums[0] = 0.0
    np.cumsum(terms, out=sums[1:])
    return sums
