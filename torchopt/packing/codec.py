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

from torchopt.packing.bits import stream_bytes, to_planes, width
from torchopt.packing.positions import from_gaps, gap_count, gaps

CALL_BYTES = 130  # what one packed tensor costs in an ONNX file beside its arrays: a node, names, shapes
SAMPLE = 65_536  # elements looked at before a tensor is given up as never clustered
TABLE_AT_MOST = 256


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
        where: the mask as bytes, or the gap symbols (unpacked, int32), or None.
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

    def code_planes(self) -> np.ndarray:
        """The codes as bit planes, uint8 (bits, ⌈k/8⌉)."""
        return to_planes(self.codes, self.code_bits)

    def gap_planes(self) -> np.ndarray:
        """The gap symbols as bit planes, uint8 (bits, ⌈k/8⌉)."""
        assert self.where is not None
        return to_planes(self.where, self.gap_bits)


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
    if value.dtype.itemsize not in (1, 2, 4) or value.size < 2:
        return None
    best = min(_candidates(np.ascontiguousarray(value)), key=lambda e: e.payload_bytes, default=None)
    return best if best is not None and best.payload_bytes + CALL_BYTES < value.nbytes else None


def decode(encoding: Encoding) -> np.ndarray:
    """Return the dense tensor, bit for bit."""
    count = math.prod(encoding.shape)
    table, kept = encoding.table, _kept(encoding, count)
    if kept is None:
        codes = encoding.codes.astype(np.int64)
    else:
        codes = np.zeros(count, dtype=np.int64)
        codes[kept] = _symbols(encoding, len(kept))
        zero = np.zeros((*table.shape[:-1], 1), dtype=table.dtype)
        table = np.concatenate([zero, table], axis=-1)
    if encoding.values == "channel":
        return np.take_along_axis(table, codes.reshape(len(table), -1), axis=1).reshape(encoding.shape)
    return table[codes].reshape(encoding.shape)  # type: ignore[no-any-return]


def _symbols(encoding: Encoding, count: int) -> np.ndarray:
    """What stands for each nonzero in a table that begins with zero."""
    if encoding.values == "raw":
        return np.arange(1, count + 1)
    return np.ones(count, np.int64) if encoding.values == "one" else encoding.codes.astype(np.int64) + 1


def _kept(encoding: Encoding, count: int) -> np.ndarray | None:
    if encoding.positions == "all":
        return None
    assert encoding.where is not None
    if encoding.positions == "mask":
        return np.flatnonzero(np.unpackbits(encoding.where, count=count))
    return from_gaps(encoding.where, encoding.gap_bits)


def _candidates(value: np.ndarray) -> Iterator[Encoding]:
    bits = value.reshape(-1).view(f"u{value.dtype.itemsize}")
    kept = np.flatnonzero(bits)
    sparse = len(kept) < 0.9 * bits.size
    places = list(_places(kept, bits.size)) if sparse else []
    nonzeros = bits[kept] if sparse else bits
    found = _table(bits)
    if found is not None:
        yield _build(value, "all", "table", found[0], found[1])
    yield from _per_channel(value, bits)
    if not sparse:
        return
    inner = _table(nonzeros)
    for positions, where, gap_bits in places:
        if inner is not None and len(inner[0]) == 1:
            yield _build(value, positions, "one", inner[0], np.empty(0, np.uint8), where, gap_bits)
        elif inner is not None:
            yield _build(value, positions, "table", inner[0], inner[1], where, gap_bits)
        else:
            yield _build(value, positions, "raw", nonzeros, np.empty(0, np.uint8), where, gap_bits)


def _places(kept: np.ndarray, count: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """The bitmask, and the gaps in their best width."""
    flags = np.zeros(count, dtype=bool)
    flags[kept] = True
    yield "mask", np.packbits(flags), 0
    best = min(range(2, 9), key=lambda b: stream_bytes(gap_count(kept, b), b))
    if stream_bytes(gap_count(kept, best), best) < count // 8:
        yield "gaps", gaps(kept, best), best


def _table(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The distinct values and the code of each element, or None where there are more than a byte can name."""
    if bits.size == 0:
        return np.zeros(1, bits.dtype), np.empty(0, np.uint8)
    step = max(1, bits.size // SAMPLE)
    values = np.unique(bits[::step])
    if len(values) > TABLE_AT_MOST:
        return None
    codes = np.searchsorted(values, bits).clip(max=len(values) - 1)
    if not np.array_equal(values[codes], bits):
        values, codes = np.unique(bits, return_inverse=True)
    return (values, codes.astype(np.uint8)) if len(values) <= TABLE_AT_MOST else None


def _per_channel(value: np.ndarray, bits: np.ndarray) -> Iterator[Encoding]:
    """One table an output channel, where each channel has few values though the tensor has many."""
    if value.ndim < 2 or value.shape[0] < 2:
        return
    rows = bits.reshape(value.shape[0], -1)
    if rows.shape[1] < 2 or len(np.unique(rows[0])) > min(TABLE_AT_MOST, rows.shape[1] // 2):
        return
    tables = [np.unique(row) for row in rows]
    most = max(map(len, tables))
    if most > min(TABLE_AT_MOST, rows.shape[1]):
        return
    table = np.stack([np.concatenate([t, np.full(most - len(t), t[-1])]) for t in tables])
    codes = np.concatenate([np.searchsorted(t, row) for t, row in zip(tables, rows, strict=True)])
    yield _build(value, "all", "channel", table, codes.astype(np.uint8))


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
