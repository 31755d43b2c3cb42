"""Symbols of b bits, packed into bytes.

Eight-bit symbols are bytes. Widths up to 5 are split into parts of 4, 2 and 1 bits (3 = 2 + 1), the lowest bits first. A part of w bits
has u·w bytes, u = ⌈n/8⌉, and symbol s lies in byte s mod u·w, at bit w·⌊s/(u·w)⌋: neighbours lie in neighbouring bytes, so that the
decoder shifts and masks whole rows, which vectorizes; neighbours within one byte decode several times slower.

Symbols of 6 and 7 bits lie in the low bits of a byte, row upon row, and the bits left over above them, b/(8 − b) bytes together,
make one symbol more: 3 bytes hold 4 symbols of 6 bits, 7 bytes hold 8 of 7 bits. That touches half the memory that parts would.
"""

from __future__ import annotations

import itertools

import numpy as np

CHUNK = 1 << 18  # elements worked on at a time: temporaries stay small and in cache
COUNTED = 1 << 20  # the same for counting, whose table of pairs has 65,536 entries


def width(largest: int) -> int:
    """Return how many bits the symbols 0 … `largest` need, at least 1.

    Example:
        >>> [width(n) for n in (0, 1, 2, 15, 16, 255)]
        [1, 1, 2, 4, 5, 8]
    """
    return max(1, int(largest).bit_length())


def parts(bits: int) -> list[tuple[int, int]]:
    """Return (width, lowest bit) of the parts of a symbol of at most 5 bits.

    Example:
        >>> parts(5), parts(3)
        ([(4, 0), (1, 4)], [(2, 0), (1, 2)])
    """
    widths = [w for w in (4, 2, 1) if bits & w]
    return [(w, sum(widths[:i])) for i, w in enumerate(widths)]


def histogram(symbols: np.ndarray) -> np.ndarray:
    """Return how often each of 256 bytes occurs; bytes are counted in pairs, which takes half as long as one by one.

    Example:
        >>> histogram(np.array([3, 0, 3], np.uint8))[:4].tolist()
        [1, 0, 0, 2]
    """
    even, pairs = len(symbols) // 2 * 2, np.zeros(65_536, np.int64)
    for start in range(0, even, COUNTED):
        pairs += np.bincount(symbols[start : min(even, start + COUNTED)].view(np.uint16), minlength=65_536)
    counts = pairs.reshape(256, 256).sum(axis=0) + pairs.reshape(256, 256).sum(axis=1)
    counts[symbols[even:]] += 1
    return counts


