"""Equal cells over a line: which of them each weight lies in, found by three vectorized passes in the memory of the result.

    cell(w) = round(o + s·w), clamped to 0 … n - 1        rounded by adding 2^23, from where on float32 holds whole numbers only

The last bits of such a float are the number, so no conversion is needed. What is then looked up at the cell (`blocks.take_`) is any
function of w that changes little inside a cell: the code of the nearest entry, a soft assignment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAGIC = float(1 << 23)
ROUNDING = 2.0**-22  # what float32 loses of s·w, two times over


@dataclass(frozen=True, kw_only=True)
class Cells:
    """`count` cells, a power of two, the middle of number c at (c - offset) / scale; the offset is whole."""

    count: int
    offset: int
    scale: float
    slack: float

    @classmethod
    def over(cls, low: float, high: float, count: int, spare: int = 0) -> Cells | None:
        """Cells from `low` to `high` and `spare` ones beyond either; None where float32 would lose them.

        Example:
            >>> cells = Cells.over(-1.0, 1.0, 8)
            >>> cells.of_(torch.empty(4), torch.tensor([-9.0, -1.0, 0.2, 1.0])).tolist()
            [0, 0, 5, 7]
        """
        if not 1e-30 < high - low < 1e30:
            return None
        scale = (count - 1 - 2 * spare) / (high - low)
        slack = 0.01 + max(abs(low), abs(high)) * scale * ROUNDING
        return cls(count=count, offset=round(spare - low * scale), scale=scale, slack=slack) if slack < 0.25 else None

    def of_(self, place: Tensor, weight: Tensor) -> Tensor:
        """The cells of `weight` (n,) float32, as int32 in the memory of `place` (n,) float32."""
        torch.add(torch.tensor(MAGIC + self.offset, dtype=torch.float32), weight, alpha=self.scale, out=place)
        return place.clamp_(MAGIC, MAGIC + self.count - 1).view(torch.int32).bitwise_and_(self.count - 1)

    def middles(self) -> Tensor:
        """The middle of each cell (count,) float64."""
        return (torch.arange(self.count, dtype=torch.float64) - self.offset) / self.scale
