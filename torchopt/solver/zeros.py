"""Which weights go, and what those that stay become.

    score  w² / [H⁻¹]_kk        what the error grows by when w_k goes and all others take it up (optimal brain surgeon)
    stay   min over the kept    of tr (W − Ŵ) H (W − Ŵ)ᵀ, by conjugate gradients in all rows at once

Zeros chosen all at once are chosen without what the others take up; so they are in stages, and the scores are those of the weights
that the last stage left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchopt.solver.sweep import factor

Choose = Callable[[Tensor, float], Tensor]  # scores (groups, rows, n), the stage's share from 0 to 1 → which stay
STAGES = 4
STEPS = 60
ENOUGH = 1e-4  # of the first slope's length


def scores(w: Tensor, h: Tensor) -> Tensor:
    """Return what the error grows by when each weight goes alone, in the order of the weights."""
    upper = factor(h)
    return w.square() / upper.square().sum(1)[:, None]  # the diagonal of H⁻¹ = UᵀU


def kept_best(w: Tensor, h: Tensor, keep: Tensor, start: Tensor | None = None, steps: int = STEPS) -> Tensor:
    """Return Ŵ with the least error, 0 where `keep` is False.

    Args:
        w: (groups, rows, n).
        h: (groups, n, n), damped.
        keep: bool, of the shape of w.
        start: where to begin; the kept weights where none is given.
        steps: of conjugate gradients, at most.

    Example:
        >>> h = torch.tensor([[[1.0, 1.0], [1.0, 1.01]]])
        >>> kept_best(torch.ones(1, 1, 2), h, torch.tensor([[[True, False]]])).tolist()
        [[[2.0, 0.0]]]
    """
    x = (w if start is None else start) * keep
    inverse = keep / torch.diagonal(h, dim1=1, dim2=2)[:, None]  # Jacobi's preconditioner
    residual = ((w - x) @ h) * keep
    z = residual * inverse
    direction, size = z, (residual * z).sum(2, keepdim=True)
    enough = size * ENOUGH**2
    for _ in range(steps):
        ahead = (direction @ h) * keep
        rate = size / (direction * ahead).sum(2, keepdim=True).clamp(min=1e-37)
        rate = torch.where(size > enough, rate, 0.0)
        if not bool(rate.any()):
            break
        x = x + rate * direction
        residual = residual - rate * ahead
        z = residual * inverse
        fresh = (residual * z).sum(2, keepdim=True)
        direction, size = z + fresh / size.clamp(min=1e-37) * direction, fresh
    return x


def choose_zeros(w: Tensor, h: Tensor, keep: Tensor, choose: Choose) -> Tensor:
    """Return which weights stay, chosen in stages; what `keep` has at False never comes back."""
    given = w * keep
    for stage in range(1, STAGES + 1):
        marks = torch.where(keep, scores(given, h), -torch.inf)
        keep = choose(marks, stage / STAGES) & keep
        given = kept_best(w, h, keep, given, STEPS // 4)
    return keep
