"""What a sweep leaves: each weight by itself to the value that is best beside all others, column after column, until none moves.

    ŵ_k ← nearest of  ŵ_k + (H(w − ŵ))_k / H_kk

Each move lowers the error, so the result is never above the start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchopt.solver.values import Values

ROUNDS = 4


def errors(w: Tensor, given: Tensor, h: Tensor) -> Tensor:
    """Return the error of each row, (groups, rows)."""
    difference = w - given
    return ((difference @ h) * difference).sum(2)


def polish(w: Tensor, given: Tensor, h: Tensor, values: Values, keep: Tensor | None = None, rounds: int = ROUNDS) -> Tensor:
    """Return Ŵ with no more error than `given`, under the same constraint; arguments as for `sweep`."""
    given = given.clone()
    slope = (w - given) @ h
    diagonal = torch.diagonal(h, dim1=1, dim2=2)
    for _ in range(rounds):
        moved = False
        for k in range(w.shape[2]):
            now = given[:, :, k : k + 1]
            best = values.nearest(now + slope[:, :, k : k + 1] / diagonal[:, None, k : k + 1])
            if keep is not None:
                best = best * keep[:, :, k : k + 1]
            step = best - now
            gain = 2 * step * slope[:, :, k : k + 1] - step.square() * diagonal[:, None, k : k + 1]
            step = torch.where(gain > 0, step, 0.0)
            if bool(step.any()):
                given[:, :, k : k + 1] = torch.where(step != 0, best, now)
                slope -= step * h[:, None, k]
                moved = True
        if not moved:
            break
    return given


def best_rows(w: Tensor, h: Tensor, *candidates: Tensor) -> Tensor:
    """Return, row by row, the candidate with the least error; of equal ones the first."""
    best, least = candidates[0], errors(w, candidates[0], h)
    for other in candidates[1:]:
        error = errors(w, other, h)
        better = error < least
        best, least = torch.where(better[..., None], other, best), torch.minimum(error, least)
    return best
