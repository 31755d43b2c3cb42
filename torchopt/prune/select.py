"""Exact selection of the largest: which `keep` of many million scores survive, over one tensor or over all, ties cut by position.

    m_i = 1  ⇔  s_i > t,  or  s_i = t and fewer than keep - #{s > t} equal ones came before

The threshold t, the keep-th largest score, is found without a sort, after Floyd and Rivest, "Expected time bounds for
selection" (1975): a strided sample brackets t between two values, one pass counts what lies above the bracket, and only the few
scores inside are partitioned. Scores are looked at in chunks that stay in cache, so nothing of the size of the model is
allocated, and by NumPy on one core: passes this short lose more by waiting for a second one, on a busy machine, than they gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from torchopt.errors import ModelError

CHUNK = 1 << 17  # 512 kB of float32: stays in a core's L2 cache
SAMPLE = 1 << 15
SMALL = 1 << 16  # below this, partitioning everything is as fast


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """The scores of one tensor's units.

    Attributes:
        name: the weight's name, for messages.
        values: floating point, contiguous, any shape.
        absolute: the score is |values|, taken chunk by chunk instead of stored.
    """

    name: str
    values: torch.Tensor
    absolute: bool = False

    @property
    def count(self) -> int:
        """How many units there are."""
        return self.values.numel()

    @cached_property
    def flat(self) -> np.ndarray:
        """The values as one row in host memory; bfloat16 and float16 are widened, which keeps their order."""
        values = self.values.detach().reshape(-1)
        wide = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        return wide.cpu().numpy()

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (start, scores of one chunk); the array is overwritten by the next chunk."""
        scratch = np.empty(min(CHUNK, self.flat.size), dtype=self.flat.dtype) if self.absolute else self.flat
        for start in range(0, self.flat.size, CHUNK):
            chunk = self.flat[start : start + CHUNK]
            yield start, np.abs(chunk, out=scratch[: chunk.size]) if self.absolute else chunk

    def strided(self, stride: int) -> np.ndarray:
        """Return each `stride`-th score."""
        return np.abs(self.flat[::stride]) if self.absolute else self.flat[::stride]


def keep_largest(scores: Sequence[Scores], keep: int, *, floors: Sequence[int] | None = None) -> list[torch.Tensor]:
    """Choose exactly `keep` units among all tensors, the largest scores first; of equal ones, those that come first.

    Args:
        scores: one entry a tensor, ranked together.
        keep: how many units survive in all.
        floors: how many survive in each tensor at least; 1 each unless said. `keep` is raised to their sum where it is below.

    Returns:
        One bool tensor for each entry, of its shape.

    Raises:
        ModelError: a score is NaN.

    Example:
        >>> a = Scores(name="a", values=torch.tensor([3.0, -4.0]), absolute=True)
        >>> b = Scores(name="b", values=torch.tensor([4.0, 0.1, 5.0]))
        >>> [mask.tolist() for mask in keep_largest([a, b], 3)]
        [[False, True], [True, False, True]]
    """
    least = [min(entry.count, floor) for entry, floor in zip(scores, floors or [1] * len(scores), strict=True)]
    keep = min(max(keep, sum(least)), sum(entry.count for entry in scores))
    shares, threshold = _shares(scores, keep, least)
    return [_mask(entry, threshold.get(i), share) for i, (entry, share) in enumerate(zip(scores, shares, strict=True))]


def _shares(scores: Sequence[Scores], keep: int, least: list[int]) -> tuple[list[int], dict[int, float]]:
    """Divide `keep` among the tensors: by one common threshold, where that leaves each its least; else the least, and again."""
    shares, common, threshold = list(least), set(range(len(scores))), {}
    if len(scores) == 1:
        return [keep], {}
    while common:
        indices = sorted(common)
        budget = keep - sum(least[i] for i in range(len(scores)) if i not in common)
        found = kth_largest([scores[i] for i in indices], budget)
        counts = _divide([scores[i] for i in indices], found, budget)
        starved = {i for i, count in zip(indices, counts, strict=True) if count < least[i]}
        if not starved:
            shares = [counts[indices.index(i)] if i in common else least[i] for i in range(len(scores))]
            threshold = dict.fromkeys(indices, found)
            break
        common -= starved
    return shares, threshold


