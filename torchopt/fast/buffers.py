"""Memory to work in that is kept between calls: new pages cost the operating system more time than most of the work done in them.

One piece a dtype and thread, grown to the longest length asked for, never given back. Whoever takes it is done with it before the next
call; nothing is kept in it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(length: int, *, dtype: torch.dtype) -> Tensor:
    """Return uninitialized memory (length,) on the CPU, the same at each call of a thread.

    Example:
        >>> scratch(4, dtype=torch.float32).data_ptr() == scratch(3, dtype=torch.float32).data_ptr()
        True
    """
    kept: Tensor | None = getattr(_kept, str(dtype), None)
    if kept is None or len(kept) < length:
        with torch.inference_mode(False):  # it outlives the caller's mode
            kept = torch.empty(length, dtype=dtype)
        setattr(_kept, str(dtype), kept)
    return kept[:length]
