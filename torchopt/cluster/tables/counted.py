"""Many values counted in cells instead of sorted, and taken one by one only where borders between clusters lie.

    Σ over a cluster = Σ over whole cells + Σ over the values of the two cells in which it begins and ends

k-means on a line asks for sums over runs. A cell that no border touches is never split, so its number and sum of values stand for them
exactly; that is all but some hundred of 65,536 cells. Counting takes a sixth of the time of sorting, and the fixed point of Lloyd's
iteration is the one on all the sorted values, bit for bit but for the order of additions.
"""

from __future__ import annotations

import numpy as np
import torch

from torchopt.cluster.tables.cells import Cells
from torchopt.cluster.tables.points import Array, Points, make_points

CELLS = (1 << 14, 1 << 16)  # at least and at most; between, as many as there are values for 16 in each
NEAR = 1 / 1024  # of the cells on either side of a border: those values are taken one by one, and the border may move that far
SERIAL = 1 << 15  # values at a time that torch leaves to one thread: it would wait for others where the machine is busy
CHUNK = 1 << 20  # values at a time, so that memory in float64 stays small
MOST_IN_ONE = 1 / 64  # of the mass in one cell; more means that cells are too wide for these values
CELLS_A_CLUSTER = 16  # with values, at least


class Counted:
    """Float32 values with their numbers, or masses, and sums in equal cells.

    Args:
        x: (n,) float32, finite.
        weight: (n,) masses, or None for 1 each.
        cells: over their range.
    """

    def __init__(self, x: Array, weight: Array | None, cells: Cells) -> None:
        self.x, self.weight, self.cells = x, weight, cells
        self.place = torch.empty(len(x), dtype=torch.int32)
        values, room = torch.from_numpy(x), torch.empty(SERIAL, dtype=torch.float32)
        for start in range(0, len(x), SERIAL):
            part = slice(start, start + SERIAL)
            self.place[part] = cells.of_(room[: len(values[part])], values[part])
        self.mass, self.first = np.zeros((2, cells.count))
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            place, mass = self.place[part].numpy(), None if weight is None else weight[part]
            self.mass += np.bincount(place, mass, cells.count)
            self.first += np.bincount(place, x[part] if mass is None else x[part] * mass, cells.count)

    def resolves(self, n_clusters: int) -> bool:
        """True where the values are spread over enough cells for that many clusters."""
        enough = int(np.count_nonzero(self.mass)) >= CELLS_A_CLUSTER * n_clusters
        return enough and bool(self.mass.max() <= MOST_IN_ONE * self.mass.sum())

    def points(self, *, pinned: bool) -> Points:
        """One point a cell that holds values, at their mean."""
        some = self.mass > 0
        return make_points(self.first[some] / self.mass[some], self.mass[some], pinned=pinned)

    def near(self, centres: Array, *, pinned: bool) -> tuple[Points, Array]:
        """Points of which those near a border are single values; and which cells that are, bool (cells,)."""
        middle = self._border_cells(centres)
        open_ = np.zeros(self.cells.count, dtype=np.bool_)
        reach = int(self.cells.count * NEAR)
        for cell in np.clip(middle, 0, self.cells.count - 1):
            open_[max(0, cell - reach) : cell + reach + 1] = True
        chosen = np.flatnonzero(torch.index_select(torch.from_numpy(open_), 0, self.place).numpy())
        single, inverse = np.unique(self.x[chosen], return_inverse=True)
        masses = np.bincount(inverse, None if self.weight is None else self.weight[chosen], len(single))
        whole = (self.mass > 0) & ~open_
        x = np.concatenate((self.first[whole] / self.mass[whole], single.astype(np.float64)))
        order = np.argsort(x, kind="stable")
        return make_points(x[order], np.concatenate((self.mass[whole], masses))[order], pinned=pinned), open_

    def inside(self, centres: Array, open_: Array) -> bool:
        """True where every border lies in a cell whose values were taken one by one, and so do both cells beside it."""
        middle = self._border_cells(centres)
        return all(bool(open_[np.clip(middle + step, 0, self.cells.count - 1)].all()) for step in (-1, 0, 1))

    def _border_cells(self, centres: Array) -> Array:
        """The cell that each border between neighbouring centres falls in, also beyond the cells that there are."""
        return np.rint((centres[1:] + centres[:-1]) / 2 * self.cells.scale + self.cells.offset).astype(np.int64)


def counted(x: Array, weight: Array | None, n_clusters: int) -> Counted | None:
    """Count values in cells; None where they are not float32, or lie too unevenly for cells to tell `n_clusters` apart."""
    if x.dtype != np.float32:
        return None
    count = 1 << (len(x) // 16).bit_length()
    cells = Cells.over(float(x.min()), float(x.max()), min(max(count, CELLS[0]), CELLS[1]))
    found = None if cells is None else Counted(x, weight, cells)
    return found if found is not None and found.resolves(n_clusters) else None
