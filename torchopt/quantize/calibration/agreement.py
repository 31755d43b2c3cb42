"""How near a rounded network is to the float one, output by output, and which of several changes make it no worse.

    error     mean (a − b)²        a float, b rounded

Every tensor among the outputs counts for itself: beside an output of large values, a wrong one of small values would not show. Entries
that are not finite (a mask of −∞) must be the same on both sides. Whole numbers and truth values have no distance: what counts is the
share of the entries that differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from torchopt.network.proof import flat

Item = TypeVar("Item")


def tensors(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors among the outputs of a network, of any structure, complex ones as pairs of reals.

    Example:
        >>> [tuple(t.shape) for t in tensors({"a": torch.ones(2), "b": (None, torch.ones(3))})]
        [(2,), (3,)]
    """
    found = [t.detach() for t in flat(outputs) if isinstance(t, torch.Tensor)]
    return [torch.view_as_real(t) if t.is_complex() else t for t in found]


def run_all(run: Callable[..., Any], calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[list[torch.Tensor]]:
    """Return the outputs of every call.

    Example:
        >>> run_all(torch.neg, [((torch.ones(1),), {})])
        [[tensor([-1.])]]
    """
    return [tensors(run(*args, **kwargs)) for args, kwargs in calls]


def errors(exact: Sequence[Sequence[torch.Tensor]], rounded: Sequence[Sequence[torch.Tensor]]) -> list[float]:
    """Return the mean squared error of each output over all calls, of whole numbers the share that differs.

    Example:
        >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([3])
        >>> errors([[a, b], [a, b]], [[a, b], [a + 2, b]])
        [2.0, 0.0]
    """
    count = max(map(len, exact), default=0)
    sums = [0.0] * count
    sizes = [0] * count
    for one, other in zip(exact, rounded, strict=True):
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            total, size = _error(a, b)
            sums[place], sizes[place] = sums[place] + total, sizes[place] + size
    return [total / max(size, 1) for total, size in zip(sums, sizes, strict=True)]


def largest_part(items: Sequence[Item], stands: Callable[[list[Item]], bool], trials: int = 64) -> list[Item]:
    """Return as many of the changes as together stand a test, found by halving; those that it could not reach are left out.

    Args:
        items: changes, each of which can be made or left.
        stands: makes these changes and no others, and says whether the result is right.
        trials: how often it may be asked.

    Example:
        >>> largest_part([1, 2, 3, 4, 5], lambda chosen: 4 not in chosen)
        [1, 2, 3, 5]
    """
    asked = 0

    def search(sure: list[Item], part: list[Item]) -> list[Item]:
        nonlocal asked
        if not part or asked >= trials:
            return sure
        asked += 1
        if stands(sure + part):
            return sure + part
        if len(part) == 1:
            return sure
        middle = len(part) // 2
        return search(search(sure, part[:middle]), part[middle:])

    return search([], list(items))


def _error(a: torch.Tensor, b: torch.Tensor) -> tuple[float, int]:
    """The sum of an output's errors in one call, and over how many entries."""
    if a.shape != b.shape:
        return math.inf, 1
    if not a.is_floating_point():
        return float((a != b).double().sum()), a.numel()
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return math.inf, 1
    return float(torch.where(finite, a - b, 0.0).double().square().sum()), int(finite.sum())
