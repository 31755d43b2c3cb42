"""A histogram that streams: any number of batches, constant memory, and the same result whatever their order.

Bins are multiples of a width that is a power of two, w = 2^e; bin i counts the values in [i·w, (i+1)·w). When data falls outside
the window, the width doubles and neighbours merge (i → ⌊i/2⌋), which loses nothing but resolution: the counts depend on the range
of all the data, not on which batch came first. ORT's percentile and entropy calibrators keep every activation instead, and need
hundreds of gigabytes (onnxruntime issue 10503).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

BINS = 2048
PIECE = 2**18  # values counted at a time: what is computed of them stays in the processor's cache, in memory that is used again
FINEST = -100  # exponent of a width whose inverse is a float32 too


class StreamingHistogram(nn.Module):
    """Counts of all values seen, in `BINS` bins, with their exact minimum and maximum.

    Buffers (shapes never change): `counts` float64 (BINS,), `low` and `high` float32 (), `exponent` and `first` int64 ():
    bin i covers [(first + i)·2^exponent, (first + i + 1)·2^exponent).

    Example:
        >>> histogram = StreamingHistogram()
        >>> histogram.observe(torch.tensor([0.0, 1.0, 1.0, 3.0]))
        >>> float(histogram.low), float(histogram.high), float(histogram.counts.sum())
        (0.0, 3.0, 4.0)
    """

    counts: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    exponent: torch.Tensor
    first: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("low", torch.tensor(0.0, dtype=torch.float32))
        self.register_buffer("high", torch.tensor(0.0, dtype=torch.float32))
        self.register_buffer("exponent", torch.zeros((), dtype=torch.int64))
        self.register_buffer("first", torch.zeros((), dtype=torch.int64))

    @property
    def empty(self) -> bool:
        """True until data was observed."""
        return bool(self.counts.sum() == 0)

    @torch.no_grad()
    def observe(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Count the values of `x`, floating point of any shape; each counts its weight (same shape), or 1.

        Where a value is NaN or infinite nothing is counted, and `low` is NaN from then on.
        """
        x = x.detach().float().flatten()
        low, high = torch.stack(torch.aminmax(x)).tolist()
        if bool(self.low.isnan()):
            return
        if not (math.isfinite(low) and math.isfinite(high)):
            self.low.fill_(torch.nan)
            return
        if not self.empty:
            low, high = min(low, float(self.low)), max(high, float(self.high))
        self._cover(low, high)
        width = 2.0 ** int(self.exponent)
        mass = itertools.repeat(None) if weights is None else weights.flatten().double().split(PIECE)
        for piece, weight in zip(x.split(PIECE), mass, strict=False):
            bins = piece.sub(int(self.first) * width).mul_(1 / width).int().clamp_(0, BINS - 1)
            self.counts += torch.bincount(bins, weight, BINS)  # a fourth of histc's time
        self.low.fill_(low)
        self.high.fill_(high)

    @property
    def centers(self) -> torch.Tensor:
        """The middle of each bin, float64 (BINS,); a bin that holds only zeros has its middle at zero."""
        width = 2.0 ** int(self.exponent)
        middle = (torch.arange(BINS, dtype=torch.float64, device=self.counts.device) + int(self.first) + 0.5) * width
        return middle.clamp(float(self.low), float(self.high))

    def _cover(self, low: float, high: float) -> None:
        """Widen the bins until [low, high] fits, and move what was counted into its new bins."""
        exponent = int(self.exponent) if not self.empty else _exponent_for(high - low)
        while math.floor(high / 2.0**exponent) - math.floor(low / 2.0**exponent) >= BINS:
            exponent += 1
        first = math.floor(low / 2.0**exponent)
        if not self.empty and (exponent != int(self.exponent) or first != int(self.first)):
            old = torch.arange(BINS, device=self.counts.device) + self.first
            place = torch.div(old, 2 ** (exponent - int(self.exponent)), rounding_mode="floor") - first
            kept = self.counts > 0
            moved = torch.zeros_like(self.counts).index_add_(0, place[kept], self.counts[kept])
            self.counts.copy_(moved)
        self.exponent.fill_(exponent)
        self.first.fill_(first)


def _exponent_for(span: float) -> int:
    """The finest width that covers `span` in half of the bins, so that the next batches seldom make it grow."""
    return max(FINEST, math.ceil(math.log2(span / (BINS // 2)))) if span > 0 else -24
