"""Which range [low, high] to quantize, chosen from a streaming histogram.

An affine quantizer with levels qmin … qmax maps x to s·(clip(round(x/s) + z, qmin, qmax) − z), s = (high − low)/(qmax − qmin) and
z = round(qmin − low/s); zero is always representable, so low ≤ 0 ≤ high. Narrower ranges round finer and clip more. The choices:

- percentile: cut the same small share of the values;
- mse: the least mean squared error E[(x − x̂)²];
- entropy: the least Kullback-Leibler divergence between the distribution and its quantized form (Migacz, "8-bit inference with
  TensorRT", GTC 2017).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchopt.quantize.observers.histogram import StreamingHistogram

CANDIDATES = 64
ROUNDS = 3  # coordinate descent over the two ends settles within three rounds
Range = tuple[float, float]
Cost = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def minmax_range(histogram: StreamingHistogram) -> Range:
    """Return the smallest range that clips nothing, zero included."""
    return min(0.0, float(histogram.low)), max(0.0, float(histogram.high))


def percentile_range(histogram: StreamingHistogram, percentile: float = 99.99) -> Range:
    """Return the range that holds `percentile` % of the values; what is cut is shared by the ends that are not zero.

    Example:
        >>> histogram = StreamingHistogram()
        >>> histogram.observe(torch.arange(1000.0))
        >>> percentile_range(histogram, 90.0)
        (0.0, 899.5)
    """
    low, high = minmax_range(histogram)
    sides = (low < 0) + (high > 0)
    share = (1 - percentile / 100) / max(sides, 1)
    cumulative = histogram.counts.cumsum(0) / histogram.counts.sum()
    centers = histogram.centers
    if high > 0:
        high = max(0.0, float(centers[int((cumulative < 1 - share).sum())]))
    if low < 0:
        low = min(0.0, float(centers[int((cumulative <= share).sum())]))
    return low, high


def mse_range(histogram: StreamingHistogram, levels: int = 255) -> Range:
    """Return the range with the least mean squared quantization error.

    Args:
        histogram: of the values.
        levels: qmax − qmin of the quantizer.
    """
    counts, x = _occupied(histogram)

    def error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return ((quantized(x, low[:, None], high[:, None], levels) - x).square() * counts).sum(1)

    return _descend(histogram, error)


def entropy_range(histogram: StreamingHistogram, levels: int = 255) -> Range:
    """Return the range whose quantized distribution diverges least from the true one.

    Args:
        histogram: of the values.
        levels: qmax − qmin of the quantizer.
    """
    counts, x = _occupied(histogram)

    def divergence(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return _kullback_leibler(counts, x, low[:, None], high[:, None], levels)

    return _descend(histogram, divergence)


def quantized(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int) -> torch.Tensor:
    """Return x̂, what an affine quantizer with `levels + 1` values over [low, high] makes of `x` (broadcast).

    Example:
        >>> quantized(torch.tensor([0.0, 0.3, 2.0]), torch.tensor(0.0), torch.tensor(1.0), 2)
        tensor([0.0000, 0.5000, 1.0000])
    """
    scale = (high - low).clamp(min=torch.finfo(torch.float32).tiny) / levels
    zero_point = torch.round(-low / scale)
    return (torch.clamp(torch.round(x / scale) + zero_point, 0, levels) - zero_point) * scale


def _occupied(histogram: StreamingHistogram) -> tuple[torch.Tensor, torch.Tensor]:
    kept = histogram.counts > 0
    return histogram.counts[kept], histogram.centers[kept]


def _descend(histogram: StreamingHistogram, cost: Cost) -> Range:
    """Move one end at a time to its best place among fractions of the full range, then look closer around it."""
    full_low, full_high = minmax_range(histogram)
    best = [full_low, full_high]
    span = 1.0
    for _ in range(ROUNDS):
        for end, full in ((1, full_high), (0, full_low)):
            if full == 0.0:
                continue
            centre = best[end] / full
            fractions = torch.linspace(max(0.01, centre - span), min(1.0, centre + span), CANDIDATES, dtype=torch.float64)
            places = fractions * full
            other = torch.full_like(places, best[1 - end])
            low, high = (other, places) if end else (places, other)
            best[end] = float(places[int(cost(low, high).argmin())])
        span /= 8
    return best[0], best[1]


def _kullback_leibler(counts: torch.Tensor, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int) -> torch.Tensor:
    """KL(P‖Q) of each candidate, (candidates,); `counts` and `x` (bins,), `low` and `high` (candidates, 1).

    P has the clipped values in its end bins, Q spreads each level's mass evenly over the bins that fall on it.
    """
    inside = (x >= low) & (x <= high)
    mass = counts * inside
    level = ((x.clamp(low, high) - low) / (high - low) * levels).round_().long()
    total = torch.zeros(len(low), levels + 1, dtype=torch.float64, device=x.device)
    bins = total.clone().scatter_add_(1, level, inside.double())
    total.scatter_add_(1, level, mass)
    q = (total / bins.clamp_(min=1)).gather(1, level) * inside
    p = mass.clone()
    below, above = (counts * (x < low)).sum(1), (counts * (x > high)).sum(1)
    first, last = (x < low).sum(1, keepdim=True), len(x) - 1 - (x > high).sum(1, keepdim=True)
    p.scatter_add_(1, first.clamp_(max=len(x) - 1), below[:, None]).scatter_add_(1, last.clamp_(min=0), above[:, None])
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    terms = torch.where((p > 0) & (q > 0), p * (p / q).log(), 0.0)
    return torch.where(inside.any(1), terms.sum(1), torch.inf)