def translated(symbols: np.ndarray, table: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return table[symbols] for bytes and a table of at most 256 bytes, ten times as fast as numpy, which widens the indices.

    Raises:
        IndexError: a symbol has no entry.

    Example:
        >>> translated(np.array([1, 0, 1], np.uint8), np.array([7, -9], np.int8))
        array([-9,  7, -9], dtype=int8)
    """
    if len(symbols) and symbols.max() >= len(table):
        raise IndexError(f"symbol {symbols.max()} has no entry in a table of {len(table)}")
    whole = table.tobytes() + bytes(256 - len(table))
    out = np.empty(len(symbols), dtype=table.dtype) if out is None else out
    for start in range(0, len(symbols), CHUNK):
        piece = symbols[start : start + CHUNK].tobytes().translate(whole)
        out[start : start + CHUNK] = np.frombuffer(piece, dtype=table.dtype)
    return out


def padded(symbols: np.ndarray) -> np.ndarray:
    """Return `symbols` with zeros added to a multiple of eight.

    Example:
        >>> padded(np.array([1, 2, 3], np.uint8)).tolist()
        [1, 2, 3, 0, 0, 0, 0, 0]
    """
    missing = -len(symbols) % 8
    return np.append(symbols, np.zeros(missing, symbols.dtype)) if missing else symbols


def to_parts(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Return `symbols` (n,) as uint8 (bits, ⌈n/8⌉): the parts one below another, a part of w bits in w rows.

    Example:
        >>> to_parts(np.array([1, 2, 3]), 2).tolist()
        [[13], [2]]
    """
    unit = (len(symbols) + 7) // 8
    if bits > 5:
        spare = 8 - bits
        rows = padded(symbols).astype(np.uint8, copy=False).reshape(8 // spare, -1)
        above = (rows[-1] >> (spare * np.arange(bits // spare, dtype=np.uint8)[:, None])) & (2**spare - 1)
        return (rows[:-1] | above << bits).reshape(bits, unit)
    packed = np.zeros(bits * unit, dtype=np.uint8)
    for w, low in parts(bits):
        part = packed[low * unit : (low + w) * unit]
        for slot, start in itertools.product(range(8 // w), range(0, w * unit, CHUNK)):
            stop = min(w * unit, start + CHUNK)
            piece = symbols[slot * w * unit + start : slot * w * unit + stop].astype(np.uint8)
            part[start : start + len(piece)] |= ((piece >> low) & (2**w - 1)) << (w * slot)
    return packed.reshape(bits, unit)


def flags_to_parts(value: np.ndarray) -> np.ndarray:
    """Return which elements of `value` (n,) are not zero, as the parts of symbols of one bit: uint8 (⌈n/8⌉,)."""
    unit = (len(value) + 7) // 8
    packed = np.zeros(unit, dtype=np.uint8)
    for slot, start in itertools.product(range(8), range(0, unit, CHUNK)):
        piece = value[slot * unit + start : slot * unit + min(unit, start + CHUNK)] != 0
        packed[start : start + len(piece)] |= piece.view(np.uint8) << slot
    return packed


def in_pairs(symbols: np.ndarray) -> np.ndarray:
    """Return the low four bits of `symbols` (n,), two in a byte, the first one low: ⌈n/2⌉ bytes, as ONNX stores UINT4.

    Example:
        >>> in_pairs(np.array([1, 2, 3], np.uint8)).tolist()
        [33, 3]
    """
    pairs = symbols[0::2] & 15
    pairs[: len(symbols) // 2] |= symbols[1::2] << 4
    return pairs


def from_parts(packed: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` symbols of (bits, ⌈count/8⌉) bytes, as uint8; the inverse of `to_parts`.

    Raises:
        ValueError: the bytes are not those of `count` symbols.
    """
    bits, unit = packed.shape
    if unit != (count + 7) // 8 or not 1 <= bits <= 7:
        raise ValueError(f"{bits} rows of {unit} bytes do not hold {count} symbols")
    if bits > 5:
        spare = 8 - bits
        rows = packed.reshape(bits // spare, -1)
        symbols = np.zeros((len(rows) + 1, rows.shape[1]), dtype=np.uint8)
        np.bitwise_and(rows, 2**bits - 1, out=symbols[:-1])
        for number, row in enumerate(rows):
            symbols[-1] |= row >> bits << (spare * number)
        return symbols.reshape(-1)[:count]
    symbols = np.zeros(8 * unit, dtype=np.uint8)
    for w, low in parts(bits):
        part = packed[low : low + w].reshape(-1)
        for slot, start in itertools.product(range(8 // w), range(0, w * unit, CHUNK)):
            piece = part[start : start + CHUNK]
            first = slot * w * unit + start
            symbols[first : first + len(piece)] |= ((piece >> (w * slot)) & (2**w - 1)) << low
    return symbols[:count]


def from_pairs(pairs: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` symbols of bytes that hold two each, as uint8; the inverse of `in_pairs`.

    Raises:
        ValueError: the bytes are not those of `count` symbols.
    """
    if len(pairs) != (count + 1) // 2:
        raise ValueError(f"{len(pairs)} bytes do not hold {count} symbols of four bits")
    symbols = np.empty(2 * len(pairs), dtype=np.uint8)
    np.bitwise_and(pairs, 15, out=symbols[0::2])
    np.right_shift(pairs, 4, out=symbols[1::2])
    return symbols[:count]


def stream_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` symbols of `bits` bits take; four-bit ones lie two in a byte."""
    if bits == 8:
        return count
    return (count + 1) // 2 if bits == 4 else bits * ((count + 7) // 8)
