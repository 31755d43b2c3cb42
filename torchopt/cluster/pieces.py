"""Work on a long tensor in pieces that stay in cache, on as many threads as torch uses.

Some of torch's operations that tables need (`index_select` with one byte out, `bincount`) run on one thread only. They release Python's
lock, so ordinary threads do: each takes every n-th piece. A piece is below the size from which torch itself would start threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

PIECE = 32_704  # elements: below torch's grain of 32,768, a multiple of 64, and 128 KB of float32
ALONE_BELOW = 8 * PIECE  # handing work to a thread costs 50 µs, as much as two pieces

Result = TypeVar("Result")


def in_pieces(length: int, work: Callable[[range], Result]) -> list[Result]:
    """Call `work` with ranges of piece beginnings that together cover `length`; return what each call returned.

    Example:
        >>> in_pieces(100_000, lambda begins: sum(1 for _ in begins))
        [4]
    """
    threads = torch.get_num_threads()
    if threads == 1 or length < ALONE_BELOW:
        return [work(range(0, length, PIECE))]
    shares = [range(start, length, PIECE * threads) for start in range(0, PIECE * threads, PIECE)]
    later = [_pool(threads - 1).submit(work, share) for share in shares[1:]]
    return [work(shares[0]), *(future.result() for future in later)]


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="torchopt-cluster")
