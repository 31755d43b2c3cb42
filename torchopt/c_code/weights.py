"""How one layer's weights lie in flash: as they are, as codes of four bits, or as runs of non-zeros.

    dense      n bytes: int8
    codes      n/2 bytes: two codes a byte into a table of 16 values, one table for all rows or one a row
    runs       2 bytes a non-zero: how many zeros to skip (0 to 255), the value
    runs4      1 byte a non-zero: how many zeros to skip (0 to 15) and a code of four bits

A row is what one output channel reads, in the order in which its inputs lie. Where a gap is longer than its field, a zero value is
written that skips on. Zeros in runs cost neither flash nor instructions, so runs are taken from 70 % zeros on, which is where they
are the faster way; below, what is smallest. Every form is decoded again here and compared before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torchopt.errors import ModelError

SPARSE = 0.7  # the share of zeros from which on skipping them is faster than multiplying them (measured on Cortex-M4 under QEMU)
FORMS = ("DENSE", "CODES", "RUNS", "RUNS4")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """Weights as C holds them.

    Attributes:
        form: one of `FORMS`.
        data: bytes; int8 of the dense form.
        table: 16 values, or 16 a row; None without codes.
        counts: non-zeros a row, with what skips on; None but for runs.
    """

    form: str
    data: np.ndarray
    table: np.ndarray | None = None
    counts: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Bytes in flash."""
        return sum(part.nbytes for part in (self.data, self.table, self.counts) if part is not None)


def stored(rows: np.ndarray, *, forms: tuple[str, ...] = FORMS) -> Stored:
    """Choose a form for int8 weights (output channels, inputs of one).

    Args:
        rows: the weights.
        forms: what may be chosen.

    Example:
        >>> stored(np.tile(np.int8([0, 0, 0, 5]), (8, 64))).form, stored(np.full((2, 64), 3, np.int8)).form
        ('RUNS4', 'CODES')
    """
    found = [Stored(form="DENSE", data=rows.reshape(-1))]
    tables = _tables(rows)
    if "CODES" in forms:
        found += [_codes(rows, table) for table in tables]
    if "RUNS" in forms and np.mean(rows == 0) >= SPARSE:
        runs = [_runs(rows, None)] + [_runs(rows, table) for table in _tables(rows, zero=True)]
        found = [form for form in runs if form.size < found[0].size] or found
    best = min(found, key=lambda form: form.size)
    if not np.array_equal(decoded(best, rows.shape), rows):
        raise ModelError(f"weights of shape {rows.shape}: written as {best.form} they decode to others; this is a defect")
    return best


def decoded(form: Stored, shape: tuple[int, ...]) -> np.ndarray:
    """Return the weights again, as C reads them."""
    if form.form == "DENSE":
        return form.data.reshape(shape)
    rows = np.zeros(shape, np.int8)
    data, place = form.data, 0
    for number, row in enumerate(rows):
        table = None if form.table is None else form.table[number if len(form.table) > 1 else 0]
        if form.counts is None:
            assert table is not None
            packed = data[place : place + (len(row) + 1) // 2]
            row[:] = table[np.stack([packed & 15, packed >> 4], 1).reshape(-1)[: len(row)]]
            place += len(packed)
            continue
        count, position = int(form.counts[number]), 0
        for _ in range(count):
            gap, value = (data[place], data[place + 1]) if table is None else (data[place] >> 4, data[place] & 15)
            position += int(gap)
            if position < len(row):
                row[position] = np.uint8(value).astype(np.int8) if table is None else table[value]
            position += 1
            place += 2 if table is None else 1
    return rows


def _tables(rows: np.ndarray, *, zero: bool = False) -> list[np.ndarray]:
    """The tables of 16 that hold all values: one for all, one a row; with 0 among them if asked."""
    extra = [np.zeros(1, np.int8)] if zero else []
    found = []
    for groups in ([rows], list(rows)):
        values = [np.unique(np.concatenate([group.reshape(-1), *extra])) for group in groups]
        if all(len(v) <= 16 for v in values):
            found.append(np.stack([np.pad(v, (0, 16 - len(v))) for v in values]))
    return found


def _code_of(row: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.argmax(row[:, None] == table[None], 1).astype(np.uint8)


def _codes(rows: np.ndarray, table: np.ndarray) -> Stored:
    parts = []
    for number, row in enumerate(rows):
        codes = _code_of(row, table[number if len(table) > 1 else 0])
        pairs = np.pad(codes, (0, len(codes) % 2)).reshape(-1, 2)
        parts.append(pairs[:, 0] | pairs[:, 1] << 4)
    return Stored(form="CODES", data=np.concatenate(parts), table=table)


def _runs(rows: np.ndarray, table: np.ndarray | None) -> Stored:
    longest = 255 if table is None else 15
    data: list[int] = []
    counts = []
    for number, row in enumerate(rows):
        entries = list(_entries(row, longest))
        counts.append(len(entries))
        own = None if table is None else table[number if len(table) > 1 else 0]
        for gap, value in entries:
            data += [gap, value & 255] if own is None else [gap << 4 | int(np.argmax(own == value))]
    form = "RUNS" if table is None else "RUNS4"
    return Stored(form=form, data=np.array(data, np.uint8), table=table, counts=np.array(counts, np.uint16))


def _entries(row: np.ndarray, longest: int) -> Iterator[tuple[int, int]]:
    """(zeros before, value) of each non-zero, and zeros that skip on. All positions stay inside the row."""
    at = 0
    for position in np.flatnonzero(row):
        while position - at > longest:
            yield longest, 0
            at += longest + 1
        yield int(position - at), int(row[position])
        at = int(position) + 1
