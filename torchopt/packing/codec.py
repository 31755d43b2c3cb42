"""One tensor as few bytes: where its nonzeros are, what their codes are, and which values the codes stand for.

    positions   "all"      every element has a code
                "mask"     one bit an element
                "gaps"     symbols of g bits between the nonzeros
    values      "table"    code → value, one table a tensor
                "channel"  code → value, one table an output channel
                "one"      all nonzeros have one value, so they need no codes
                "raw"      the nonzero values themselves

An encoding is a choice of the two, a code width b and a gap width g; all of them are lossless on the bits of the values (NaN
payloads and −0.0 included: "zero" means all bits zero). `encode` returns the smallest by measured bytes, or None where dense is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from torchopt.packing.bits import from_parts, stream_bytes, to_parts, width
from torchopt.packing.positions import best_gap_bits, from_gaps, gaps

CALL_BYTES = 130  # what one packed tensor costs in an ONNX file beside its arrays: a node, names, shapes
SAMPLE = 65_536  # elements looked at before a tensor is given up as never clustered
TABLE_AT_MOST = 256
CONSTANT_AT_MOST = 1 << 20  # bytes of a constant tensor kept as one value: a small file never claims a huge tensor
CHUNK = 1 << 18  # elements translated at a time: temporaries stay small and in cache


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
        where: the mask as bytes, one bit an element,, or the gap symbols (unpacked, uint8), or None.
        table: the values that codes stand for: (K,), (channels, K), or the nonzeros in order for "raw".
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

    @property
    def name(self) -> str:
        """The codec in a few letters: "gaps3+table4" is three-bit gaps and four-bit codes."""
        where = {"all": "", "mask": "mask+", "gaps": f"gaps{self.gap_bits}+"}[self.positions]
        return f"{where}{self.values}{self.code_bits or ''}"

    @property
    def payload_bytes(self) -> int:
        """Bytes of codes, positions and table."""
        where = 0
        if self.where is not None:
            where = len(self.where) if self.positions == "mask" else stream_bytes(len(self.where), self.gap_bits)
        return where + (stream_bytes(len(self.codes), self.code_bits) if self.code_bits else 0) + self.table.nbytes


def encode(value: np.ndarray) -> Encoding | None:
    """Return the smallest encoding of `value`, or None where the dense tensor is no larger.

    Args:
        value: any dtype of 1, 2 or 4 bytes, any shape; the first axis is that of the output channels.

    Example:
        >>> w = np.tile(np.array([0, 0, 0, 0.5], np.float32), 256)
        >>> encode(w).name, encode(w).payload_bytes
        ('gaps3+one', 100)
        >>> np.array_equal(decode(encode(w)), w)
        True
    """
    return min(encodings(value), key=lambda e: e.payload_bytes, default=None)


def encodings(value: np.ndarray) -> Iterator[Encoding]:
    """Yield every encoding of `value` that is smaller than the dense tensor, its call included."""
    if value.dtype.itemsize not in (1, 2, 4) or value.size < 2:
        return
    for encoding in _candidates(np.ascontiguousarray(value)):
        if encoding.payload_bytes + CALL_BYTES < value.nbytes:
            yield encoding


def decode(encoding: Encoding) -> np.ndarray:
    """Return the dense tensor, bit for bit.

    Raises:
        ValueError: the parts of the encoding contradict one another, as in a damaged file.
        IndexError: a code has no entry in the table.
    """
    count, table = math.prod(encoding.shape), encoding.table
    if min(encoding.shape, default=0) < 0:
        raise ValueError(f"shape {encoding.shape}")
    if encoding.positions == "all" and encoding.values == "one":
        if count * table.itemsize > CONSTANT_AT_MOST:
            raise ValueError(f"a constant of {count} elements")
        return np.full(encoding.shape, table[0])
    if encoding.values == "channel":
        channels = len(table)
        if count != len(encoding.codes) or channels == 0 or count % channels:
            raise ValueError(f"{len(encoding.codes)} codes in {channels} channels for {count} elements")
        rows = encoding.codes.reshape(channels, -1)
        return np.stack([_translate(row, values) for row, values in zip(rows, table, strict=True)]).reshape(encoding.shape)
    if encoding.positions == "all":
        return _translate(encoding.codes, table).reshape(encoding.shape)
    kept = _kept(encoding, count)
    dense = np.zeros(count, dtype=table.dtype)
    if encoding.values == "raw" and len(table) != len(kept):
        raise ValueError(f"{len(table)} values for {len(kept)} nonzeros")
    dense[kept] = (
        {"raw": table, "one": table[0]}[encoding.values] if not encoding.code_bits else _translate(encoding.codes, table)
    )
    return dense.reshape(encoding.shape)


def entropy_bytes(value: np.ndarray, encoding: Encoding) -> int:
    """Return the order-0 entropy bound of the values' codes (zero is a value too), plus the bytes of their table."""
    if encoding.values in ("table", "one"):
        counts = np.bincount(encoding.codes) if encoding.code_bits else np.array([value.size if encoding.where is None else 0])
        if encoding.where is not None:
            nonzeros = len(encoding.codes) if encoding.code_bits else int(np.count_nonzero(value))
            counts = np.append(counts if encoding.code_bits else [nonzeros], value.size - nonzeros)
        counts = counts[counts > 0]
    else:
        counts = np.unique(value.reshape(-1).view(f"u{value.dtype.itemsize}"), return_counts=True)[1]
    share = counts / counts.sum()
    return math.ceil(value.size * float(-(share * np.log2(share)).sum()) / 8) + len(counts) * value.dtype.itemsize


