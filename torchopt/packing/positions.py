"""Where the nonzeros are: a bitmask, or the gaps between them.

A gap symbol g < F = 2^b − 1 means: skip g zeros, then a nonzero. The filler g = F means: skip F zeros. At sparsity s a gap costs
b / (1 − s^F) bits a nonzero, which with the best b is within 13 % of the entropy of the positions at every s above 0.75.
"""

from __future__ import annotations

import numpy as np

from torchopt.packing.bits import stream_bytes


def gaps(nonzero: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the gap symbols (uint8) of the positions of the nonzeros among `count` elements, for symbols of `bits` bits.

    Args:
        nonzero: positions, rising, int64 (k,).
        bits: 2 … 8.
        count: elements in all; fillers reach to within one symbol of the end, so a stream cannot claim a larger tensor.

    Example:
        >>> gaps(np.array([0, 5]), 2, 10).tolist()
        [0, 3, 1, 3]
    """
    filler = 2**bits - 1
    zeros = np.diff(nonzero, prepend=-1) - 1
    fillers = zeros // filler
    size = int(fillers.sum()) + len(nonzero)
    symbols = np.full(size + _tail(nonzero, count) // filler, filler, dtype=np.uint8)
    symbols[np.cumsum(fillers + 1) - 1] = zeros % filler
    return symbols


def best_gap_bits(nonzero: np.ndarray, count: int) -> tuple[int, int]:
    """Return (the width of gap symbols that takes the fewest bytes, those bytes).

    Example:
        >>> best_gap_bits(np.arange(0, 8000, 8), 8000)
        (4, 500)
    """
    runs = np.bincount(np.diff(nonzero, prepend=-1) - 1)
    length = np.arange(len(runs))
    tail = _tail(nonzero, count)
    sizes = {b: int(runs @ (length // (2**b - 1))) + len(nonzero) + tail // (2**b - 1) for b in range(2, 9)}
    best = min(sizes, key=lambda b: stream_bytes(sizes[b], b))
    return best, stream_bytes(sizes[best], best)


def from_gaps(symbols: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the positions of the nonzeros; the inverse of `gaps`.

    Raises:
        ValueError: the symbols do not span `count` elements.

    Example:
        >>> from_gaps(np.array([0, 3, 1, 3]), 2, 10).tolist()
        [0, 5]
    """
    real = symbols != 2**bits - 1
    reached = np.cumsum(symbols.astype(np.int32) + real, dtype=np.int64)
    end = int(reached[-1]) if len(reached) else 0
    if not end <= count < end + 2**bits:
        raise ValueError(f"the gaps span {end} elements, the tensor has {count}")
    return (reached - 1)[real]  # type: ignore[no-any-return]


def _tail(nonzero: np.ndarray, count: int) -> int:
    return count - 1 - int(nonzero[-1]) if len(nonzero) else count
