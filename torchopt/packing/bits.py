"""Symbols of b bits, packed into bytes.

Four-bit symbols lie two to a byte, low nibble first (ONNX UINT4); eight-bit symbols are bytes; every other width is b bit planes:
plane i holds bit i of each symbol, eight symbols to a byte, the first in the highest bit. A plane decodes by one BitwiseAnd.
"""

from __future__ import annotations

import numpy as np


def width(largest: int) -> int:
    """Return how many bits the symbols 0 … `largest` need, at least 1.

    Example:
        >>> [width(n) for n in (0, 1, 2, 15, 16, 255)]
        [1, 1, 2, 4, 5, 8]
    """
    return max(1, int(largest).bit_length())


def to_planes(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Return the bit planes of `symbols` (n,) as uint8 (bits, ⌈n/8⌉), plane 0 the lowest bit.

    Example:
        >>> to_planes(np.array([1, 2, 3]), 2).tolist()
        [[160], [96]]
    """
    return np.stack([np.packbits((symbols >> bit) & 1) for bit in range(bits)])


def from_planes(planes: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` symbols of bit planes, as int32; the inverse of `to_planes`."""
    symbols = np.zeros(count, dtype=np.int32)
    for bit, plane in enumerate(planes):
        symbols |= np.unpackbits(plane, count=count).astype(np.int32) << bit
    return symbols


def stream_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` symbols of `bits` bits take."""
    if bits == 4:
        return (count + 1) // 2
    return count if bits == 8 else bits * ((count + 7) // 8)
