"""The codes of several tensors end to end, near their entropy: Huffman codes for what is skewed, plain bits for what is not.

    codes = high · 2^k + low        high in Huffman codes, low in k plain bits
    zeros often                     only the nonzero codes, and the gaps between them, both so

A bell of many integers is flat over a few neighbours: their low bits hold one bit each whatever the code, so they stay plain, and the
alphabet of the high parts is small enough for codes of eight bits. Where half of the codes are zero, a code of at least one bit each
would be far from the entropy; the gaps between the nonzeros (`positions`) are symbols of their own, which Huffman codes fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from torchopt.codecs.bits import stream_bytes
from torchopt.codecs.huffman import Huffman, code_bytes, compress, decompress
from torchopt.codecs.positions import from_gaps, gaps

DECODER = {0: 0, 1: 340, 2: 335, 3: 1040, 4: 0, 5: 530}  # bytes that functions take in a file to unpack so many plain bits
GAP_BITS = (3, 4, 5, 6)  # widths of gap symbols that are tried; the last has the longest alphabet of `huffman`
SPARSE = 0.4  # zeros from which on gaps are tried
NEAR = 1.002  # of the smallest: more plain bits are taken then, for they are decoded sooner and in less memory


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Codes of several tensors in one stream.

    Attributes:
        count: of all codes.
        low_bits: plain bits of each (nonzero) code.
        high: what is above them.
        low: (k,) uint8, the plain bits, unpacked; empty without any.
        gap_bits: width of a gap symbol; 0 where every code is in the stream.
        where: the gap symbols, or None.
    """

    count: int
    low_bits: int
    high: Huffman
    low: np.ndarray = field(repr=False)
    gap_bits: int = 0
    where: Huffman | None = None

    @property
    def name(self) -> str:
        """As that of an `Encoding`: "gaps5+huffman" and "huffman+3", three plain bits."""
        where = f"gaps{self.gap_bits}+" if self.where is not None else ""
        return f"{where}huffman{f'+{self.low_bits}' if self.low_bits else ''}"

    @property
    def payload_bytes(self) -> int:
        """Bytes of all streams."""
        low = stream_bytes(len(self.low), self.low_bits) if self.low_bits else 0
        return self.high.payload_bytes + low + (self.where.payload_bytes if self.where is not None else 0)

    @property
    def stream_bits(self) -> int:
        """Bits in Huffman codes: what decoding takes time and memory for."""
        return 8 * (len(self.high.data) + (len(self.where.data) if self.where is not None else 0))


def join(codes: np.ndarray) -> Joined | None:
    """Return `codes` (uint8) in the smallest of the forms above, or None where there is none.

    Example:
        >>> codes = np.tile(np.array([0, 0, 0, 0, 1, 0, 0, 2], np.uint8), 1024)
        >>> joined = join(codes)
        >>> joined.name, joined.payload_bytes < len(codes) / 4, np.array_equal(apart(joined), codes)
        ('gaps3+huffman', True, True)
    """
    counts = np.bincount(codes, minlength=256)
    everywhere = _low_bits(counts)
    sparse, found = _low_bits(np.append([0], counts[1:])), None
    if sparse is not None and counts[0] > SPARSE * len(codes):
        tried = [(code_bytes(np.bincount(symbols)), bits) for bits in GAP_BITS for symbols in [gaps(codes, bits)]]
        size, found = min(tried)
        if everywhere is not None and everywhere[0] <= size + sparse[0]:
            found = None
    if found is not None and sparse is not None:
        return _built(codes[codes != 0], sparse[1], len(codes), found, compress(gaps(codes, found)))
    return None if everywhere is None else _built(codes, everywhere[1], len(codes), 0, None)


def apart(joined: Joined) -> np.ndarray:
    """Return the codes, uint8 (count,); the inverse of `join`.

    Raises:
        ValueError: the streams contradict one another, as in a damaged file.
    """
    codes = decompress(joined.high)
    if joined.low_bits:
        if len(joined.low) < len(codes):
            raise ValueError(f"low bits of {len(joined.low)} codes for {len(codes)}")
        codes = codes << joined.low_bits | joined.low[: len(codes)]
    if joined.where is None:
        if len(codes) != joined.count:
            raise ValueError(f"{len(codes)} codes for {joined.count} elements")
        return codes
    kept = from_gaps(decompress(joined.where), joined.gap_bits, joined.count)
    if np.count_nonzero(kept) != len(codes):
        raise ValueError(f"{len(codes)} codes for {np.count_nonzero(kept)} nonzeros")
    out = np.zeros(joined.count, np.uint8)
    out[kept] = codes
    return out


def _low_bits(counts: np.ndarray) -> tuple[int, int] | None:
    """(bytes, how many plain bits) of codes that occur so often, or None where no form fits."""
    total = int(counts.sum())
    sizes = {}
    for low, decoder in DECODER.items():
        high = counts.reshape(-1, 1 << low).sum(axis=1)
        sizes[low] = code_bytes(high) + (stream_bytes(total, low) if low else 0) + decoder
    least = min(sizes.values())
    return None if least >= 1 << 62 else (least, max(low for low, size in sizes.items() if size <= NEAR * least))


def _built(codes: np.ndarray, low: int, count: int, gap_bits: int, where: Huffman | None) -> Joined:
    plain = codes & np.uint8((1 << low) - 1) if low else np.empty(0, np.uint8)
    return Joined(count=count, low_bits=low, high=compress(codes >> low), low=plain, gap_bits=gap_bits, where=where)
