"""The two plain observers: the extremes of all batches, and their exponential moving average.

    minmax           lo ← min(lo, min x)              hi ← max(hi, max x)
    moving average   lo ← lo + c·(min x − lo)         starting from the first batch, not from a constant

The moving average forgets outliers of single batches (Jacob et al. 2018, arXiv:1712.05877, §3.1).
"""

from __future__ import annotations

import torch
from torch import nn

MOMENTUM = 0.1  # weight of the newest calibration batch; about the last ten batches count


class Observer(nn.Module):
    """Remembers a tensor's distribution; `observe` each piece of a batch, `end_batch` after the last, in the end ask `range`."""

    whole = False  # True where a batch is one call, in the order of its axes

    def observe(self, x: torch.Tensor) -> None:
        """Take in a batch or a piece of one, a float tensor of any shape."""
        raise NotImplementedError

    def end_batch(self) -> None:
        """A batch is complete; matters to observers that treat batches as units."""

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the smallest and the largest value to represent, 0-d float32 tensors."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all batches."""
        raise NotImplementedError


class MinMax(Observer):
    """The extremes of everything seen.

    Example:
        >>> seen = MinMax()
        >>> for batch in ([-1.0, 1.0], [-5.0, 0.0]):
        ...     seen.observe(torch.tensor(batch))
        >>> seen.range()
        (tensor(-5.), tensor(1.))
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, *, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(torch.inf, dtype=torch.float32), persistent=persistent)
        self.register_buffer("high", torch.tensor(-torch.inf, dtype=torch.float32), persistent=persistent)

    def observe(self, x: torch.Tensor) -> None:
        """Widen the range to hold `x`."""
        low, high = torch.aminmax(x)
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (low, high)."""
        return self.low.clone(), self.high.clone()

    def reset(self) -> None:
        """Forget all batches."""
        self.low.fill_(torch.inf)
        self.high.fill_(-torch.inf)


class MovingAverage(MinMax):
    """The moving average of the batches' extremes.

    Example:
        >>> seen = MovingAverage()
        >>> for batch in ([-1.0, 1.0], [0.0, 0.0]):
        ...     seen.observe(torch.tensor(batch))
        ...     seen.end_batch()
        >>> seen.range()
        (tensor(-0.9000), tensor(0.9000))
    """

    def __init__(self) -> None:
        super().__init__()
        self.batch = MinMax(persistent=False)

    def observe(self, x: torch.Tensor) -> None:
        """Widen the range of the current batch to hold `x`."""
        self.batch.observe(x)

    def end_batch(self) -> None:
        """Move the range towards that of the batch; the first one sets it."""
        low, high = self.batch.range()
        if bool(low > high):
            return  # nothing was seen
        first = self.low > self.high
        self.low.copy_(torch.where(first, low, torch.lerp(self.low, low, MOMENTUM)))
        self.high.copy_(torch.where(first, high, torch.lerp(self.high, high, MOMENTUM)))
        self.batch.reset()

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self.batch.reset()
