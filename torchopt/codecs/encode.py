"""The smallest encoding of a tensor, by measured bytes: every kind that may be is built, and the dense tensor stays where none wins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from torchopt.codecs.bits import CHUNK, flags_to_parts, histogram, translated, width
from torchopt.codecs.encoding import CONSTANT_AT_MOST, Encoding
from torchopt.codecs.planes import dense_bits, ranked, split
from torchopt.codecs.positions import best_gap_bits, gaps

CALL_BYTES = 80  # what one packed tensor costs in an ONNX file beside its arrays: a node, names, shapes
SAMPLE = 65_536  # elements looked at before a tensor is given up as never clustered
TABLE_AT_MOST = 256
PAIRED = 4  # bits of symbols that ONNX has a type for: unpacking them takes no function, which in a small file counts more than some bits
PAIRED_AT_MOST = 1 << 18  # bytes of a tensor that is small in this sense
GAPS_AT_MOST = 0.95  # of the mask's bytes, codes included: gaps take longer to decode than a mask does


def encode(value: np.ndarray, allowed: Callable[[Encoding], bool] = lambda encoding: True) -> Encoding | None:
    """Return the smallest encoding of `value`, or None where the dense tensor is no larger.

    Args:
        value: any dtype of 1, 2, 4 or 8 bytes, any shape; the first axis is that of the output channels.
        allowed: which encodings may be chosen.

    Example:
        >>> w = np.tile(np.array([0, 0, 0, 0.5], np.float32), 256)
        >>> encode(w).name, encode(w).payload_bytes
        ('gaps3+one', 104)
    """
    return min(filter(allowed, encodings(value)), key=lambda e: e.payload_bytes, default=None)


def encodings(value: np.ndarray) -> Iterator[Encoding]:
    """Yield every encoding of `value` that is smaller than the dense tensor, its call included."""
    if value.dtype.itemsize not in (1, 2, 4, 8) or value.size < 2:
        return
    for encoding in _candidates(np.ascontiguousarray(value)):
        if encoding.payload_bytes + CALL_BYTES < value.nbytes:
            yield encoding


def _candidates(value: np.ndarray) -> Iterator[Encoding]:
    bits = value.reshape(-1).view(f"u{value.dtype.itemsize}")
    found = distinct(bits)
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
    kept = _nonzeros(bits, bits if found is None else found[1])
    # The values rise as unsigned integers, so zero has code 0.
    inner = distinct(kept) if found is None else (found[0][1:], np.subtract(kept, np.uint8(1), out=kept))
    if inner is None:
        placed = _build(value, *_placed(bits, "raw", kept, np.empty(0, np.uint8)))
    elif len(inner[0]) == 1:
        placed = _build(value, *_placed(bits, "one", inner[0], np.empty(0, np.uint8)))
    elif len(inner[0]):
        placed = _build(value, *_placed(bits, "table", *inner))
    else:
        return
    yield placed
    if placed.positions == "gaps" and placed.gap_bits != PAIRED and value.nbytes < PAIRED_AT_MOST:
        yield replace(placed, gap_bits=PAIRED, where=gaps(bits, PAIRED))


def _nonzeros(bits: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The elements of `taken` where `bits` is not zero."""
    out, end = np.empty(np.count_nonzero(bits), taken.dtype), 0
    for start in range(0, bits.size, CHUNK):
        piece = taken[start : start + CHUNK][bits[start : start + CHUNK] != 0]
        out[end : end + len(piece)] = piece
        end += len(piece)
    return out


def _placed(
    bits: np.ndarray, values: str, table: np.ndarray, codes: np.ndarray
) -> tuple[str, str, np.ndarray, np.ndarray, np.ndarray, int]:
    """Choose the bitmask, or the gaps in their best width where they are clearly smaller; the arguments of `_build` from there on."""
    if np.count_nonzero(bits) < 0.45 * len(bits):  # with more nonzeros a bit an element is less than any gaps
        gap_bits, size = best_gap_bits(bits)
        coded = table.nbytes if values == "raw" else len(codes) * width(table.shape[-1] - 1) // 8
        if size + coded < GAPS_AT_MOST * (len(bits) // 8 + coded):
            return "gaps", values, table, codes, gaps(bits, gap_bits), gap_bits
    return "mask", values, table, codes, flags_to_parts(bits), 0


def _patched(value: np.ndarray, bits: np.ndarray, values: np.ndarray, codes: np.ndarray) -> Iterator[Encoding]:
    """Codes by falling frequency, their rare high bits apart, unless a mask of the zeros takes less."""
    counts = histogram(codes)[: len(values)]
    zeros = counts[0] / bits.size if values[0] == 0 else 0.0
    found = dense_bits(counts)
    if found is not None and found[1] < 1 + (1 - zeros) * width(len(values) - 2):
        values, codes = ranked(values, codes, counts)
        codes, planes = split(codes, found[0], width(len(values) - 1))
        yield replace(_build(value, "all", "table", values, codes), code_bits=found[0], planes=planes)


def distinct(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (the distinct values, rising; the code of each element), or None where there are more than a byte can name."""
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
    """A table for each output channel, or for each group of neighbours, where that has fewer values than the tensor's `distinct`."""
    if value.ndim < 2 or value.shape[0] < 2:
        return
    rows = bits.reshape(value.shape[0], -1)
    first = len(np.unique(rows[0]))
    if rows.shape[1] < 2 or first > rows.shape[1] // 2 or (first > distinct // 2 and width(first - 1) >= width(distinct - 1)):
        return
    tables = [np.unique(row) for row in rows]
    if max(map(len, tables)) > min(TABLE_AT_MOST, rows.shape[1]):
        return
    yield _build(value, "all", "channel", *_coded_rows(bits, _grouped(tables)))
    with_zero = [t if t[0] == 0 else np.append(t[:0], [0, *t]).astype(t.dtype) for t in tables]
    if np.count_nonzero(bits) < 0.9 * bits.size and max(map(len, with_zero)) <= TABLE_AT_MOST:
        table, codes = _coded_rows(bits, _grouped(with_zero))  # zero is the least of the values, so has code 0 in every table
        yield _build(value, *_placed(bits, "channel", table, _nonzeros(bits, codes)))


def _grouped(tables: list[np.ndarray]) -> list[np.ndarray]:
    """Join the tables of as many neighbours as can share one without wider codes, in groups of equal size."""
    most = 2 ** width(max(map(len, tables)) - 1)
    for size in (g for g in range(len(tables), 1, -1) if len(tables) % g == 0):
        joined = []
        for start in range(0, len(tables), size):
            joined.append(np.unique(np.concatenate(tables[start : start + size])))
            if len(joined[-1]) > most:
                break
        else:
            return joined
    return tables


def _coded_rows(bits: np.ndarray, tables: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (the tables as one array, the codes of all elements), each table serving an equal share of the elements."""
    most = max(map(len, tables))
    table = np.stack([np.append(t, np.full(most - len(t), t[-1])) for t in tables])
    codes = np.empty((len(tables), bits.size // len(tables)), np.uint8)
    for row, t, share in zip(codes, tables, bits.reshape(len(tables), -1), strict=True):
        row[:] = _codes(t, share)
    return table, codes.reshape(-1)


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
