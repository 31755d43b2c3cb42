"""Observers that remember the distribution of an activation, and choose the range from it when calibration ends.

All keep the same streaming histogram and differ only in the choice: cut a share of the values (percentile), the least mean squared
error ("mse", also called "histogram", as in torch.ao), or the least Kullback-Leibler divergence (entropy).
"""

from __future__ import annotations

import torch

from torchopt.quantize.observers.histogram import StreamingHistogram
from torchopt.quantize.observers.minmax import Observer
from torchopt.quantize.observers.ranges import Range, entropy_range, mse_range, percentile_range


class Distribution(Observer):
    """What the three have in common: the histogram."""

    def __init__(self) -> None:
        super().__init__()
        self.histogram = StreamingHistogram()

    def observe(self, x: torch.Tensor) -> None:
        """Count the values of `x`; a batch with NaN or infinity makes the range so too, which calibration refuses."""
        self.histogram.observe(x)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range chosen; infinite where nothing was seen."""
        if self.histogram.empty or bool(self.histogram.low.isnan()):
            return torch.tensor(torch.inf, dtype=torch.float32), torch.tensor(-torch.inf, dtype=torch.float32)
        device = self.histogram.low.device
        low, high = self.choose()
        return torch.tensor(low, dtype=torch.float32, device=device), torch.tensor(high, dtype=torch.float32, device=device)

    def choose(self) -> Range:
        """Return (low, high)."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all batches."""
        for buffer in self.histogram.buffers():
            buffer.zero_()


class Percentile(Distribution):
    """The range that holds 99.99 % of the values.

    Example:
        >>> seen = Percentile()
        >>> seen.observe(torch.cat([torch.arange(100_000.0), torch.tensor([1e7])]))
        >>> bool(seen.range()[1] < 1e6)
        True
    """

    def choose(self) -> Range:
        """Cut one value in ten thousand."""
        return percentile_range(self.histogram)


class LeastSquares(Distribution):
    """The range with the least mean squared error of rounding and clipping, at `levels` steps."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def choose(self) -> Range:
        """Search both ends."""
        return mse_range(self.histogram, self.levels)


class Entropy(LeastSquares):
    """The range whose rounded distribution diverges least from the true one, at `levels` steps."""

    def choose(self) -> Range:
        """Search both ends."""
        return entropy_range(self.histogram, self.levels)
