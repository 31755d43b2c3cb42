"""One tensor as few bytes: where its nonzeros are, what their codes are, and which values the codes stand for.

    positions   "all"      every element has a code
                "mask"     one bit an element
                "gaps"     symbols of g bits between the nonzeros
    values      "table"    code → value, one table a tensor; rare high bits of the codes may lie apart, as positions (planes)
                "channel"  code → value, one table for each output channel or for each group of neighbouring ones
                "one"      all nonzeros have one value, so they need no codes
                "raw"      the nonzero values themselves

An encoding is a choice of the two, a code width b and a gap width g; all of them are lossless on the bits of the values (NaN
payloads and −0.0 included: "zero" means all bits zero).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from torchopt.codecs.bits import CHUNK, from_parts, histogram, stream_bytes, translated
from torchopt.codecs.planes import Plane, merged, planes_bytes
from torchopt.codecs.positions import from_gaps

DOMAIN = "torchopt"  # of the functions in a packed file that decode; rooms that only look at files know them by it
CONSTANT_AT_MOST = 1 << 20  # bytes of a constant tensor kept as one value: a small file never claims a huge tensor


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A tensor in packed form.

    Attributes:
        positions: "all", "mask" or "gaps".
        values: "table", "channel", "one" or "raw".
        shape: of the dense tensor.
        dtype: of the dense tensor.
        code_bits: width of a code; 0 for "one" and "raw".
        gap_bits: width of a gap symbol; 0 unless positions are gaps.
        codes: (k,) uint8, unpacked; empty for "one" and "raw".
        where: the mask as bytes, one bit an element, or the gap symbols (unpacked, uint8), or None.
        table: the values that codes stand for: (K,), (groups of channels, K), or the nonzeros in order for "raw". With positions,
            the zero is in the tables a channel, under code 0, and in no other.
        planes: bits of the codes above the `code_bits` of `codes`, the lowest first, as (gap width, gap symbols).
    """

    positions: str
    values: str
    shape: tuple[int, ...]
    dtype: np.dtype
    code_bits: int
    gap_bits: int
    codes: np.ndarray = field(repr=False)
    where: np.ndarray | None = field(repr=False)
    table: np.ndarray = field(repr=False)
    planes: tuple[Plane, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """The codec in a few letters: "gaps3+table4" is three-bit gaps and four-bit codes; "table5+2" has two rare bits more."""
        where = {"all": "", "mask": "mask+", "gaps": f"gaps{self.gap_bits}+"}[self.positions]
        return f"{where}{self.values}{self.code_bits or ''}{f'+{len(self.planes)}' if self.planes else ''}"

    @property
    def payload_bytes(self) -> int:
        """Bytes of codes, positions and table."""
        where = 0
        if self.where is not None:
            where = len(self.where) if self.positions == "mask" else stream_bytes(len(self.where), self.gap_bits)
        zero = self.positions != "all" and not self.full
        codes = stream_bytes(len(self.codes) + zero, self.code_bits) + planes_bytes(self.planes) if self.code_bits else 0
        return where + codes + self.table.nbytes + zero * (self.values != "channel") * self.dtype.itemsize

    @property
    def full(self) -> bool:
        """Whether all codes are taken by nonzeros, so that none is left for the zero."""
        return self.positions != "all" and self.values == "table" and len(self.table) == 2**self.code_bits

    def nonzeros(self) -> int:
        """How many nonzeros the positions tell."""
        assert self.where is not None
        if self.positions == "gaps":
            return int(np.count_nonzero(self.where != 2**self.gap_bits - 1))
        return int(np.unpackbits(self.where).sum())

    def whole_codes(self) -> np.ndarray:
        """The codes with the bits that lie apart.

        Raises:
            ValueError: a plane does not span the codes.
        """
        return merged(self.codes, self.code_bits, self.planes) if self.planes else self.codes


def decode(encoding: Encoding) -> np.ndarray:
    """Return the dense tensor, bit for bit.

    Raises:
        ValueError: the parts of the encoding contradict one another, as in a damaged file.
        IndexError: a code has no entry in the table.

    Example:
        >>> from torchopt.codecs import encode
        >>> w = np.tile(np.array([0, 0, 0, 0.5], np.float32), 256)
        >>> np.array_equal(decode(encode(w)), w)
        True
    """
    count, table = math.prod(encoding.shape), encoding.table
    if min(encoding.shape, default=0) < 0:
        raise ValueError(f"shape {encoding.shape}")
    if encoding.positions == "all" and encoding.values == "one":
        if count * table.itemsize > CONSTANT_AT_MOST:
            raise ValueError(f"a constant of {count} elements")
        return np.full(encoding.shape, table[0])
    if encoding.positions == "all":
        return _translated_rows(encoding.whole_codes(), encoding).reshape(encoding.shape)
    kept = _kept(encoding, count)
    if encoding.values == "raw":
        return _scattered(kept, table, None).reshape(encoding.shape)
    if encoding.values == "one":
        return np.where(kept, table[0], table.dtype.type(0)).reshape(encoding.shape)
    if encoding.values == "channel":
        return _translated_rows(_scattered(kept, encoding.codes, None), encoding).reshape(encoding.shape)
    return _scattered(kept, encoding.codes, table).reshape(encoding.shape)


def entropy_bytes(value: np.ndarray, encoding: Encoding | None = None) -> int:
    """Return the order-0 entropy bound of the values' codes (zero is a value too), plus the bytes of their table.

    Args:
        value: the tensor.
        encoding: of it, where there is one: then the codes need not be counted again.
    """
    if encoding is None:
        counts = _frequencies(np.ascontiguousarray(value).reshape(-1).view(f"u{value.dtype.itemsize}"))
    elif encoding.values in ("table", "one"):
        codes = encoding.whole_codes()
        counts = histogram(codes) if encoding.code_bits else np.array([value.size if encoding.where is None else 0])
        if encoding.where is not None:
            nonzeros = len(encoding.codes) if encoding.code_bits else int(np.count_nonzero(value))
            counts = np.append(counts if encoding.code_bits else [nonzeros], value.size - nonzeros)
        counts = counts[counts > 0]
    else:
        raw = encoding.table if encoding.values == "raw" else value.reshape(-1)
        counts = _frequencies(raw.view(f"u{value.dtype.itemsize}"))
        counts = np.append(counts, value.size - raw.size) if raw.size < value.size else counts
    weighted = sum(float(c @ np.log2(c)) for c in np.array_split(counts, 1 + len(counts) // CHUNK))  # Σ c log c
    bits = value.size * math.log2(value.size) - weighted
    return math.ceil(max(0.0, bits) / 8 - 1e-6) + len(counts) * value.dtype.itemsize


def _frequencies(bits: np.ndarray) -> np.ndarray:
    """How often each distinct value occurs, int32 (distinct values,)."""
    ordered, last, runs = np.sort(bits), 0, []
    for start in range(0, len(bits), CHUNK):
        piece = ordered[start : start + CHUNK + 1]
        ends = start + 1 + np.flatnonzero(piece[1:] != piece[:-1])
        runs.append(np.diff(ends, prepend=last).astype(np.int32))
        last = int(ends[-1]) if len(ends) else last
    return np.concatenate([*runs, np.array([len(bits) - last], np.int32)])


def _translate(codes: np.ndarray, table: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """table[codes], a piece at a time: numpy widens the indices to eight bytes."""
    if table.itemsize == 1:
        return translated(codes, table, out)
    out = np.empty(len(codes), dtype=table.dtype) if out is None else out
    for start in range(0, len(codes), CHUNK):
        out[start : start + CHUNK] = table[codes[start : start + CHUNK]]
    return out


def _translated_rows(codes: np.ndarray, encoding: Encoding) -> np.ndarray:
    """The values of the codes of all elements."""
    count, table = math.prod(encoding.shape), encoding.table
    channels = len(table) if encoding.values == "channel" else 1
    if count != len(codes) or channels == 0 or count % channels:
        raise ValueError(f"{len(codes)} codes in {channels} channels for {count} elements")
    out = np.empty((channels, count // channels), dtype=table.dtype)
    for row, shares, values in zip(out, codes.reshape(channels, -1), table.reshape(channels, -1), strict=True):
        _translate(shares, values, row)
    return out.reshape(-1)


def _scattered(kept: np.ndarray, nonzeros: np.ndarray, table: np.ndarray | None) -> np.ndarray:
    """The nonzeros, or what they stand for in `table`, at their places among zeros, a piece at a time."""
    there, end = int(np.count_nonzero(kept)), 0
    if len(nonzeros) != there:
        raise ValueError(f"{len(nonzeros)} values for {there} nonzeros")
    dense = np.zeros(len(kept), dtype=nonzeros.dtype if table is None else table.dtype)
    for start in range(0, len(kept), CHUNK):
        places = kept[start : start + CHUNK]
        piece = nonzeros[end : (end := end + int(np.count_nonzero(places)))]
        dense[start : start + CHUNK][places] = piece if table is None else _translate(piece, table)
    return dense


def _kept(encoding: Encoding, count: int) -> np.ndarray:
    """Which elements are not zero, bool (count,)."""
    assert encoding.where is not None
    if encoding.positions == "mask":
        return from_parts(encoding.where[None, :], count).view(bool)
    return from_gaps(encoding.where, encoding.gap_bits, count)
