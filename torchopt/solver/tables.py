"""The table itself: K values for all rows, each row times its scale, fitted in closed form to where its members stand.

    T ← argmin Σ_o (w_o − s_o·Z_o·T)ᵀ H (w_o − s_o·Z_o·T)        Z_o = which weight of row o takes which value
    s_o ← w_oᵀ H ẑ_o / ẑ_oᵀ H ẑ_o                                ẑ_o = Z_o·T

Assignments and fits take turns (k-means under H). T and s start from k-means, weighed by H's diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORK = 4e9  # products that a fit may cost; beyond, it looks at some of the rows
LEAST = 1e-6  # of the mean diagonal, added: values that nothing takes stay where they were


def fitted(w: Tensor, codes: Tensor, scale: Tensor, h: Tensor, entries: Tensor, pinned: int | None = None) -> Tensor:
    """Return the K values with the least error for given codes.

    Args:
        w: (groups, rows, n).
        codes: which value each weight takes, int64, of that shape.
        scale: (groups, rows, 1).
        h: (groups, n, n).
        entries: the values now, (K,).
        pinned: the entry that stays what it is, or None.
    """
    groups, rows, n = w.shape
    count = len(entries)
    every = max(1, round(groups * rows * n * n * count / WORK))
    w, codes, scale = w[:, ::every], codes[:, ::every], scale[:, ::every]
    normal = torch.zeros(count, count, dtype=torch.float64, device=w.device)
    right = torch.zeros(count, dtype=torch.float64, device=w.device)
    step = max(1, int(2**22 / (groups * n * count)))
    for at in range(0, w.shape[1], step):
        part = slice(at, at + step)
        members = torch.nn.functional.one_hot(codes[:, part], count).to(w.dtype) * scale[:, part, :, None]
        seen = torch.einsum("gij,gojk->goik", h, members)
        normal += torch.einsum("goik,goil->kl", members, seen).double()
        right += torch.einsum("goik,goi->k", seen, w[:, part]).double()
    extra = LEAST * torch.diagonal(normal).mean().clamp(min=1e-30)
    normal += extra * torch.eye(count, dtype=torch.float64, device=w.device)
    right += extra * entries.double()
    free = torch.ones(count, dtype=torch.bool, device=w.device)
    result = entries.double().clone()
    if pinned is not None:
        free[pinned] = False
        right = right - normal[:, pinned] * result[pinned]
    result[free] = torch.linalg.solve(normal[free][:, free], right[free])
    return result.to(entries.dtype)


def scales(w: Tensor, units: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """Return the scale of each row with the least error for Ŵ = s·units; where that would not be positive, `scale`."""
    seen = units @ h
    over, under = (seen * w).sum(2, keepdim=True), (seen * units).sum(2, keepdim=True)
    best = over / under.clamp(min=1e-37)
    return torch.where((under > 1e-37) & (best > 0.25 * scale) & (best < 4 * scale), best, scale)