def _divide(scores: Sequence[Scores], threshold: float, keep: int) -> list[int]:
    """How many of each tensor survive when `keep` do in all: those above the threshold, and equal ones in order."""
    above = [_count(entry, threshold, equal=False) for entry in scores]
    left = keep - sum(above)
    shares = []
    for entry, count in zip(scores, above, strict=True):
        ties = min(left, _count(entry, threshold, equal=True)) if left > 0 else 0
        left -= ties
        shares.append(count + ties)
    if left > 0:
        raise ModelError(
            f"prune: {', '.join(s.name for s in scores)[:200]}: a score is NaN; a model with finite weights is needed"
        )
    return shares


def kth_largest(scores: Sequence[Scores], k: int) -> float:
    """Return the k-th largest score of all tensors together, 1 the largest.

    Example:
        >>> kth_largest([Scores(name="w", values=torch.arange(10.0))], 3)
        7.0
    """
    total = sum(entry.count for entry in scores)
    if total > SMALL:
        low, high = _bracket(scores, k, total)
        above, at_high, between, at_low = _scan(scores, low, high)
        if above < k <= above + at_high:
            return high
        if above + at_high < k <= above + at_high + between.size:
            return _partition(between, k - above - at_high)
        if above + at_high + between.size < k <= above + at_high + between.size + at_low:
            return low
    return _partition(np.concatenate([entry.strided(1) for entry in scores]), k)


def _bracket(scores: Sequence[Scores], k: int, total: int) -> tuple[float, float]:
    """Return two values between which the k-th largest almost surely lies: 5 standard deviations of its rank in the sample."""
    stride = max(1, total // SAMPLE)
    sample = np.sort(np.concatenate([entry.strided(stride) for entry in scores]))
    share = k / total
    middle = (1.0 - share) * sample.size
    margin = 5.0 * math.sqrt(sample.size * share * (1.0 - share)) + len(scores) + 1
    low, high = math.floor(middle - margin), math.ceil(middle + margin)
    return (
        float(sample[low]) if low >= 0 else -math.inf,
        float(sample[high]) if high < sample.size else math.inf,
    )


def _scan(scores: Sequence[Scores], low: float, high: float) -> tuple[int, int, np.ndarray, int]:
    """Count the scores above, at the top and at the bottom of a bracket, and collect those between.

    The ends are counted apart because many scores may equal them: after a mask, four fifths of all weights are exactly 0.
    """
    above = at_high = at_low = 0
    between = []
    for entry in scores:
        for _, chunk in entry.chunks():
            over_low, over_high = chunk > low, _count_true(chunk > high)
            above, at_high = above + over_high, at_high + _count_true(chunk >= high) - over_high
            at_low += _count_true(chunk == low)
            between.append(chunk[np.logical_and(over_low, chunk < high, out=over_low)])
    return above, at_high, np.concatenate(between), at_low


def _partition(values: np.ndarray, k: int) -> float:
    return float(np.partition(values, values.size - k)[values.size - k])


def _count(entry: Scores, threshold: float, *, equal: bool) -> int:
    compare = np.equal if equal else np.greater
    return sum(_count_true(compare(chunk, threshold)) for _, chunk in entry.chunks())


def _count_true(flags: np.ndarray) -> int:
    return int(np.count_nonzero(flags))


def _mask(entry: Scores, threshold: float | None, share: int) -> torch.Tensor:
    """Return the mask of the `share` largest; `threshold` is known where the tensor was ranked with others."""
    if threshold is None:
        threshold = kth_largest([entry], share)
    mask = np.empty(entry.count, dtype=np.bool_)
    for start, chunk in entry.chunks():
        np.greater_equal(chunk, threshold, out=mask[start : start + chunk.size])
    surplus = _count_true(mask) - share
    if surplus > 0:
        _drop_last(mask, entry, threshold, surplus)
    elif surplus < 0:
        raise ModelError(f"prune: {entry.name}: a score is NaN; a model with finite weights is needed")
    return torch.from_numpy(mask).reshape(entry.values.shape).to(entry.values.device)


def _drop_last(mask: np.ndarray, entry: Scores, threshold: float, surplus: int) -> None:
    """Take the last `surplus` scores that equal the threshold out of the mask."""
    for start, ties in reversed([(start, np.flatnonzero(chunk == threshold)) for start, chunk in entry.chunks()]):
        dropped = ties[max(0, ties.size - surplus) :]
        mask[start + dropped] = False
        surplus -= dropped.size
