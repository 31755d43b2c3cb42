"""What a sweep leaves: each weight by itself to the value that is best beside all others, column after column, until none moves.

    ŵ_k ← nearest of  ŵ_k + (H(w − ŵ))_k / H_kk

Each move lowers the error, so the result is never above the start. Columns go in blocks: what the moves of a block change elsewhere is
one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchopt.solver.values import Values

ROUNDS = 4
BLOCK = 32  # columns


def errors(w: Tensor, given: Tensor, h: Tensor) -> Tensor:
    """Return the error of each row, (groups, rows)."""
    difference = w - given
    return ((difference @ h) * difference).sum(2)


def polish(w: Tensor, given: Tensor, h: Tensor, values: Values, keep: Tensor | None = None, rounds: int = ROUNDS) -> Tensor:
    """Return Ŵ with no more error than `given`, under the same constraint; arguments as for `sweep`."""
    given, slope = given.clone(), (w - given) @ h
    diagonal = torch.diagonal(h, dim1=1, dim2=2)[:, None]
    for _ in range(rounds):
        moved = False
        for start in range(0, w.shape[2], BLOCK):
            part = slice(start, start + BLOCK)
            now = given[:, :, part]
            fresh = _fresh(now, slope[:, :, part], h[:, part, part], diagonal[:, :, part], values, _part(keep, part))
            if fresh is not None:
                slope -= (fresh - now) @ h[:, part]
                given[:, :, part] = fresh
                moved = True
        if not moved:
            break
    return given


def _fresh(given: Tensor, slope: Tensor, h: Tensor, diagonal: Tensor, values: Values, keep: Tensor | None) -> Tensor | None:
    """The weights of some columns after each has moved, one column after the other; None where none does."""

    def best(now: Tensor, slope: Tensor, part: slice) -> Tensor:
        nearest = values.nearest(torch.addcdiv(now, slope, diagonal[:, :, part]))
        return nearest if keep is None else nearest * keep[:, :, part]

    wanting = (best(given, slope, slice(None)) != given).flatten(0, 1).any(0).nonzero().flatten().tolist()
    if not wanting:
        return None
    fresh, slope = given.clone(), slope.clone()
    for k in wanting:
        part = slice(k, k + 1)
        value = best(given[:, :, part], slope[:, :, part], part)
        slope -= (value - given[:, :, part]) * h[:, None, k]
        fresh[:, :, part] = value
    return fresh


def _part(keep: Tensor | None, columns: slice) -> Tensor | None:
    return None if keep is None else keep[:, :, columns]


def best_rows(w: Tensor, h: Tensor, *candidates: Tensor) -> Tensor:
    """Return, row by row, the candidate with the least error; of equal ones the first."""
    best, least = candidates[0], errors(w, candidates[0], h)
    for other in candidates[1:]:
        error = errors(w, other, h)
        better = error < least
        best, least = torch.where(better[..., None], other, best), torch.minimum(error, least)
    return best
