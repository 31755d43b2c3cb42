"""The nearest entry of a table for every weight, at little more than the time that it takes to read and write them.

    c = argmin_j |w - T[j]| = number of borders ≤ w        borders = midpoints of the sorted table

A binary search costs 20 ns a weight. Here w is mapped to one of 65,536 equal cells between the outermost borders (`cells`), and a
look-up table of one byte a cell gives the code. The borders are rounded to the cells: a weight that lies in the cell of one may go to
the entry on the other side of it, farther by a cell at most. Where entries lie closer than 16 cells, and for few weights, every weight
is searched exactly. The buffer that takes ŵ holds the cells on the way, so nothing of the model's size is allocated.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchopt.cluster.blocks import block_of, blocks, in_pairs, look_up_, look_up_pairs_, pair_table, take_, whole_blocks
from torchopt.cluster.tables.cells import Cells
from torchopt.fast.buffers import scratch

COUNT = 1 << 16
APART = 16  # cells between neighbouring entries, at least
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
    by_cell = _codes_by_cell(weight, table)
    if by_cell is not None:
        _by_cells(codes.view(-1), weight.reshape(-1), table, *by_cell, None if value is None else value.view(-1))
        return codes
    _search(codes, weight, table)
    if value is not None:
        render_(value, table, codes)
    return codes


def render_(value: Tensor, table: Tensor, codes: Tensor) -> Tensor:
    """Set `value` (groups, n) to the entries of `table` (groups, k) that `codes` (groups, n) name."""
    if len(table) > 1:
        return value.copy_(table.gather(1, codes.long()))
    look_up_(value.view(-1), table[0], codes.view(-1))
    return value


def _search(codes: Tensor, weight: Tensor, table: Tensor) -> None:
    limits, order = borders(table)
    if len(table) == 1:
        codes.copy_(order[0].to(torch.uint8)[torch.bucketize(weight.float(), limits[0], right=True)])
    else:
        codes.copy_(order.gather(1, torch.searchsorted(limits, weight.float().contiguous(), right=True)))


def _codes_by_cell(weight: Tensor, table: Tensor) -> tuple[Cells, Tensor] | None:
    """Cells and the code of each (COUNT,) uint8, where one table, its entries well apart, stands on many float32 weights on the CPU."""
    if len(table) > 1 or table.shape[1] < 3 or weight.numel() < PAYS_FROM:
        return None
    if not (weight.dtype == table.dtype == torch.float32 and weight.device.type == "cpu"):
        return None
    entries: NDArray[np.float32] = table[0].numpy()
    order = np.argsort(entries, kind="stable")
    ordered = entries[order].astype(np.float64)
    limits = (ordered[1:] + ordered[:-1]) / 2
    cells = Cells.over(float(limits[0]), float(limits[-1]), COUNT, spare=1)
    if cells is None or float(np.diff(ordered).min()) * cells.scale < APART:
        return None
    begins = np.rint(limits * cells.scale + cells.offset + 0.5).astype(np.int64).tolist()  # cell c begins at c - 1/2
    by_cell = scratch(COUNT, dtype=torch.uint8)
    memory = by_cell.numpy()
    for code, begin, end in zip(order.tolist(), [0, *begins], [*begins, COUNT]):
        memory[begin:end] = code
    return cells, by_cell


def _by_cells(codes: Tensor, weight: Tensor, table: Tensor, cells: Cells, by_cell: Tensor, value: Tensor | None) -> None:
    whole = whole_blocks(len(weight))
    rest = scratch(block_of(whole), dtype=torch.float32) if value is None else None
    paired = value is not None and in_pairs(codes, table.shape[1])
    both, buffer = (pair_table(table[0]), scratch(block_of(whole) // 2, dtype=torch.int32)) if paired else (None, None)
    for part in blocks(whole):
        place = value[part] if value is not None else rest[: part.stop - part.start]  # type: ignore[index]
        take_(codes[part], by_cell, cells.of_(place, weight[part]))
        if both is not None and buffer is not None:
            look_up_pairs_(place, both, codes[part], buffer)
        elif value is not None:
            torch.index_select(table[0], 0, codes[part].int(), out=place)
    if whole < len(weight):
        _search(codes[None, whole:], weight[None, whole:], table)
        if value is not None:
            value[whole:] = table[0][codes[whole:].int()]
