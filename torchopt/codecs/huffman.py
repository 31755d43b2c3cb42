"""Canonical Huffman codes of at most eight bits, in lanes: near the entropy, and decoded without a loop over the symbols.

A code of at most eight bits is told by the eight bits of the stream at its place, so a table of 256 entries gives the length and the
symbol at *every* place at once. From the lengths, jump[p] = p + length(p) leads from a code to the next one, jump∘jump to the one after
it, and so on by squaring: 4, 8, … 256 codes on. A lane is 512 symbols; where each starts is kept (its length, a byte or two), and from
there the squarings reach all of its symbols (pointer doubling; Wyllie, "The complexity of parallel computations", 1979). The same
steps in operators of ONNX are in `torchopt/pack/huffman_decoder.py`; here they are in numpy, a lane a row.

What the bound of eight bits costs is small where no symbol is rarer than 1 in 256: `Codes` cuts wider codes in two beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

LONGEST = 8  # bits of a code
LANE = 512  # symbols of a lane
SYMBOLS = 64  # at most: longer alphabets do not fit codes of eight bits well
AT_ONCE = 1 << 20  # symbols that are encoded at a time: temporaries are some tens of bytes a symbol


@dataclass(frozen=True, kw_only=True)
class Huffman:
    """Symbols as a stream of canonical codes.

    Attributes:
        data: the bits, the first one high, two bytes more than they need: a window may reach beyond the end.
        lanes: how many bits each lane of 512 symbols has beyond `base`: uint8, or uint16 where that does not do.
        base: bits that every lane has.
        order: uint8 (K,): the symbols by rising length of their codes.
        free: uint8 (K,): by how much each code is shorter than eight bits.
        count: of the symbols.
    """

    data: np.ndarray = field(repr=False)
    lanes: np.ndarray = field(repr=False)
    base: int
    order: np.ndarray = field(repr=False)
    free: np.ndarray = field(repr=False)
    count: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of bits, lanes and code."""
        return self.data.nbytes + self.lanes.nbytes + self.order.nbytes + self.free.nbytes


def lengths(counts: np.ndarray, longest: int = LONGEST) -> np.ndarray:
    """Return the lengths of an optimal code of at most `longest` bits, 0 where the count is 0 (package-merge; Larmore, Hirschberg 1990).

    Args:
        counts: how often each symbol occurs; at least two do.
        longest: bits of the longest code.

    Example:
        >>> lengths(np.array([50, 0, 25, 15, 10])).tolist()
        [1, 0, 2, 3, 3]
    """
    used = [(int(counts[i]), (int(i),)) for i in np.flatnonzero(counts)]
    single, pairs = sorted(used), list[tuple[int, tuple[int, ...]]]()
    for _ in range(longest):
        row = sorted(single + pairs)
        pairs = [(a + b, left + right) for (a, left), (b, right) in zip(row[0::2], row[1::2], strict=False)]
    found = np.zeros(len(counts), np.int64)
    for _, symbols in pairs[: len(used) - 1]:
        np.add.at(found, list(symbols), 1)
    return found


def code_bytes(counts: np.ndarray) -> int:
    """Return about how many bytes symbols take that occur so often, lanes and code included, without encoding them."""
    used = int(np.count_nonzero(counts))
    if not 2 <= used <= SYMBOLS:
        return 1 << 62
    return int(counts @ lengths(counts)) // 8 + 3 + 2 * used + -(-int(counts.sum()) // LANE)