def _translate(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table[codes], a piece at a time: numpy widens the indices to eight bytes."""
    out = np.empty(len(codes), dtype=table.dtype)
    for start in range(0, len(codes), CHUNK):
        out[start : start + CHUNK] = table[codes[start : start + CHUNK]]
    return out


def _kept(encoding: Encoding, count: int) -> np.ndarray:
    assert encoding.where is not None
    if encoding.positions == "mask":
        return np.flatnonzero(from_parts(encoding.where[None, :], count))
    return from_gaps(encoding.where, encoding.gap_bits, count)


def _candidates(value: np.ndarray) -> Iterator[Encoding]:
    bits = value.reshape(-1).view(f"u{value.dtype.itemsize}")
    found = _table(bits)
    if found is not None and len(found[0]) == 1 and value.nbytes <= CONSTANT_AT_MOST:
        yield _build(value, "all", "one", found[0], np.empty(0, np.uint8))
        return
    if found is not None:
        yield _build(value, "all", "table", *found)
    yield from _per_channel(value, bits, TABLE_AT_MOST if found is None else len(found[0]))
    flags = bits != 0
    zeros = bits.size - int(np.count_nonzero(flags))
    if zeros > 0.1 * bits.size:
        yield from _sparse(value, bits, flags, found)


def _sparse(
    value: np.ndarray, bits: np.ndarray, flags: np.ndarray, found: tuple[np.ndarray, np.ndarray] | None
) -> Iterator[Encoding]:
    """The encodings that say where the nonzeros are: `bits[flags]`."""
    inner = _table(bits[flags]) if found is None else None
    if found is not None and found[0][0] == 0:  # the values rise as unsigned integers, so zero has code 0
        inner = (found[0][1:], found[1][flags] - np.uint8(1))
    for positions, where, gap_bits in _places(flags):
        if inner is not None and len(inner[0]) == 1:
            yield _build(value, positions, "one", inner[0], np.empty(0, np.uint8), where, gap_bits)
        elif inner is not None and len(inner[0]):
            yield _build(value, positions, "table", *inner, where, gap_bits)
        elif inner is None:
            yield _build(value, positions, "raw", bits[flags], np.empty(0, np.uint8), where, gap_bits)


def _places(flags: np.ndarray) -> Iterator[tuple[str, np.ndarray, int]]:
    """The bitmask, or the gaps in their best width, whichever is smaller."""
    few = np.count_nonzero(flags) < 0.45 * len(flags)  # with more nonzeros a bit an element is less than any gaps
    kept = np.flatnonzero(flags) if few else np.empty(0, np.int64)
    bits, size = best_gap_bits(kept, len(flags)) if few else (0, len(flags))
    if size < len(flags) // 8:
        yield "gaps", gaps(kept, bits, len(flags)), bits
    else:
        yield "mask", to_parts(flags, 1)[0], 0


def _table(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The distinct values, rising, and the code of each element, or None where there are more than a byte can name."""
    if bits.itemsize == 1:
        values = np.flatnonzero(np.bincount(bits, minlength=256)).astype(np.uint8)
        return values, _codes(values, bits)
    values = np.unique(bits[:: max(1, bits.size // SAMPLE)])
    if len(values) > TABLE_AT_MOST:
        return None
    codes = _codes(values, bits)
    if not all(np.array_equal(values[codes[i : i + CHUNK]], bits[i : i + CHUNK]) for i in range(0, bits.size, CHUNK)):
        values = np.unique(bits)
        if len(values) > TABLE_AT_MOST:
            return None
        codes = _codes(values, bits)
    return values, codes


def _codes(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The place of each element of `bits` in `values`: by a window of 16 bits that tells the values apart, else by search."""
    codes = np.empty(bits.size, dtype=np.uint8)
    for shift in range(0, 8 * (bits.itemsize - 1), 4) if bits.itemsize > 2 else (0,):
        window = (values >> shift).astype(np.uint16)
        if len(np.unique(window)) == len(values):
            lookup = np.zeros(65_536, dtype=np.uint8)
            lookup[window] = np.arange(len(values))
            for i in range(0, bits.size, CHUNK):
                codes[i : i + CHUNK] = lookup[(bits[i : i + CHUNK] >> shift).astype(np.uint16)]
            return codes
    for i in range(0, bits.size, CHUNK):
        codes[i : i + CHUNK] = np.searchsorted(values, bits[i : i + CHUNK]).clip(max=len(values) - 1)
    return codes


def _per_channel(value: np.ndarray, bits: np.ndarray, distinct: int) -> Iterator[Encoding]:
    """One table an output channel, where each channel has fewer values than the tensor's `distinct`."""
    if value.ndim < 2 or value.shape[0] < 2:
        return
    rows = bits.reshape(value.shape[0], -1)
    first = len(np.unique(rows[0]))
    if rows.shape[1] < 2 or first > rows.shape[1] // 2 or (first > distinct // 2 and width(first - 1) >= width(distinct - 1)):
        return
    tables = [np.unique(row) for row in rows]
    most = max(map(len, tables))
    if most > min(TABLE_AT_MOST, rows.shape[1]):
        return
    table = np.stack([np.concatenate([t, np.full(most - len(t), t[-1])]) for t in tables])
    codes = np.concatenate([_codes(t, row) for t, row in zip(tables, rows, strict=True)])
    yield _build(value, "all", "channel", table, codes)


def _build(
    value: np.ndarray,
    positions: str,
    values: str,
    table: np.ndarray,
    codes: np.ndarray,
    where: np.ndarray | None = None,
    gap_bits: int = 0,
) -> Encoding:
    return Encoding(
        positions=positions,
        values=values,
        shape=value.shape,
        dtype=value.dtype,
        code_bits=0 if values in ("raw", "one") else width(table.shape[-1] - 1),
        gap_bits=gap_bits,
        codes=codes,
        where=where,
        table=table.view(value.dtype),
    )
