"""Look-ups and sums by code over long tensors: two codes at a time, in blocks that stay in cache, on all of torch's threads.

    ŵ_2i, ŵ_2i+1 = P[c_2i + 256·c_2i+1]        P[a + 256·b] = (T[a], T[b])

A look-up costs the same whatever is looked up, so neighbouring one-byte codes are read as one two-byte index, pairs of float32 move
as one float64 (look-ups) or one complex64 (sums), and half as many elements are visited. Torch's `gather` and `scatter_add_` run on
several threads only where they have several rows: each block is viewed as one row a thread, so that a thread finds in its cache what it
has written there in the operation before. (Python threads gain nothing: torch's own keep every core busy while they wait for work.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

PER_THREAD = 1 << 17  # elements of a block: 512 KB of float32, less than a second-level cache; and above torch's grain of 32,768
ALONE_BELOW = 1 << 15  # shorter tensors are done in one call of the plain operation
SUMS_FROM = 1 << 18  # below, `bincount` is faster
GATHER_FROM = 3  # threads: `gather` takes twice the time of `index_select`, which runs on one
USES = 4  # a table of pairs is worth filling where each of its entries is used that often


def blocks(length: int, rows: int | None = None) -> Iterator[tuple[slice, int]]:
    """Yield slices that together cover `length`, each with the number of equal rows of even length that it divides into.

    Args:
        length: of the tensor.
        rows: of a block; None is one for each of torch's threads.

    Example:
        >>> [(part.start, part.stop, rows) for part, rows in blocks(280_001, rows=2)]
        [(0, 262144, 2), (262144, 280000, 2), (280000, 280001, 1)]
    """
    rows = torch.get_num_threads() if rows is None else rows
    whole = length - length % (2 * rows)
    for begin in range(0, whole, PER_THREAD * rows):
        yield slice(begin, min(begin + PER_THREAD * rows, whole)), rows
    if whole < length:
        yield slice(whole, length), 1


def take_(out: Tensor, source: Tensor, index: Tensor, rows: int) -> Tensor:
    """Set `out` (n,) to `source` (k,) at `index` (n,) int32, a row on each thread."""
    if rows < GATHER_FROM:
        return torch.index_select(source, 0, index, out=out)
    wide = source.expand(rows, -1)
    return torch.gather(wide, 1, index.view(rows, -1), out=out.view(rows, -1))


def in_pairs(codes: Tensor, k: int) -> bool:
    """True where `codes` (n,) of a table of `k` entries are best read two at a time."""
    likely: bool = codes.device.type == "cpu" and len(codes) >= max(ALONE_BELOW, USES * 256 * k)
    return likely and sys.byteorder == "little" and codes.is_contiguous() and int(codes.storage_offset()) % 2 == 0


def pair_blocks(codes: Tensor, k: int) -> Iterator[tuple[slice, Tensor, int]]:
    """Yield blocks of `codes` (n,) uint8, n even, with their pairs as indices (n / 2,) int32 in a buffer that is used again."""
    buffer = torch.empty(min(len(codes), PER_THREAD * torch.get_num_threads()) // 2, dtype=torch.int32)
    for part, rows in blocks(len(codes)):
        index = pairs_(buffer, codes[part])
        yield part, index if k <= 128 else index.bitwise_and_(0xFFFF), rows


def pairs_(buffer: Tensor, codes: Tensor) -> Tensor:
    """Write the pairs of a block of codes (n,), n even, into the beginning of an int32 buffer, and return it (n / 2,).

    Pairs whose second code is 128 or more come out negative.
    """
    pairs = codes.view(torch.int16)
    return buffer[: len(pairs)].copy_(pairs)


def pair_table(table: Tensor) -> Tensor:
    """All pairs of entries of `table` (k,) float32, as (256·k,) float64 of which each holds two."""
    entries = table.numpy()
    pairs = np.empty((len(entries), 256, 2), np.float32)
    pairs[:, : len(entries), 0] = entries
    pairs[:, :, 1] = entries[:, None]
    return torch.from_numpy(pairs.view(np.float64).reshape(-1))


def look_up_(value: Tensor, table: Tensor, codes: Tensor) -> Tensor:
    """Set `value` (n,) to the entries of `table` (k,) that `codes` (n,) name.

    Example:
        >>> look_up_(torch.empty(3), torch.tensor([0.0, 0.5]), torch.tensor([1, 0, 1], dtype=torch.uint8)).tolist()
        [0.5, 0.0, 0.5]
    """
    if table.dtype != torch.float32 or not in_pairs(codes, len(table)):
        return torch.index_select(table, 0, codes.int(), out=value)
    even = len(codes) // 2 * 2
    pairs, wide = pair_table(table), value[:even].view(torch.float64)
    for part, index, rows in pair_blocks(codes[:even], len(table)):
        take_(wide[part.start // 2 : part.stop // 2], pairs, index, rows)
    value[even:] = table[codes[even:].int()]
    return value


def sum_by_code(codes: Tensor, values: Tensor, k: int) -> Tensor:
    """Return Σ values over the members of each code: (n,) uint8 and (n,) floating → (k,) float64.

    Example:
        >>> sum_by_code(torch.tensor([1, 0, 1], dtype=torch.uint8), torch.tensor([1.0, 2.0, 3.0]), 2).tolist()
        [2.0, 4.0]
    """
    if codes.device.type != "cpu":
        return torch.zeros(k, dtype=torch.float64, device=values.device).index_add_(0, codes.int(), values.double())
    if len(codes) < SUMS_FROM or not in_pairs(codes, k):
        return torch.bincount(codes, values, minlength=k)
    even = len(codes) // 2 * 2
    values = values.float()
    values = values.clone() if values.storage_offset() % 2 else values
    total = torch.zeros(torch.get_num_threads(), 256 * k, dtype=torch.complex64)
    wide = values[:even].view(torch.complex64)
    for part, index, rows in pair_blocks(codes[:even], k):
        piece = wide[part.start // 2 : part.stop // 2]
        total[:rows].scatter_add_(1, index.view(rows, -1), piece.view(rows, -1))
    both = torch.view_as_real(total).view(-1, k, 256, 2)  # by thread, and by the second and the first code of a pair
    result = both[:, :, :k, 0].sum((0, 1), dtype=torch.float64) + both[..., 1].sum((0, 2), dtype=torch.float64)
    return result.index_add_(0, codes[even:].int(), values[even:].double())


def count_by_code(codes: Tensor, k: int) -> Tensor:
    """Return how often each code occurs: (n,) uint8 → (k,) int64.

    Example:
        >>> count_by_code(torch.tensor([1, 0, 1], dtype=torch.uint8), 2).tolist()
        [1, 2]
    """
    if k > 128 or not in_pairs(codes, k):
        return torch.bincount(codes, minlength=k)
    even = len(codes) // 2 * 2
    both = torch.bincount(codes[:even].view(torch.int16), minlength=256 * k).view(k, 256)
    return both.sum(0)[:k] + both.sum(1) + torch.bincount(codes[even:], minlength=k)
