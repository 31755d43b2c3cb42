"""Which indices of which axes are one channel: numbers for the indices, pairs of numbers that go together, numbers that must stay.

Every index of every axis of every weight gets a number. A number in an activation says which of them it stands for: what a
convolution writes to output channel 5 carries the number of row 5 of its weight. Where two numbers meet (an addition joins two
producers, a matrix product joins a producer's row to a consumer's column) they are noted as a pair, and the channels of the
network are the connected components of all pairs: everything in one component is removed together or stays together (the
dependency graph of Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, arXiv:2301.12900, for single indices).

    0        a position that must stay
    n > 0    index n
    n < 0    a shadow: an axis that a split made beside the one that carries the channels (see `movements.py`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np

from torchopt.io.importing import unnoticed

with unnoticed():
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

Ids = np.ndarray  # int64, one number for each index of an axis
Axes = list[Ids | None]  # one entry a dimension; None: no channels run along it, and its length is not ours to change
FREE: Ids = np.zeros(0, dtype=np.int64)  # an axis of length one that was stretched: it has whatever length it meets
OUTPUT = "they reach an output of the network"


@dataclass
class Identities:
    """The numbers given out so far, and what was seen of them."""

    count: int = 1
    pairs: list[np.ndarray] = field(default_factory=list)
    fixed: list[tuple[Ids, str]] = field(default_factory=list)

    def fresh(self, length: int) -> Ids:
        """Return numbers that nobody has yet."""
        self.count += length
        return np.arange(self.count - length, self.count, dtype=np.int64)

    def join(self, a: Ids, b: Ids, reason: str) -> None:
        """Note that `a[i]` and `b[i]` are one channel, for each i; next to a position that must stay, the other must too."""
        both = (a > 0) & (b > 0)
        if not np.array_equal(a[both], b[both]):
            self.pairs.append(np.stack([a[both], b[both]]))
        self.fix(a[(a > 0) & (b == 0)], reason)
        self.fix(b[(b > 0) & (a == 0)], reason)

    def fix(self, ids: Ids | None, reason: str) -> None:
        """Note that these must stay, and why."""
        if ids is not None and (ids > 0).any():
            self.fixed.append((ids[ids > 0], reason))

    def components(self) -> tuple[np.ndarray, dict[int, str]]:
        """Return the component of each number, (count,), and why some of the components must stay.

        Of several reasons the first is given, and that it reaches an output only where there is no other.
        """
        labels = _connected(self.pairs, self.count)
        reasons: dict[int, str] = {}
        for ids, reason in sorted(self.fixed, key=lambda entry: entry[1] == OUTPUT):
            for label in np.unique(labels[ids]).tolist():
                reasons.setdefault(label, reason)
        reasons[int(labels[0])] = OUTPUT
        return labels, reasons


def _connected(pairs: Sequence[np.ndarray], count: int) -> np.ndarray:
    ends = np.concatenate([*pairs, np.zeros((2, 0), dtype=np.int64)], axis=1)
    graph = coo_array((np.ones(ends.shape[1], dtype=np.int8), (ends[0], ends[1])), shape=(count, count))
    labels: np.ndarray = connected_components(graph, directed=False)[1]
    return labels


def real(ids: Ids | None) -> TypeGuard[Ids]:
    """True where channels run along the axis."""
    return ids is not None and bool((ids > 0).any())


def shadow(ids: Ids | None) -> TypeGuard[Ids]:
    """True for an axis that a split made beside the one that carries the channels."""
    return ids is not None and bool((ids < 0).any())
