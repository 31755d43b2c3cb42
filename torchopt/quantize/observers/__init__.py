"""Observers: what range an activation takes, from data that streams by."""

from torchopt.quantize.observers.histogram import StreamingHistogram
from torchopt.quantize.observers.ranges import entropy_range, minmax_range, mse_range, percentile_range

__all__ = ["StreamingHistogram", "entropy_range", "minmax_range", "mse_range", "percentile_range"]
