"""What every verb of torchopt runs in: alone in its process, and in torch's ordinary mode, whatever the caller is in.

Tracing replaces `torch.nn.Module.__call__` for all threads, torch's exporter does the same, and both put back what they found; of two
that overlap, the second would put back what the first had put there, for good. So verbs wait for one another. Tensors made in
`torch.inference_mode` cannot be trained or differentiated later, so that mode is left meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

_one_at_a_time = threading.RLock()  # a verb may call another in the same thread


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other thread is in a verb, and leave inference mode; also a decorator.

    Example:
        >>> with torch.inference_mode(), alone():
        ...     torch.zeros(1).is_inference()
        False
    """
    differentiates = torch.is_grad_enabled()  # leaving inference mode would turn it on, inside torch.no_grad too
    with _one_at_a_time, torch.inference_mode(False), torch.set_grad_enabled(differentiates):
        yield


def _forget_other_threads() -> None:
    """A forked process has one thread; whoever held the lock is not in it."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
