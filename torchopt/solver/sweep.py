"""One input weight after the other is fixed in all rows at once, and its error is taken up by those not yet fixed.

    H⁻¹ = UᵀU        e_k = (w_k − ŵ_k) / U_kk        w_j ← w_j − e_k·U_kj  for j > k        error = Σ e_k²

(Frantar et al. 2023, arXiv:2210.17323; Frantar and Alistarh 2022, arXiv:2208.11580.) The inputs that weigh most come first. Since
the errors e_k add up to the error of the row, a row of few weights is searched: at each column the `BEAMS` best beginnings go on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchopt.errors import ModelError
from torchopt.solver.values import Values

DAMPING = 0.01  # over the mean of H's diagonal
DEAD = 1e-30  # a mean below it is that of inputs that are always 0
TRIES = 8  # each with ten times the damping
BLOCK = 32  # columns after which those behind are brought up to date, in one product
BEAMS = 24
SHORT = 32  # rows of at most so many weights are searched


def damped(h: Tensor, damping: float = DAMPING) -> Tensor:
    """Return H with a part of its mean diagonal added to its diagonal, (groups, n, n); inputs that are always 0 get that alone.

    Where all inputs of a group are 0, nothing says which weight counts: each counts 1.
    """
    mean = torch.diagonal(h, dim1=1, dim2=2).mean(1)
    size = torch.where(mean > DEAD, mean, 1 / damping if damping else 1.0)
    return h + damping * size[:, None, None] * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)


def factor(h: Tensor) -> Tensor:
    """Return U of the inverse of a damped H, upper triangular, in the order of its columns.

    Raises:
        ModelError: no damping makes it positive.
    """
    damping = 0.0
    for _ in range(TRIES):
        lower, failed = torch.linalg.cholesky_ex(damped(h, damping) if damping else h)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                return upper
        damping = max(DAMPING, 10 * damping)
    raise ModelError(f"what it reads has no positive moments, also with {damping:g} of their mean added; give other data")


def sweep(w: Tensor, h: Tensor, values: Values, keep: Tensor | None = None) -> Tensor:
    """Return Ŵ (groups, rows, n), each of its entries one of `values`, or 0 where `keep` is False.

    Args:
        w: (groups, rows, n).
        h: (groups, n, n), damped.
        values: which values there are.
        keep: bool, of the shape of w.
    """
    order = torch.diagonal(h, dim1=1, dim2=2).mean(0).argsort(descending=True)
    upper = factor(h[:, order][:, :, order])
    left = w[:, :, order]
    kept = None if keep is None else keep[:, :, order]
    search = _searched if w.shape[2] <= SHORT else _swept
    found = search(left, upper, values, kept)
    result = torch.empty_like(found)
    result[:, :, order] = found
    return result


def _swept(left: Tensor, upper: Tensor, values: Values, keep: Tensor | None) -> Tensor:
    left, count = left.clone(), left.shape[2]
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        errors = torch.empty_like(left[:, :, start:end])
        for k in range(start, end):
            value = values.nearest(left[:, :, k : k + 1])
            if keep is not None:
                value = value * keep[:, :, k : k + 1]
            error = (left[:, :, k : k + 1] - value) / upper[:, k, k, None, None]
            left[:, :, k + 1 : end] -= error * upper[:, None, k, k + 1 : end]
            left[:, :, k : k + 1] = value
            errors[:, :, k - start : k - start + 1] = error
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    return left


def _searched(left: Tensor, upper: Tensor, values: Values, keep: Tensor | None) -> Tensor:
    """The same with many beginnings a row: (groups, rows, beams, n)."""
    groups, rows, count = left.shape
    state, cost = left[:, :, None], torch.zeros(groups, rows, 1, dtype=left.dtype, device=left.device)
    for k in range(count):
        offered, there = values.around(state[..., k])  # (groups, rows, beams, around)
        if keep is not None:
            gone = ~keep[:, :, k, None, None]
            first = torch.zeros(offered.shape[-1], dtype=torch.bool, device=left.device)
            first[0] = True
            offered, there = offered.masked_fill(gone, 0.0), torch.where(gone, first, there)
        error = (state[..., k, None] - offered) / upper[:, k, k, None, None, None]
        total = (cost[..., None] + error.square()).masked_fill(~there, torch.inf).flatten(2)
        cost, chosen = total.topk(min(BEAMS, total.shape[2]), 2, largest=False)
        beam = chosen // offered.shape[-1]
        state = state.gather(2, beam[..., None].expand(*beam.shape, count))
        step = error.flatten(2).gather(2, chosen).nan_to_num()
        state[..., k] = offered.flatten(2).gather(2, chosen)
        state[..., k + 1 :] -= step[..., None] * upper[:, None, None, k, k + 1 :]
    return state[:, :, 0]
