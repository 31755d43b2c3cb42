"""Symbols of b bits, packed into bytes.

Eight-bit symbols are bytes. Every other width is split into parts of 4, 2 and 1 bits (7 = 4 + 2 + 1), the lowest bits first. A part of
w bits has u·w bytes, u = ⌈n/8⌉, and symbol s lies in byte s mod u·w, at bit w·⌊s/(u·w)⌋: neighbours lie in neighbouring bytes, so
that the decoder shifts and masks whole rows, which vectorizes; neighbours within one byte decode several times slower.
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


def parts(bits: int) -> list[tuple[int, int]]:
    """Return (width, lowest bit) of the parts of a symbol.

    Example:
        >>> parts(7), parts(3)
        ([(4, 0), (2, 4), (1, 6)], [(2, 0), (1, 2)])
    """
    widths = [w for w in (4, 2, 1) if bits & w]
    return [(w, sum(widths[:i])) for i, w in enumerate(widths)]


def to_parts(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Return `symbols` (n,) as uint8 (bits, ⌈n/8⌉): the parts one below another, a part of w bits in w rows.

    Example:
        >>> to_parts(np.array([1, 2, 3]), 2).tolist()
        [[13], [2]]
    """
    unit = (len(symbols) + 7) // 8
    packed = np.zeros(bits * unit, dtype=np.uint8)
    for w, low in parts(bits):
        part = packed[low * unit : (low + w) * unit]
        for slot in range(8 // w):
            piece = symbols[slot * w * unit : (slot + 1) * w * unit].astype(np.uint8)
            part[: len(piece)] |= ((piece >> low) & (2**w - 1)) << (w * slot)
    return packed.reshape(bits, unit)


def from_parts(packed: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` symbols of (bits, ⌈count/8⌉) bytes, as uint8; the inverse of `to_parts`.

    Raises:
        ValueError: the bytes are not those of `count` symbols.
    """
    bits, unit = packed.shape
    if unit != (count + 7) // 8 or not 1 <= bits <= 7:
        raise ValueError(f"{bits} rows of {unit} bytes do not hold {count} symbols")
    symbols = np.zeros(8 * unit, dtype=np.uint8)
    for w, low in parts(bits):
        part = packed[low : low + w].reshape(-1)
        for slot in range(8 // w):
            symbols[slot * w * unit : (slot + 1) * w * unit] |= ((part >> (w * slot)) & (2**w - 1)) << low
    return symbols[:count]


def stream_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` symbols of `bits` bits take."""
    return count if bits == 8 else bits * ((count + 7) // 8)
