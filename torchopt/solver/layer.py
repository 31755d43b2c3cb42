"""What is asked of the solver for one layer: round to given values, choose zeros, fit a table; each result compared with the nearest.

Rows are independent once the values are given. So the better of two answers is taken row by row, and no row is ever worse than rounding
to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.errors import ModelError
from torchopt.solver.polish import best_rows, errors, polish
from torchopt.solver.sweep import DAMPING, damped, sweep
from torchopt.solver.tables import fitted, scales
from torchopt.solver.values import Table, Values
from torchopt.solver.zeros import Choose, choose_zeros, kept_best

SMALL = 1 << 21  # entries of H up to which all is done in double precision
TURNS = 3  # of assignment and fit


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One layer as the solver sees it.

    Attributes:
        w: the weights, (groups, rows, n).
        h: E[x·xᵀ], (groups, n, n), damped.
        keep: False where a weight is 0 and stays 0, bool of the shape of w; None where none is.
    """

    w: Tensor
    h: Tensor
    keep: Tensor | None = None

    @classmethod
    def of(cls, w: Tensor, h: Tensor, keep: Tensor | None = None, damping: float = DAMPING) -> Problem:
        """Return the problem of weights and moments as they come, in the precision that it is worth.

        Raises:
            ModelError: one of them is not finite.
        """
        for what, tensor in (("its weights", w), ("what it reads", h)):
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"holds NaN or infinity in {what}; a trained model and clean data are needed")
        dtype = torch.float64 if h.numel() <= SMALL else torch.float32
        return cls(w=w.to(dtype), h=damped(h.to(dtype), damping), keep=keep)


def aimed(w: Tensor, h: Tensor, cross: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the weights that give, on what the layer reads now, most nearly what it gave on what it read before.

    min_W' E‖W·x − W'·x̂‖²:  W' = W·E[x·x̂ᵀ]·H⁻¹, as far as the samples show; in other directions they stay as they are.

    Args:
        w: (groups, rows, n).
        h: E[x̂·x̂ᵀ], (groups, n, n), damped.
        cross: E[x·x̂ᵀ], likewise, not damped.
        damping: of H.

    Example:
        >>> round(float(aimed(torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0))), 1)
        2.0
    """
    size = torch.diagonal(h, dim1=1, dim2=2).mean(1)
    extra = torch.where(
        cross.flatten(1).any(1), damping / (1 + damping) * size, size
    )  # what `damped` has added: all, to inputs of 0
    cross = cross + extra[:, None, None] * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return torch.linalg.solve(h, (w @ cross).transpose(1, 2)).transpose(1, 2)


def error(problem: Problem, given: Tensor) -> float:
    """Return the error of an answer, summed over rows."""
    return float(errors(problem.w, given.to(problem.w.dtype), problem.h).sum())


def round_to(problem: Problem, values: Values) -> Tensor:
    """Return Ŵ with each entry one of `values`, or 0 where the problem keeps zeros; no row has more error than the nearest values.

    Example:
        >>> from torchopt.solver.values import Grid
        >>> h = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
        >>> problem = Problem.of(torch.tensor([[[0.4, 0.4]]]), h)
        >>> sorted(round_to(problem, Grid(scale=torch.ones(1, 1, 1).double(), low=-1, high=1)).flatten().tolist())
        [0.0, 1.0]
    """
    w, h, keep = problem.w, problem.h, problem.keep
    nearest = values.nearest(w)
    nearest = nearest if keep is None else nearest * keep
    return best_rows(w, h, polish(w, sweep(w, h, values, keep), h, values, keep), nearest) + 0.0


def fix_zeros(problem: Problem, choose: Choose | None = None) -> tuple[Tensor, Tensor]:
    """Return Ŵ with zeros and the best of the other weights, and which stay.

    Args:
        problem: with the zeros that are given.
        choose: which of given scores stay; None where the zeros are chosen already.
    """
    keep = torch.ones_like(problem.w, dtype=torch.bool) if problem.keep is None else problem.keep
    if choose is not None:
        keep = choose_zeros(problem.w, problem.h, keep, choose)
    start = problem.w * keep
    found = kept_best(problem.w, problem.h, keep)
    return best_rows(problem.w, problem.h, found, start), keep


def fit_table(
    problem: Problem,
    entries: Tensor,
    scale: Tensor,
    *,
    pinned: bool = False,
    scaled: bool = False,
    settle: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the table, the scales of the rows, the codes and Ŵ that change the outputs least.

    Args:
        problem: the layer.
        entries: the values to begin with, (K,); one of them is 0 where `pinned`.
        scale: of each row, to begin with, (groups, rows, 1).
        pinned: 0 is among the values and stays.
        scaled: fit the scales, too.
        settle: what becomes of table and scales before the last assignment (a grid's integers); as they are where none is given.

    Returns:
        (K,) ascending, (groups, rows, 1), int64 and float of the weights' shape.
    """
    w, h, keep = problem.w, problem.h, problem.keep
    entries, scale = entries.to(w.dtype).sort()[0], scale.to(w.dtype)
    best: tuple[float, Tensor, Tensor] | None = None
    for turn in range(TURNS + 1):
        settled = (entries, scale) if settle is None else settle(entries, scale)
        table = _table(*settled, w)
        nearest = table.nearest(w) if keep is None else table.nearest(w) * keep
        given = best_rows(w, h, sweep(w, h, table, keep), nearest)
        total = error(problem, given)
        if best is None or total < best[0]:
            best = (total, *settled)
        if turn == TURNS:
            break
        codes = _table(entries, scale, w).codes(given)
        entries = _distinct(fitted(w, codes, scale, h, entries, _zero_of(entries) if pinned else None), entries)
        if scaled:
            units = entries[codes] if keep is None else entries[codes] * keep
            scale = scales(w, units, h, scale)
    _, entries, scale = best  # type: ignore[misc]
    table = _table(entries, scale, w)
    given = round_to(problem, table)
    return entries, scale, table.codes(given), given


def _table(entries: Tensor, scale: Tensor, w: Tensor) -> Table:
    return Table(entries=entries.expand(*w.shape[:2], len(entries)), scale=scale)


def _zero_of(entries: Tensor) -> int:
    return int(entries.abs().argmin())


def _distinct(fresh: Tensor, before: Tensor) -> Tensor:
    """The fitted values in order; where they are not finite, those of before."""
    return fresh.sort()[0] if bool(torch.isfinite(fresh).all()) else before
