"""The smallest encoding of a tensor, by measured bytes: every kind that may be is built, and the dense tensor stays where none wins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from torchopt.packing.bits import histogram, to_parts, translated, width
from torchopt.packing.encoding import CHUNK, CONSTANT_AT_MOST, Encoding
from torchopt.packing.planes import dense_bits, ranked, split
from torchopt.packing.positions import best_gap_bits, gaps

CALL_BYTES = 80  # what one packed tensor costs in an ONNX file beside its arrays: a node, names, shapes
SAMPLE = 65_536  # elements looked at before a tensor is given up as never clustered
TABLE_AT_MOST = 256
GAPS_AT_MOST = 0.95  # of the mask's bytes, codes included: gaps take longer to decode than a mask does


def encode(value: np.ndarray) -> Encoding | None:
    """Return the smallest encoding of `value`, or None where the dense tensor is no larger.

    Args:
        value: any dtype of 1, 2 or 4 bytes, any shape; the first axis is that of the output channels.

    Example:
        >>> w = np.tile(np.array([0, 0, 0, 0.5], np.float32), 256)
        >>> encode(w).name, encode(w).payload_bytes
        ('gaps3+one', 104)
    """
    return min(encodings(value), key=lambda e: e.payload_bytes, default=None)


def encodings(value: np.ndarray) -> Iterator[Encoding]:
    """Yield every encoding of `value` that is smaller than the dense tensor, its call included."""
    if value.dtype.itemsize not in (1, 2, 4) or value.size < 2:
        return
    for encoding in _candidates(np.ascontiguousarray(value)):
        if encoding.payload_bytes + CALL_BYTES < value.nbytes:
            yield encoding


def _candidates(value: np.ndarray) -> Iterator[Encoding]:
    bits = value.reshape(-1).view(f"u{value.dtype.itemsize}")
    found = _table(bits)
    if found is not None and len(found[0]) == 1 and value.nbytes <= CONSTANT_AT_MOST:
        yield _build(value, "all", "one", found[0], np.empty(0, np.uint8))
        return
    if found is not None:
        yield _build(value, "all", "table", *found)
        yield from _patched(value, bits, *found)
    yield from _per_channel(value, bits, TABLE_AT_MOST if found is None else len(found[0]))
    if np.count_nonzero(bits) < 0.9 * bits.size:
        yield from _sparse(value, bits, found)


def _sparse(value: np.ndarray, bits: np.ndarray, found: tuple[np.ndarray, np.ndarray] | None) -> Iterator[Encoding]:
    """The encoding that says where the nonzeros are."""
    kept = np.flatnonzero(bits != 0)  # flags: numpy finds them twice as fast as numbers
    inner = _table(bits[kept]) if found is None else None
    if found is not None and found[0][0] == 0:  # the values rise as unsigned integers, so zero has code 0
        inner = (found[0][1:], found[1][kept] - np.uint8(1))
    if inner is None:
        values, table, codes, code_bits = "raw", bits[kept], np.empty(0, np.uint8), 8 * value.itemsize
    elif len(inner[0]) == 1:
        values, table, codes, code_bits = "one", inner[0], np.empty(0, np.uint8), 0
    else:
        values, table, codes, code_bits = "table", *inner, width(len(inner[0]) - 1)
    if len(table):
        positions, where, gap_bits = _places(bits, kept, code_bits)
        yield _build(value, positions, values, table, codes, where, gap_bits)


def _places(bits: np.ndarray, kept: np.ndarray, code_bits: int) -> tuple[str, np.ndarray, int]:
    """The bitmask, or the gaps in their best width where they are clearly smaller, given the bits of a nonzero's code."""
    if len(kept) < 0.45 * len(bits):  # with more nonzeros a bit an element is less than any gaps
        width, size = best_gap_bits(kept, len(bits))
        codes = len(kept) * code_bits // 8
        if size + codes < GAPS_AT_MOST * (len(bits) // 8 + codes):
            return "gaps", gaps(kept, width, len(bits)), width
    return "mask", to_parts(bits != 0, 1)[0], 0


def _patched(value: np.ndarray, bits: np.ndarray, values: np.ndarray, codes: np.ndarray) -> Iterator[Encoding]:
    """Codes by falling frequency, their rare high bits apart, unless a mask of the zeros takes less."""
    counts = histogram(codes)[: len(values)]
    zeros = counts[0] / bits.size if values[0] == 0 else 0.0
    found = dense_bits(counts)
    if found is not None and found[1] < 1 + (1 - zeros) * width(len(values) - 2):
        values, codes = ranked(values, codes, counts)
        codes, planes = split(codes, found[0], width(len(values) - 1))
        yield replace(_build(value, "all", "table", values, codes), code_bits=found[0], planes=planes)


def _table(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The distinct values, rising, and the code of each element, or None where there are more than a byte can name."""
    if bits.itemsize == 1:
        values = np.flatnonzero(histogram(bits)).astype(np.uint8)
        names = np.zeros(256, np.uint8)
        names[values] = np.arange(len(values))
        return values, translated(bits, names)
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
