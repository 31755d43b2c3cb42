"""Which values a weight may take: those of a grid, or those of a table. All the solver asks is the nearest, and its neighbours.

    grid    ŵ = s·q,     q an integer from `low` to `high`
    table   ŵ = s·T[c],  c one of K

Scales are one a row. Weights come as (groups, rows, ...) and go so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

AROUND = 4  # values offered to a search: two on either side


class Values(Protocol):
    """The values that a weight may take."""

    def nearest(self, w: Tensor) -> Tensor:
        """Return the nearest value of each weight, (groups, rows, n)."""
        ...

    def around(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return values around each weight, (groups, rows, n, AROUND), and which of them are there."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Integers times a scale.

    Attributes:
        scale: (groups, rows, 1).
        low: the smallest integer.
        high: the largest.
        zero: the integer that stands for 0.

    Example:
        >>> grid = Grid(scale=torch.ones(1, 1, 1), low=-2, high=2)
        >>> grid.nearest(torch.tensor([[[0.6, 7.0]]])).tolist()
        [[[1.0, 2.0]]]
    """

    scale: Tensor
    low: int
    high: int
    zero: int = 0

    def nearest(self, w: Tensor) -> Tensor:
        """Return the nearest value of each weight."""
        q = (w / self.scale).round_().add_(self.zero).clamp_(self.low, self.high)
        return q.sub_(self.zero).mul_(self.scale)

    def around(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two values on either side."""
        q = torch.floor(w / self.scale)[..., None] + torch.arange(-1, AROUND - 1, device=w.device) + self.zero
        there = (q >= self.low) & (q <= self.high)
        return (q - self.zero) * self.scale[..., None], there


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """K values times a scale.

    Attributes:
        entries: (groups, rows, K), ascending.
        scale: (groups, rows, 1).

    Example:
        >>> table = Table(entries=torch.tensor([[[0.0, 1.0, 4.0]]]), scale=torch.ones(1, 1, 1))
        >>> table.nearest(torch.tensor([[[0.6, 3.0]]])).tolist()
        [[[1.0, 4.0]]]
        >>> table.codes(torch.tensor([[[0.6, 3.0]]])).tolist()
        [[[1, 2]]]
    """

    entries: Tensor
    scale: Tensor

    def codes(self, w: Tensor) -> Tensor:
        """Return which entry is the nearest, int64."""
        borders = (self.entries[..., 1:] + self.entries[..., :-1]) / 2
        return torch.searchsorted(borders.contiguous(), (w / self.scale).contiguous())

    def nearest(self, w: Tensor) -> Tensor:
        """Return the nearest value of each weight."""
        return self.entries.gather(2, self.codes(w)).mul_(self.scale)

    def around(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two entries on either side."""
        count = self.entries.shape[2]
        place = torch.searchsorted(self.entries.contiguous(), (w / self.scale).contiguous())
        index = place[..., None] + torch.arange(-AROUND // 2, AROUND // 2, device=w.device)
        there = (index >= 0) & (index < count)
        flat = index.clamp(0, count - 1).flatten(2)
        return self.entries.gather(2, flat).reshape(index.shape) * self.scale[..., None], there
