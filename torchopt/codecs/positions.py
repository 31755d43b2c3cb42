"""Where the nonzeros are: a bitmask, or the gaps between them.

A gap symbol g < F = 2^b − 1 means: skip g zeros, then a nonzero. The filler g = F means: skip F zeros. At sparsity s a gap costs
b / (1 − s^F) bits a nonzero, which with the best b is within 13 % of the entropy of the positions at every s above 0.75.

Everything goes a piece at a time: positions are eight bytes each, and would be many times the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from torchopt.codecs.bits import CHUNK, stream_bytes

LONG = 4096  # zeros in a row from which on they are too rare to count by length


def gaps(value: np.ndarray, bits: int, mask: int = -1) -> np.ndarray:
    """Return the gap symbols, uint8 (k,), of the elements of `value` that have a bit of `mask` set, for symbols of `bits` bits.

    Args:
        value: unsigned integers (n,).
        bits: 2 … 8.
        mask: −1 for any bit. Fillers reach to within one symbol of the end, so a stream cannot claim a larger tensor.

    Example:
        >>> gaps(np.array([9, 0, 0, 0, 0, 1, 0, 0, 0, 0], np.uint8), 2).tolist()
        [0, 3, 1, 3]
    """
    filler, left, pieces = 2**bits - 1, len(value), []
    for zeros in _runs(value, mask):
        fillers = zeros // filler
        symbols = np.full(int(fillers.sum()) + len(zeros), filler, dtype=np.uint8)
        symbols[np.cumsum(fillers + 1) - 1] = zeros % filler
        pieces.append(symbols)
        left -= int(zeros.sum()) + len(zeros)
    return np.concatenate([*pieces, np.full(left // filler, filler, dtype=np.uint8)])


def best_gap_bits(value: np.ndarray, mask: int = -1) -> tuple[int, int]:
    """Return (the width of gap symbols that takes the fewest bytes, those bytes), for the same elements.

    Example:
        >>> best_gap_bits(np.tile(np.array([1, 0, 0, 0, 0, 0, 0, 0], np.uint8), 1000))
        (4, 500)
    """
    counts, count, left = np.zeros(LONG, np.int64), 0, len(value)
    rare = [np.empty(0, np.int64)]
    for zeros in _runs(value, mask):
        counts += np.bincount(zeros[zeros < LONG], minlength=LONG)
        rare.append(zeros[zeros >= LONG])
        count, left = count + len(zeros), left - int(zeros.sum()) - len(zeros)
    lengths, long = np.arange(LONG), np.append(np.concatenate(rare), left)
    sizes = {b: int(counts @ (lengths // (2**b - 1))) + count + int((long // (2**b - 1)).sum()) for b in range(2, 9)}
    best = min(sizes, key=lambda b: stream_bytes(sizes[b], b))
    return best, stream_bytes(sizes[best], best)


def from_gaps(symbols: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return which of `count` elements the gaps lead to, bool (count,); the inverse of `gaps`.

    Raises:
        ValueError: the symbols do not span `count` elements.

    Example:
        >>> np.flatnonzero(from_gaps(np.array([0, 3, 1, 3], np.uint8), 2, 10)).tolist()
        [0, 5]
    """
    end = int(symbols.sum(dtype=np.int64)) + int(np.count_nonzero(symbols != 2**bits - 1))
    if not end <= count < end + 2**bits:
        raise ValueError(f"the gaps span {end} elements, the tensor has {count}")
    flags, start = np.zeros(count, dtype=bool), -1
    for first in range(0, len(symbols), CHUNK):
        piece = symbols[first : first + CHUNK]
        real = piece != 2**bits - 1
        reached = start + np.cumsum(piece.astype(np.int32) + real, dtype=np.int64)
        flags[reached[real]] = True
        start = int(reached[-1])
    return flags


def _runs(value: np.ndarray, mask: int) -> Iterator[np.ndarray]:
    """How many zeros stand before each nonzero, int64, a piece at a time; what stands after the last is what is missing."""
    last, chosen = -1, value.dtype.type(np.iinfo(value.dtype).max if mask < 0 else mask)
    for start in range(0, len(value), CHUNK):
        places = start + np.flatnonzero((value[start : start + CHUNK] & chosen) != 0)  # flags: twice as fast as numbers
        if len(places):
            yield np.diff(places, prepend=last) - 1
            last = int(places[-1])
