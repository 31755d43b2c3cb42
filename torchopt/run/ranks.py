"""Several processes of one run, as torchrun starts them: all of them train, the first one alone writes.

torchrun --nproc-per-node 2 -m torchopt run RECIPE --out DIR
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from torchopt.errors import TorchoptError

T = TypeVar("T")


@contextlib.contextmanager
def process_group() -> Iterator[int]:
    """Join the processes that torchrun started, if it did, and yield this one's rank; 0 where it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield dist.get_rank() if dist.is_initialized() else 0
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def on_first(action: Callable[[], T]) -> T:
    """Do `action` on rank 0, and return its result, or raise its error, on all ranks.

    Example:
        >>> on_first(lambda: 3)
        3
    """
    if not dist.is_initialized():
        return action()
    answer: list[tuple[T | None, TorchoptError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            answer = [(action(), None)]
        except TorchoptError as error:
            answer = [(None, error)]
    dist.broadcast_object_list(answer, src=0)
    result, failure = answer[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