def compress(symbols: np.ndarray) -> Huffman:
    """Return `symbols` (uint8, at least two different ones, each below 64) as a stream.

    Example:
        >>> s = np.tile(np.array([0, 0, 0, 1, 0, 2, 0, 0], np.uint8), 512)
        >>> stream = compress(s)
        >>> len(stream.data), np.array_equal(decompress(stream), s)
        (642, True)
    """
    counts = np.bincount(symbols, minlength=2)
    length = lengths(counts)
    order = np.lexsort((np.arange(len(length)), length))
    order = order[length[order] > 0]
    slots = 1 << (LONGEST - length[order])
    codes = np.zeros(len(length), np.int64)
    codes[order] = (np.cumsum(slots) - slots) >> (LONGEST - length[order])
    bits = int(counts @ length)
    flags = np.zeros(8 * (-(-bits // 8) + 2), np.uint8)
    lanes, end = list[int](), 0
    for first in range(0, len(symbols), AT_ONCE):
        piece = symbols[first : first + AT_ONCE]
        sizes = length[piece]
        starts = end + np.cumsum(sizes) - sizes
        for bit in range(LONGEST):
            long = sizes > bit
            flags[starts[long] + bit] = (codes[piece[long]] >> (sizes[long] - 1 - bit)) & 1
        lanes += np.add.reduceat(sizes, np.arange(0, len(piece), LANE)).tolist()
        end += int(sizes.sum())
    whole = np.array(lanes[:-1] or [0], np.int64)  # where the last one ends is told by the number of symbols
    base = int(whole.min())
    beyond = np.append(np.array(lanes[:-1], np.int64) - base, 0)
    return Huffman(
        data=np.packbits(flags),
        lanes=beyond.astype(np.uint8 if beyond.max() < 256 else np.uint16),
        base=base,
        order=order.astype(np.uint8),
        free=(LONGEST - length[order]).astype(np.uint8),
        count=len(symbols),
    )


def decompress(stream: Huffman) -> np.ndarray:
    """Return the symbols, uint8 (count,); the inverse of `compress`.

    Raises:
        ValueError: the code is none, or lanes do not end where the next ones begin.
    """
    symbol_of, length_of = _tables(stream)
    if len(stream.lanes) != -(-stream.count // LANE) or stream.count < 1 or len(stream.data) < 3:
        raise ValueError(f"{len(stream.lanes)} lanes in {len(stream.data)} bytes for {stream.count} symbols")
    if len(stream.lanes) > 1 and int(stream.lanes[:-1].min()) + stream.base < LANE:
        raise ValueError(f"a lane of fewer than {LANE} bits for as many symbols")
    starts = np.cumsum(stream.lanes.astype(np.int64) + stream.base) - stream.lanes - stream.base
    last = 8 * (len(stream.data) - 1) - 1  # where a window of eight bits still lies within the stream
    if starts[-1] > last or stream.base < 0:
        raise ValueError(f"a lane starts at bit {starts[-1]} of {last + 1}")
    wide = stream.data[:-1].astype(np.uint16) << 8 | stream.data[1:]
    place, left = starts.copy(), stream.count % LANE or LANE
    out = np.empty((LANE, len(starts)), np.uint8)
    byte, shift = np.empty_like(place), np.empty_like(place)
    for step in range(LANE):
        np.right_shift(place, 3, out=byte)
        np.bitwise_and(place, 7, out=shift)
        window = (wide[byte] >> (8 - shift)).astype(np.uint8)
        out[step] = symbol_of[window]
        place += length_of[window]
        np.minimum(place, last, out=place)
        if step == left - 1:
            end = int(place[-1])
    if not np.array_equal(place[:-1], starts[1:]) or end > last:
        raise ValueError("a lane does not end where the next one begins")
    return out.T.reshape(-1)[: stream.count]


def _tables(stream: Huffman) -> tuple[np.ndarray, np.ndarray]:
    """The symbol and the length for each window of eight bits."""
    order, free = stream.order, stream.free
    if order.dtype != np.uint8 or free.dtype != np.uint8 or order.ndim != 1 or order.shape != free.shape or not len(free):
        raise ValueError(f"a code of {order.dtype} {order.shape} and {free.dtype} {free.shape}")
    slots = 1 << free.clip(max=LONGEST).astype(np.int64)
    if free.max() >= LONGEST or slots.sum() != 1 << LONGEST:
        raise ValueError("lengths that are no whole code")
    return np.repeat(order, slots), np.repeat(LONGEST - free.astype(np.int64), slots)
