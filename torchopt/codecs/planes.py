"""Codes whose high bits are rare: the low bits of every code in a row, and where the high bits are set, as positions.

Quantized weights are bell-shaped: of 256 values a few dozen are frequent. With the values numbered by falling frequency, the
highest bits of the codes are almost always zero, and a bit that is set in a share p of the codes costs as positions (gaps) about
the entropy of p instead of one bit. This is patched coding (Zukowski, Heman, Nes and Boncz, "Super-scalar RAM-CPU cache
compression", ICDE 2006) applied bit by bit: unlike Huffman's, every code is decoded without its neighbours.
"""

from __future__ import annotations

import math

import numpy as np

from torchopt.codecs.bits import stream_bytes, translated, width
from torchopt.codecs.positions import best_gap_bits, from_gaps, gaps

Plane = tuple[int, np.ndarray]  # the width of its gap symbols, and the symbols
RARE = 0.15  # set bits a code, all planes together: decoding positions takes time at load, in step with their number
PLANES = 2  # at most: each is a tensor more in the file, about 35 bytes
WORTH = 0.96  # of the plain codes' bits, for the same reason


def ranked(values: np.ndarray, codes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (the values by falling frequency, the codes of them).

    Args:
        values: what the codes stand for.
        codes: uint8.
        counts: how often each code occurs.

    Example:
        >>> ranked(np.array([10, 20, 30]), np.array([2, 1, 2, 0, 2, 1], np.uint8), np.array([1, 2, 3]))
        (array([30, 20, 10]), array([0, 1, 0, 2, 0, 1], dtype=uint8))
    """
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(values), dtype=np.uint8)
    rank[order] = np.arange(len(values))
    return values[order], translated(codes, rank)


def dense_bits(counts: np.ndarray) -> tuple[int, float] | None:
    """Return (how many low bits of the codes to keep in a row, bits a code in all), or None where rare high bits would not pay.

    Args:
        counts: how often each code occurs, in any order.

    Example:
        >>> dense_bits(np.array([500, 20, 300, 10]))[0], dense_bits(np.array([5, 5, 5, 5]))
        (1, None)
    """
    whole, share = width(len(counts) - 1), np.sort(counts)[::-1] / counts.sum()
    codes = np.arange(len(counts))
    low, bits, rare = whole, float(whole), 0.0
    while low > max(1, whole - PLANES) and rare + (p := float(share[(codes >> (low - 1)) & 1 == 1].sum())) < RARE:
        bits, rare, low = bits + _bits(p) - 1, rare + p, low - 1
    return (low, bits) if low < whole and bits < WORTH * whole else None


def split(codes: np.ndarray, low: int, whole: int) -> tuple[np.ndarray, tuple[Plane, ...]]:
    """Return the low bits of codes of `whole` bits, written over them, and the planes above them, the lowest first."""
    planes = []
    for bit in range(low, whole):
        gap_bits, _ = best_gap_bits(codes, 1 << bit)
        planes.append((gap_bits, gaps(codes, gap_bits, 1 << bit)))
    codes &= np.uint8(2**low - 1)
    return codes, tuple(planes)


def merged(low_codes: np.ndarray, low: int, planes: tuple[Plane, ...]) -> np.ndarray:
    """Return the whole codes; the inverse of `split`.

    Raises:
        ValueError: a plane does not span the codes.
    """
    codes = low_codes.copy()
    for bit, (gap_bits, symbols) in enumerate(planes, start=low):
        flags = from_gaps(symbols, gap_bits, len(codes)).view(np.uint8)
        flags <<= bit
        codes |= flags
    return codes


def planes_bytes(planes: tuple[Plane, ...]) -> int:
    """Return the bytes of all the planes' symbols."""
    return sum(stream_bytes(len(symbols), gap_bits) for gap_bits, symbols in planes)


def _bits(p: float) -> float:
    """Bits a code that positions take where a share p of the codes has them, at random, in the best width of gaps."""
    if p <= 0:
        return 0.0
    return min(b * p / -math.expm1((2**b - 1) * math.log1p(-p)) for b in range(2, 9))
