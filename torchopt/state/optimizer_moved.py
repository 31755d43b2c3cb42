"""Whether an optimizer has moved a network's weights since the last step: their version counters tell, as each write raises them.

A step is counted when `torchopt.step` is called. Where gradients are there and no weight has changed, no optimizer has stepped: gradients
accumulate, or the optimizer holds the Parameters of another copy. Writes through `.data` leave versions alone, so a few values are kept
beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

FEW = 64  # values of one weight


class Moved:
    """What was seen of a network's weights at the last step; a copy of it has seen nothing."""

    def __init__(self) -> None:
        self.versions: tuple[tuple[int, int], ...] = ()
        self.values: Tensor | None = None
        self.said: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Moved:
        return Moved()

    def __reduce__(self) -> tuple[type[Moved], tuple[()]]:
        return Moved, ()

    def remember(self, parameters: Iterable[nn.Parameter]) -> None:
        """See the weights as they are now."""
        trained = _trained(parameters)
        self.versions = _versions(trained)
        self.values = _values(trained)

    def still(self, parameters: Iterable[nn.Parameter]) -> bool:
        """True where the weights are those of the last time; False where there was none.

        Example:
            >>> weight, moved = nn.Parameter(torch.ones(2)), Moved()
            >>> moved.remember([weight])
            >>> moved.still([weight])
            True
            >>> torch.optim.SGD([weight], lr=0.0).step()  # no gradient: nothing is written
            >>> weight.data.mul_(2.0), moved.still([weight])
            (tensor([2., 2.]), False)
        """
        trained = _trained(parameters)
        if not self.versions or self.versions != _versions(trained):
            return False
        now = _values(trained)
        return self.values is not None and now is not None and torch.equal(self.values, now)

    def once(self, what: str) -> bool:
        """True the first time that something is to be said."""
        new = what not in self.said
        self.said.add(what)
        return new


def has_finite_gradients(parameters: Iterable[nn.Parameter]) -> bool:
    """True where some weight has a gradient, and none holds NaN or infinity: mixed precision leaves such steps out."""
    gradients = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
    return bool(gradients) and all(bool(torch.isfinite(g).all()) for g in gradients)


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad and not p.is_inference()]


def _versions(trained: list[nn.Parameter]) -> tuple[tuple[int, int], ...]:
    return tuple((id(p), p._version) for p in trained)


def _values(trained: list[nn.Parameter]) -> Tensor | None:
    """A few values of the last weight that has a gradient (those of a head always have), or of the last one."""
    chosen = next((p for p in reversed(trained) if p.grad is not None), trained[-1] if trained else None)
    return None if chosen is None or chosen.is_meta else chosen.detach().flatten()[:FEW].clone()
