"""The nearest entry of a table for every weight, exactly, at about one nanosecond a weight.

    c = argmin_j |w - T[j]| = number of borders ≤ w        borders = midpoints of the sorted table

A binary search costs 20 ns a weight. Here w is mapped to one of 16,384 equal cells between the outermost borders, and a look-up table of
one byte a cell gives the code (another gives ŵ itself). The few cells near a border are marked with the high bit, and their weights are
searched exactly afterwards. Work goes in pieces that stay in cache, so nothing of the model's size is allocated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchopt.cluster.pieces import PIECE, in_pieces

CELLS = 1 << 14  # one byte each: the look-up table stays in the first-level cache
MARK = 0x80  # on codes of cells near a border; so at most 128 entries take this path
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
    limits, order = borders(table)
    if _cells_apply(weight, table, limits):
        return _by_cells(codes, weight.reshape(-1), table[0], limits[0], order[0], value)
    if len(table) == 1:
        codes.copy_(order[0].to(torch.uint8)[torch.bucketize(weight.float(), limits[0], right=True)])
    else:
        codes.copy_(order.gather(1, torch.searchsorted(limits, weight.float().contiguous(), right=True)))
    if value is not None:
        look_up_(value, table, codes)
    return codes


def look_up_(value: Tensor, table: Tensor, codes: Tensor) -> Tensor:
    """Set `value` (groups, n) to the entries of `table` (groups, k) that `codes` (groups, n) name."""
    if len(table) > 1:
        return value.copy_(table.gather(1, codes.long()))
    entries, flat, out = table.view(-1), codes.view(-1), value.view(-1)

    def work(begins: range) -> None:
        index = torch.empty(PIECE, dtype=torch.int32, device=codes.device)
        for begin in begins:
            piece = flat[begin : begin + PIECE]
            torch.index_select(entries, 0, index[: len(piece)].copy_(piece), out=out[begin : begin + PIECE])

    in_pieces(len(flat), work)
    return value


def _cells_apply(weight: Tensor, table: Tensor, limits: Tensor) -> bool:
    """True where one table of at most 128 entries, with a sane range, stands on many float32 weights on the CPU."""
    if len(table) > 1 or not 2 <= table.shape[1] <= MARK or weight.numel() < CELLS:
        return False
    if not (weight.dtype == table.dtype == torch.float32 and weight.device.type == "cpu"):
        return False
    return 1e-30 < float(limits[0, -1] - limits[0, 0]) < 1e30


def _by_cells(codes: Tensor, weight: Tensor, table: Tensor, limits: Tensor, order: Tensor, value: Tensor | None) -> Tensor:
    scale = (CELLS - 5) / float(limits[-1] - limits[0])  # the outer cells, and their neighbours' marks, stay free of borders
    offset = torch.tensor(2.0 - float(limits[0]) * scale)
    marked = _marked_codes(limits, order, offset, scale)
    entries = table[(marked & ~MARK).long()]
    out, rendered = codes.view(-1), None if value is None else value.view(-1)

    def work(begins: range) -> None:
        place, cell = torch.empty(PIECE), torch.empty(PIECE, dtype=torch.int32)
        for begin in begins:
            piece = weight[begin : begin + PIECE]
            index = _cells(piece, offset, scale, place[: len(piece)], cell[: len(piece)])
            torch.index_select(marked, 0, index, out=out[begin : begin + PIECE])
            if rendered is not None:
                torch.index_select(entries, 0, index, out=rendered[begin : begin + PIECE])

    in_pieces(len(weight), work)
    _search_marked_(out, weight, table, limits, order, rendered)
    return codes


def _cells(piece: Tensor, offset: Tensor, scale: float, place: Tensor, cell: Tensor) -> Tensor:
    """The cell of each weight: 0 below the first border, CELLS - 1 above the last; ascending with the weight."""
    torch.add(offset, piece, alpha=scale, out=place)
    return cell.copy_(place.clamp_(0, CELLS - 1))


def _marked_codes(limits: Tensor, order: Tensor, offset: Tensor, scale: float) -> Tensor:
    """The code of each cell (CELLS,) uint8, with MARK where a border falls, or comes within the float32 rounding of `_cells`."""
    crossed = limits.double() * scale + offset
    before = torch.bincount(crossed.long(), minlength=CELLS).cumsum(0)
    marked = order.to(torch.uint8)[before]
    for rounding in (-0.01, 0.01):
        marked[(crossed + rounding).long()] |= MARK
    return marked


def _search_marked_(codes: Tensor, weight: Tensor, table: Tensor, limits: Tensor, order: Tensor, value: Tensor | None) -> None:
    """Search exactly for the weights whose codes carry a mark; eight codes are looked at together."""
    whole = len(codes) // 8 * 8
    words = (codes[:whole].view(torch.int64) & WORDS).nonzero().view(-1, 1)
    near = (words * 8 + torch.arange(8)).view(-1)
    some = torch.cat((near[codes[near] >= MARK], torch.arange(whole, len(codes))))
    found = order[torch.bucketize(weight[some], limits, right=True)]
    codes[some] = found.to(torch.uint8)
    if value is not None:
        value[some] = table[found]
