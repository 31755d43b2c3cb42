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

from torchopt.fast.buffers import scratch

PER_THREAD = 1 << 17  # elements of a block: 512 KB of float32, less than a second-level cache; and above torch's grain of 32,768
SUMS_FROM = 1 << 18  # below, `bincount` is faster
GATHER_FROM = 2  # threads: a row each; on one, `index_select` takes half the time of `gather`
USES = 4  # a table of pairs is worth filling where each of its entries is used that often


def whole_blocks(length: int) -> int:
    """How many of `length` elements blocks cover: pairs in as many rows as torch has threads."""
    return length - length % (2 * torch.get_num_threads())


def blocks(whole: int) -> Iterator[slice]:
    """Yield slices that together cover `whole` elements, a number that `whole_blocks` has returned."""
    size = max(1, block_of(whole))
    for begin in range(0, whole, size):
        yield slice(begin, min(begin + size, whole))


def take_(out: Tensor, source: Tensor, index: Tensor) -> Tensor:
    """Set `out` (n,) to `source` (k,) at `index` (n,) int32, a row on each thread."""
    rows = torch.get_num_threads()
    if rows < GATHER_FROM:
        return torch.index_select(source, 0, index, out=out)
    return torch.gather(source.expand(rows, -1), 1, index.view(rows, -1), out=out.view(rows, -1))


def in_pairs(codes: Tensor, k: int) -> bool:
    """True where `codes` (n,) of a table of `k` entries are best read two at a time."""
    likely: bool = codes.device.type == "cpu" and len(codes) >= USES * 256 * k and sys.byteorder == "little"
    return likely and codes.is_contiguous() and int(codes.storage_offset()) % 2 == 0


def pairs_(buffer: Tensor, codes: Tensor, k: int) -> Tensor:
    """The pairs of a block of codes (n,) uint8, of a table of `k` entries, as indices (n / 2,) int32 in `buffer`."""
    both = codes.view(torch.int16)
    index = buffer[: len(both)].copy_(both)
    return index if k <= 128 else index.bitwise_and_(0xFFFF)  # the upper code is no sign


def block_of(length: int) -> int:
    """How many elements the longest block of a tensor has."""
    return min(length, PER_THREAD * torch.get_num_threads())


def pair_table(table: Tensor) -> Tensor:
    """All pairs of entries of `table` (k,) float32, as (256·k,) float64 of which each holds two."""
    entries = table.numpy()
    both = np.empty((len(entries), 256, 2), np.float32)
    both[:, : len(entries), 0] = entries
    both[:, :, 1] = entries[:, None]
    return torch.from_numpy(both.view(np.float64).reshape(-1))


def look_up_(value: Tensor, table: Tensor, codes: Tensor) -> Tensor:
    """Set `value` (n,) to the entries of `table` (k,) that `codes` (n,) name.

    Example:
        >>> look_up_(torch.empty(3), torch.tensor([0.0, 0.5]), torch.tensor([1, 0, 1], dtype=torch.uint8)).tolist()
        [0.5, 0.0, 0.5]
    """
    if table.dtype != torch.float32 or not in_pairs(codes, len(table)):
        return torch.index_select(table, 0, codes.int(), out=value)
    whole, both, buffer = whole_blocks(len(codes)), pair_table(table), scratch(block_of(len(codes)) // 2, dtype=torch.int32)
    for part in blocks(whole):
        look_up_pairs_(value[part], both, codes[part], buffer)
    value[whole:] = table[codes[whole:].int()]
    return value


def look_up_pairs_(value: Tensor, both: Tensor, codes: Tensor, buffer: Tensor) -> None:
    """`look_up_` for one block, with what `pair_table` and `scratch` have returned."""
    take_(value.view(torch.float64), both, pairs_(buffer, codes, len(both) // 256))


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
    whole, buffer, rows = whole_blocks(len(codes)), scratch(block_of(len(codes)) // 2, dtype=torch.int32), torch.get_num_threads()
    values = values.float()
    values = values.clone() if values.storage_offset() % 2 else values
    total, wide = torch.zeros(rows, 256 * k, dtype=torch.complex64), values[:whole].view(torch.complex64)
    for part in blocks(whole):
        index, block = pairs_(buffer, codes[part], k), wide[part.start // 2 : part.stop // 2]
        total.scatter_add_(1, index.view(rows, -1), block.view(rows, -1))
    both = total.numpy().view(np.float32).reshape(rows, k, 256, 2)  # by thread, and by the second and the first code of a pair
    result = both[:, :, :k, 0].sum((0, 1), dtype=np.float64) + both[:, :, :k, 1].sum((0, 2), dtype=np.float64)
    return torch.from_numpy(result).index_add_(0, codes[whole:].int(), values[whole:].double())


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
