"""The nearest entry of a table for every weight, exactly, at about one nanosecond a weight.

    c = argmin_j |w - T[j]| = number of borders ≤ w        borders = midpoints of the sorted table

A binary search costs 20 ns a weight. Here w is mapped to one of 16,384 equal cells between the outermost borders, and a look-up table of
one byte a cell gives the code. The few cells that a border crosses are marked with the high bit, and their weights are searched exactly.
Work goes in pieces that stay in the processor's cache, through two small buffers, so nothing of the model's size is allocated.
"""

from __future__ import annotations

import torch
from torch import Tensor

CELLS = 1 << 14  # one byte each: the look-up table stays in the first-level cache
PIECE = 1 << 17  # weights at a time: 1 MB of buffers, the second-level cache
MARK = 0x80  # on codes of cells that a border crosses; so at most 128 entries take this path
WORDS = -0x7F7F7F7F7F7F7F80  # 0x8080808080808080 as int64: eight marks at once


def borders(table: Tensor) -> tuple[Tensor, Tensor]:
    """Sort tables (groups, k) and return (their borders (groups, k - 1), the order of the entries (groups, k) int64).

    A border lies above the lower of its two entries and not above the upper one, so an entry is always nearest to itself; of two
    equal entries the last is used.
    """
    ordered, order = table.detach().float().sort(dim=1, stable=True)
    lower, upper = ordered[:, :-1], ordered[:, 1:]
    middle = ((lower.double() + upper.double()) / 2).float()
    return torch.where(middle > lower, middle, upper), order


def assign_(codes: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Set `codes` to the nearest entries.

    Args:
        codes: (groups, n) uint8, overwritten.
        weight: (groups, n) floating.
        table: (groups, k) floating, k ≤ 256.

    Returns:
        `codes`.

    Example:
        >>> assign_(torch.empty(1, 3, dtype=torch.uint8), torch.tensor([[0.1, 0.9, 2.0]]), torch.tensor([[1.0, 0.0]])).tolist()
        [[1, 0, 0]]
    """
    weight = weight.detach()
    limits, order = borders(table)
    k = table.shape[1]
    if k == 1:
        return codes.zero_()
    span = float(limits[0, -1] - limits[0, 0])
    by_cells = len(table) == 1 and k <= MARK and weight.dtype == torch.float32 and weight.device.type == "cpu"
    if by_cells and weight.numel() > CELLS and CELLS / max(span, 1e-38) < 1e37:
        return _by_cells(codes, weight, limits[0], order[0].to(torch.uint8))
    if len(table) == 1:
        position = torch.bucketize(weight.float(), limits[0], right=True)
        return codes.copy_(order[0].to(torch.uint8)[position])
    position = torch.searchsorted(limits, weight.float(), right=True)
    return codes.copy_(order.gather(1, position))


def _by_cells(codes: Tensor, weight: Tensor, limits: Tensor, order: Tensor) -> Tensor:
    flat, out = weight.reshape(-1), codes.view(-1)
    low, high = float(limits[0]), float(limits[-1])
    scale = (CELLS - 3) / (high - low) if high > low else 1.0
    marked = _marked_codes(limits, order, low, scale)
    place = torch.empty(min(PIECE, flat.numel()))
    cell = torch.empty(min(PIECE, flat.numel()), dtype=torch.int32)
    for begin in range(0, flat.numel(), PIECE):
        piece, target = flat[begin : begin + PIECE], out[begin : begin + PIECE]
        index = _cells(piece, low, scale, place[: len(piece)], cell[: len(piece)])
        torch.index_select(marked, 0, index, out=target)
        _search_marked_(target, piece, limits, order)
    return codes


def _cells(piece: Tensor, low: float, scale: float, place: Tensor, cell: Tensor) -> Tensor:
    """The cell of each weight: 0 below the first border, CELLS - 1 above the last; ascending with the weight."""
    torch.sub(piece, low, out=place)
    place.mul_(scale).add_(1.0).clamp_(0, CELLS - 1)
    return cell.copy_(place)


def _marked_codes(limits: Tensor, order: Tensor, low: float, scale: float) -> Tensor:
    """The code of each cell (CELLS,) uint8, with MARK where a border falls into it."""
    crossed = _cells(limits, low, scale, torch.empty_like(limits), torch.empty(len(limits), dtype=torch.int32)).long()
    before = torch.zeros(CELLS, dtype=torch.int64).index_add_(0, crossed, torch.ones_like(crossed)).cumsum(0)
    marked = order[before]
    marked[crossed] |= MARK
    return marked


def _search_marked_(codes: Tensor, piece: Tensor, limits: Tensor, order: Tensor) -> None:
    """Search exactly for the weights whose codes carry a mark."""
    whole = len(codes) // 8 * 8
    words = (codes[:whole].view(torch.int64) & WORDS).nonzero().view(-1, 1)
    some = (words * 8 + torch.arange(8)).view(-1)
    some = torch.cat((some, torch.arange(whole, len(codes))))
    codes[some] = order[torch.bucketize(piece[some], limits, right=True)]
