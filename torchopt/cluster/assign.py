"""The nearest entry of a table for every weight, exactly, at little more than the time that it takes to read and write them.

    c = argmin_j |w - T[j]| = number of borders ≤ w        borders = midpoints of the sorted table

A binary search costs 20 ns a weight. Here w is mapped to one of 65,536 equal cells between the outermost borders (`cells`), and a
look-up table of one byte a cell gives the code. The few cells near a border are marked with the high bit, and their weights are searched
exactly afterwards. The buffer that takes ŵ holds the cells on the way, so nothing of the model's size is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchopt.cluster.blocks import PER_THREAD, blocks, in_pairs, look_up_, pair_table, pairs_, take_
from torchopt.cluster.cells import Cells

CELLS = 1 << 16
SPARE = 4  # cells at either end that no border may touch
MARK = 0x80  # on codes of cells near a border; so at most 128 entries take this path
WORDS = -0x7F7F7F7F7F7F7F80  # 0x8080808080808080 as int64: eight marks at once
PAYS_FROM = 1 << 14  # fewer weights are searched directly


def borders(table: Tensor) -> tuple[Tensor, Tensor]:
    """Sort tables (groups, k) and return (their borders (groups, k - 1), the order of the entries (groups, k) int64).

    A border lies above the lower of its two entries and not above the upper one, so an entry is always nearest to itself; of two
    equal entries the last is used.
    """
    ordered, order = table.detach().float().sort(dim=1, stable=True)
    lower, upper = ordered[:, :-1], ordered[:, 1:]
    middle = ((lower.double() + upper.double()) / 2).float()
    return torch.where(middle > lower, middle, upper), order


def assign_(codes: Tensor, weight: Tensor, table: Tensor, value: Tensor | None = None) -> Tensor:
    """Set `codes` to the nearest entries.

    Args:
        codes: (groups, n) uint8, overwritten.
        weight: (groups, n) floating.
        table: (groups, k) floating, k ≤ 256.
        value: (groups, n) of the table's dtype, overwritten with table[codes] on the way, or None.

    Returns:
        `codes`.

    Example:
        >>> assign_(torch.empty(1, 3, dtype=torch.uint8), torch.tensor([[0.1, 0.9, 2.0]]), torch.tensor([[1.0, 0.0]])).tolist()
        [[1, 0, 0]]
    """
    weight, table = weight.detach(), table.detach()
    found = _borders_of(weight, table)
    if found is not None:
        _by_cells(codes.view(-1), weight.reshape(-1), table[0], found, None if value is None else value.view(-1))
        return codes
    limits, order = borders(table)
    if len(table) == 1:
        codes.copy_(order[0].to(torch.uint8)[torch.bucketize(weight.float(), limits[0], right=True)])
    else:
        codes.copy_(order.gather(1, torch.searchsorted(limits, weight.float().contiguous(), right=True)))
    if value is not None:
        render_(value, table, codes)
    return codes


def render_(value: Tensor, table: Tensor, codes: Tensor) -> Tensor:
    """Set `value` (groups, n) to the entries of `table` (groups, k) that `codes` (groups, n) name."""
    if len(table) > 1:
        return value.copy_(table.gather(1, codes.long()))
    look_up_(value.view(-1), table[0], codes.view(-1))
    return value


@dataclass(frozen=True, kw_only=True, eq=False)
class _Borders:
    """The borders (k - 1,) of one sorted table, the order (k,) of its entries, and the cells over them."""

    limits: NDArray[np.float32]
    order: NDArray[np.uint8]
    cells: Cells

    def codes(self) -> Tensor:
        """The code of each cell (CELLS,) uint8, with MARK where a border falls, or comes within the rounding of the cells."""
        crossed = self.limits.astype(np.float64) * self.cells.scale + self.cells.offset
        first, last = (np.rint(crossed + shift).astype(int).tolist() for shift in (-self.cells.slack, self.cells.slack))
        runs = zip([0, *last], [*last, CELLS], self.order.tolist(), strict=True)
        marked = bytearray(b"".join(bytes((entry,)) * (end - begin) for begin, end, entry in runs))
        for begin, end in zip(first, last, strict=True):
            for cell in range(begin, end + 1):
                marked[cell] |= MARK
        return torch.frombuffer(marked, dtype=torch.uint8)


def _borders_of(weight: Tensor, table: Tensor) -> _Borders | None:
    """Borders with cells, where one table of at most 128 entries, with a sane range, stands on many float32 weights on the CPU."""
    if len(table) > 1 or not 2 <= table.shape[1] <= MARK or weight.numel() < PAYS_FROM:
        return None
    if not (weight.dtype == table.dtype == torch.float32 and weight.device.type == "cpu"):
        return None
    limits, order = _borders(table[0].numpy())
    cells = Cells.over(float(limits[0]), float(limits[-1]), CELLS, SPARE)
    return None if cells is None else _Borders(limits=limits, order=order.astype(np.uint8), cells=cells)


def _borders(table: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`borders` of one small table, at a third of the time."""
    order = np.argsort(table, kind="stable")
    ordered = table[order]
    lower, upper = ordered[:-1], ordered[1:]
    middle = ((lower.astype(np.float64) + upper) / 2).astype(np.float32)
    return np.where(middle > lower, middle, upper), order


def _by_cells(codes: Tensor, weight: Tensor, table: Tensor, found: _Borders, value: Tensor | None) -> None:
    size = min(len(weight), torch.get_num_threads() * PER_THREAD)
    marked = found.codes()
    rest = torch.empty(size) if value is None else None
    paired = value is not None and in_pairs(codes, len(table))
    pairs, buffer = (pair_table(table), torch.empty(size // 2, dtype=torch.int32)) if paired else (table, None)
    for part, rows in blocks(len(weight)):
        place = value[part] if value is not None else rest[: part.stop - part.start]  # type: ignore[index]
        take_(codes[part], marked, found.cells.of_(place, weight[part]), rows)
        if buffer is not None and len(place) > 1:
            take_(place.view(torch.float64), pairs, pairs_(buffer, codes[part]).bitwise_and_(0x7F7F), rows)
        elif value is not None:
            torch.index_select(table, 0, (codes[part] & ~MARK).int(), out=place)
    _search_marked_(codes, weight, table, found, value)


def _search_marked_(codes: Tensor, weight: Tensor, table: Tensor, found: _Borders, value: Tensor | None) -> None:
    """Search exactly for the weights whose codes carry a mark; eight codes are looked at together."""
    whole = len(codes) // 8 * 8
    words = (codes[:whole].view(torch.int64) & WORDS).nonzero().view(-1).numpy()
    which, place = (codes[:whole].view(-1, 8).numpy()[words] >= MARK).nonzero()
    some = np.concatenate((words[which] * 8 + place, np.arange(whole, len(codes))))
    nearest = found.order[np.searchsorted(found.limits, weight.numpy()[some], side="right")]
    codes.numpy()[some] = nearest
    if value is not None:
        value.numpy()[some] = table.numpy()[nearest]
